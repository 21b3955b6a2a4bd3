"""Hooks live as long as their block, and calls are told in order with their shapes."""

import pytest
import torch
from torch import nn

from chanaxes_pl.network.hooks import calls, hooked, observed, same_outputs


def hooks_of(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("before", [False, True])
def test_hooks_are_removed_also_after_an_error(before):
    layer, seen = nn.Linear(2, 3), []
    with hooked([(layer, lambda *given: seen.append(len(given)))], before):
        layer(torch.zeros(1, 2))
    assert seen == [2 if before else 3]
    with pytest.raises(KeyError), hooked([(layer, print), (layer, print)], before):
        raise KeyError
    with pytest.raises(AttributeError), hooked([(layer, print), (None, print)], before):  # type: ignore[list-item]
        pass
    assert hooks_of(layer) == 0


def test_calls_are_all_runs_in_order():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last, self.first, self.idle = nn.Linear(4, 2), nn.Linear(4, 4), nn.Linear(1, 1)
            self.drop = nn.Dropout()

        def forward(self, x):
            return {"logits": self.last(self.drop(self.first(self.first(x))))}

    model = Twice().train()
    found = calls(model, lambda: model(x=torch.zeros(3, 4)))
    assert [call[0] for call in found] == ["first", "first", "drop", "last", ""]
    assert [call[2:] for call in found] == [((3, 4), (3, 4))] * 3 + [((3, 4), (3, 2)), ((3, 4), ())]
    assert found[3].module is model.last
    assert model.training
    assert hooks_of(model) == 0


def test_same_outputs():
    wanted = torch.tensor([[-100.0, 1.0], [torch.nan, torch.inf]])
    assert same_outputs(wanted.clone(), wanted, 0.0)
    assert same_outputs(wanted + 0.9, wanted, 0.01)
    assert not same_outputs(wanted + 1.1, wanted, 0.01)
    assert not same_outputs(wanted.nan_to_num(0.0), wanted, 0.01)
    assert not same_outputs(wanted[:1], wanted, 0.01)
    assert same_outputs(wanted[:0], wanted[:0], 0.01)


def test_a_network_that_writes_into_its_images_is_given_copies():
    class Normalising(nn.Module):
        def forward(self, x, more):
            return x.sub_(1) + more["bias"].mul_(2)

    model, images, bias = Normalising(), torch.ones(2, 3), torch.ones(3)
    with observed(model):
        assert model(images, more={"bias": bias}).eq(2).all()
        assert model(images, more={"bias": bias}).eq(2).all()
    assert images.eq(1).all()
    assert bias.eq(1).all()
    with pytest.raises(KeyError), observed(model):
        raise KeyError
    assert hooks_of(model) == 0
    model(images, {"bias": bias})
    assert images.eq(0).all()
