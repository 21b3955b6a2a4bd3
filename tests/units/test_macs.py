"""Multiply–accumulates by hand, where PyTorch's counter needs help."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from chanaxes_pl.units.macs import count_macs


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
