"""Multiply–accumulates by hand, where PyTorch's counter needs help."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from chanaxes_pl.units.groups import find_units
from chanaxes_pl.units.macs import Macs, count_macs
from chanaxes_pl.units.removal import without


@pytest.mark.parametrize("train", [False, True])
def test_all_products_of_an_attention_count(train):
    tokens, width = 5, 8
    layer = nn.TransformerEncoderLayer(width, 2, 12, batch_first=True).train(train)
    projections, products, mlp = 4 * tokens * width**2, 2 * tokens**2 * width, 2 * tokens * width * 12
    assert count_macs(layer, torch.zeros(3, tokens, width)) == projections + products + mlp


def test_values_of_another_width_than_the_keys():
    class Attend(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            x = x.view(len(x), 2, 5, 12)
            return F.scaled_dot_product_attention(x[..., :8], x[..., :8], x[..., 8:])

    assert count_macs(Attend(), torch.zeros(3, 10, 12)) == 2 * 5 * 5 * (8 + 4)


def test_a_parameter_may_be_the_input_of_a_module():
    class Token(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.token, self.layer = nn.Parameter(torch.zeros(1, 4)), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(self.token).sum() + x

    assert count_macs(Token(), torch.zeros(1, 2)) == 4 * 3


@pytest.mark.parametrize("width", [8, 12])
def test_attention_with_layers_of_its_own_for_queries_keys_and_values_is_counted_exactly(width):
    """However many heads, channels of queries and channels of values have gone."""

    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.num_heads, self.patch, self.norm = 4, nn.Conv2d(3, 16, 2, 2), nn.LayerNorm(16)
            self.q, self.k, self.v = (nn.Linear(16, 4 * count) for count in (width, width, 6))
            self.out, self.head = nn.Linear(24, 16), nn.Linear(16, 5)

        def forward(self, x: Tensor) -> Tensor:
            tokens = self.patch(x).flatten(2).mT
            seen = self.norm(tokens)
            q, k, v = (f(seen).view(len(x), -1, self.num_heads, f.out_features // self.num_heads).transpose(1, 2)
                       for f in (self.q, self.k, self.v))  # fmt: skip
            mixed = ((q @ k.mT).softmax(-1) @ v).transpose(1, 2).flatten(2)
            return self.head((tokens + self.out(mixed)).mean(1))

    model, image = Attends().eval(), torch.randn(1, 3, 16, 16)
    groups = tuple(find_units(model, image).groups.values())
    assert len(groups) == 4
    macs, rng = Macs(model, groups, image), np.random.default_rng(0)
    for _ in range(8):
        removed = np.array([rng.integers(group.size) for group in groups])
        assert macs.of(removed) == pytest.approx(count_macs(without(model, groups, removed), image), rel=1e-9)
