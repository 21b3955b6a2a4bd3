"""Hooks live as long as their block, and calls are told in order with their shapes."""

from contextlib import suppress

import pytest
import torch
from torch import nn

from chanaxes_pl.network.hooks import calls, hooked, isolated_rng, observed, same_outputs


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


class Lora(nn.Linear):
    """Adds a low-rank part to its weight in eval mode, and takes it off again in training mode."""

    def __init__(self) -> None:
        super().__init__(4, 4)
        self.low, self.merged, self.calls = nn.Parameter(torch.randn(4, 4)), False, 0

    def train(self, mode: bool = True) -> "Lora":
        super().train(mode)
        if self.merged == mode:
            self.weight.data += -self.low.data if mode else self.low.data
            self.merged, self.calls = not mode, self.calls + 1
        return self


@pytest.mark.parametrize("outer", [True, False])
@pytest.mark.parametrize("inner", [True, False])
def test_what_modules_do_as_they_change_mode_is_undone(outer, inner):
    model = nn.Sequential(nn.Sequential(Lora(), nn.Dropout()), nn.BatchNorm1d(4))
    model.train(outer)
    model[0].train(inner)
    model[0][1].training = not inner
    lora, flags = model[0][0], [module.training for module in model.modules()]
    before = lora.weight.clone()
    with observed(model):
        assert lora.merged
        assert not any(module.training for module in model.modules())
    assert lora.merged is not inner
    assert [module.training for module in model.modules()] == flags
    assert torch.allclose(lora.weight, before, atol=1e-6)


def test_a_train_that_changes_other_modules_does_not_keep_its_way():
    class Frozen(nn.Sequential):
        def train(self, mode: bool = True) -> "Frozen":
            super().train(mode)
            self[0].eval()
            return self

    model = Frozen(nn.BatchNorm1d(4), nn.Linear(4, 4)).train()
    model[0].training = True  # someone thawed it
    with observed(model):
        pass
    assert [module.training for module in model.modules()] == [True, True, True]


def test_random_streams_are_restored_after_an_error_too():
    state = torch.get_rng_state()
    with suppress(KeyError), isolated_rng():
        torch.rand(3)
        raise KeyError
    assert torch.equal(torch.get_rng_state(), state)
