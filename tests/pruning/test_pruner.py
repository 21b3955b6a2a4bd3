"""``prune``: from a trained network to a smaller one that computes nearly the same."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from chanaxes_pl.models import BACKBONES, Classifier
from chanaxes_pl.pruning.pruner import prune
from chanaxes_pl.pruning.slim_file import fill, load_slim
from chanaxes_pl.units.macs import count_macs
from tests.helpers.networks import build
from tests.helpers.training import QUIET, trainer

pytestmark = [pytest.mark.filterwarnings(line) for line in QUIET]

IMAGES = torch.randn(24, 3, 32, 32, generator=torch.Generator().manual_seed(0))
DATA = TensorDataset(IMAGES, torch.arange(24) % 7)
# Where it does not matter which channels go: this takes no time.
EVENLY = {"score": "l1", "allocation": "uniform"}


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model.eval()(IMAGES)


def error(slim: nn.Module, dense: nn.Module) -> float:
    return float((logits(slim) - logits(dense)).norm() / logits(dense).norm())


@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize("budget", [0.7, 0.4])
def test_budget_is_met_and_macs_are_those_of_the_network(name, budget):
    dense = build(name)
    slim = prune(dense, DATA, budget=budget, compensate=False)
    assert slim.macs == count_macs(slim.model, IMAGES[:1])
    assert slim.dense_macs == count_macs(dense, IMAGES[:1])
    # or one unit, which can be more: the expansions of a quarter MobileNetV2 begin at 24 channels of 32×32
    assert slim.macs / slim.dense_macs == pytest.approx(budget, abs=0.02 if name == "mobilenet_v2" else 0.005)
    assert slim.report is None
    asked = {"budget": budget, "budget_of": "macs", "round_to": 1}
    assert slim.plan.notes == asked | {"score": "reconstruction", "allocation": "sensitivity", "compensate": "none"}


@pytest.mark.parametrize("name", BACKBONES)
def test_compensation_brings_logits_closer_to_the_dense_ones(name):
    dense = build(name)
    errors = {
        choice: error(prune(dense, DATA, budget=0.5, **EVENLY, compensate=choice).model, dense)
        for choice in (False, "fold", True)
    }
    assert errors["fold"] < errors[False]
    assert errors[True] < errors[False]


def test_true_is_refit():
    dense = build("resnet18")
    slims = [prune(dense, DATA, budget=0.5, **EVENLY, compensate=choice) for choice in (True, "refit")]
    assert torch.equal(logits(slims[0].model), logits(slims[1].model))
    assert slims[0].plan == slims[1].plan
    assert not slims[0].report.empty


@pytest.mark.parametrize("score", ["taylor", "keep_both", "random"])
def test_the_dense_network_is_left_bit_for_bit(score):
    dense = build("mobilenet_v2").train()
    dense.features[0].eval()
    next(dense.parameters()).grad = torch.ones_like(next(dense.parameters()))
    next(dense.parameters()).requires_grad_(False)
    before, gradients = copy.deepcopy(dense), [p.grad for p in dense.parameters()]
    stream = torch.get_rng_state()
    prune(dense, DATA, budget=0.5, score=score, compensate="refit", reestimate=True)
    assert torch.equal(torch.get_rng_state(), stream)
    for (name, after), old in zip(dense.named_parameters(), before.parameters(), strict=True):
        assert torch.equal(after, old), name
        assert after.requires_grad == old.requires_grad
    assert all(p.grad is gradient for p, gradient in zip(dense.parameters(), gradients, strict=True))
    assert float(gradients[0].mean()) == 1
    assert all(torch.equal(a, b) for a, b in zip(dense.buffers(), before.buffers(), strict=True))
    assert [m.training for m in dense.modules()] == [m.training for m in before.modules()]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in dense.modules())


def test_protected_layers_keep_their_channels():
    dense = build("vgg16_bn")
    first, *others = [name for name, layer in dense.named_modules() if isinstance(layer, nn.Conv2d)]
    slim = prune(dense, DATA, budget=0.5, **EVENLY, protect=[first], compensate=False).model
    assert slim.get_submodule(first).out_channels == dense.get_submodule(first).out_channels
    assert all(slim.get_submodule(o).out_channels < dense.get_submodule(o).out_channels for o in others)


@pytest.mark.parametrize("allocation", ["uniform", "shared", "own", "sensitivity"])
def test_rounded_widths(allocation):
    dense = build("resnet18")
    slim = prune(dense, DATA, budget=0.5, allocation=allocation, round_to=8)
    assert 0.45 < slim.macs / slim.dense_macs <= 0.5
    widths = [layer.out_channels for layer in slim.model.modules() if isinstance(layer, nn.Conv2d)]
    assert all(width % 8 == 0 for width in widths)
    assert sum(widths) < sum(layer.out_channels for layer in dense.modules() if isinstance(layer, nn.Conv2d))
    assert slim.plan.notes["round_to"] == 8


def test_budget_of_one_is_the_dense_network():
    dense = build("resnet18")
    slim = prune(dense, DATA, budget=1)
    assert slim.macs == slim.dense_macs
    assert torch.equal(logits(slim.model), logits(dense))


@pytest.mark.parametrize("compensation", [False, "refit"])
def test_saved_and_loaded_gives_the_same_logits(tmp_path, compensation):
    slim = prune(build("resnet18"), DATA, budget=0.5, **EVENLY, compensate=compensation)
    slim.save(tmp_path / "half")
    assert torch.equal(logits(load_slim(tmp_path / "half")), logits(slim.model))


@pytest.mark.parametrize("channels_last", [False, True])
def test_a_classifier_that_a_trainer_holds(tmp_path, channels_last):
    torch.manual_seed(0)
    dense = Classifier("resnet18", 7, width=0.5, channels_last=channels_last)
    fitter = trainer(tmp_path, max_epochs=1)
    fitter.fit(dense, DataLoader(DATA, batch_size=8))
    fitter.validate(dense, DataLoader(DATA, batch_size=8), verbose=False)  # leaves inference tensors in its metrics
    slim = prune(dense, DATA, budget=0.5)
    assert isinstance(slim.model, Classifier)
    assert slim.model._trainer is None
    assert dense.trainer is fitter
    assert slim.model.memory_format is dense.memory_format
    assert slim.macs / slim.dense_macs == pytest.approx(0.5, abs=0.005)


def test_too_narrow_for_channels_last_is_laid_out_contiguously(tmp_path):
    torch.manual_seed(0)
    dense = Classifier("resnet18", 7, width=0.5, channels_last=True).eval()
    slim = prune(dense, DATA, budget=0.05, **EVENLY)
    loaded, planned = (Classifier("resnet18", 7, width=0.5, channels_last=True) for _ in range(2))
    slim.save(tmp_path / "narrow")
    load_slim(tmp_path / "narrow", loaded)
    fill(planned, slim.plan, slim.model.state_dict())
    for model in (slim.model, loaded, planned):
        assert model.memory_format is torch.contiguous_format
        assert all(p.is_contiguous() for p in model.parameters())
    assert torch.equal(logits(loaded), logits(slim.model))
    assert dense.memory_format is torch.channels_last


def test_images_alone_will_do_where_the_score_needs_no_labels():
    dense = build("resnet18")
    wanted = prune(dense, DataLoader(DATA, batch_size=8), budget=0.5)
    for alone in (DataLoader(TensorDataset(IMAGES), batch_size=8), DataLoader(IMAGES, batch_size=8)):  # type: ignore[arg-type]
        assert torch.equal(logits(prune(dense, alone, budget=0.5).model), logits(wanted.model))
        with pytest.raises(ValueError, match=r"score='taylor'\): needs labels, and the batches of the probe"):
            prune(dense, alone, budget=0.5, score="taylor")


def test_layers_of_uneven_widths_are_refitted_in_channels_last():
    """Some weights are then laid out so that their flat view overlaps them."""
    torch.manual_seed(0)
    dense = Classifier("resnet18", 7, width=0.5, channels_last=True).eval()
    report = prune(dense, DATA, budget=0.05).report
    assert (report["reason"] == "").all()
    assert (report["after"] <= report["before"] * (1 + 1e-9)).all()


class Depends(nn.Module):
    """Two convolutions around something that depends on the data."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind = kind
        self.first, self.second, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8, 4)
        nn.init.ones_(self.first.bias)

    def forward(self, images):
        maps = self.first(images).relu()
        if self.kind == "branches" and images.mean() < 9:  # always taken
            maps = maps * 2
        if self.kind == "mixes" and len(images) > 1:  # units are sought with one image
            maps = maps / maps.sum(1, keepdim=True).clamp_min(1e-3) * maps.shape[1]
        if self.kind == "splits":
            left, right = maps.split([3, 5], 1)
            maps = torch.cat([left * 2, right], 1)
        return self.head(self.second(maps).mean((2, 3)))


def test_a_path_that_changes_what_removal_means_is_refused():
    with pytest.raises(
        ValueError, match=r"Depends gives different logits after removal than .*\(removing .* logits are off by \d"
    ):
        prune(Depends("mixes"), DATA, budget=0.5)


def test_a_network_that_needs_its_number_of_channels_is_refused():
    class Counts(Depends):
        def forward(self, images):
            maps = self.first(images).relu()
            if len(images) > 1:  # units are sought with one image
                maps = maps * torch.arange(8.0)[:, None, None]
            return self.head(self.second(maps).mean((2, 3)))

    with pytest.raises(ValueError, match=r"Counts gives different logits .*\(the network does not run without some"):
        prune(Counts("plain"), DATA, budget=0.5, **EVENLY)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_an_image_that_is_not_finite_is_named(value):
    images = IMAGES.clone()
    images[17, 0, 3, 3] = value
    with pytest.raises(ValueError, match=r"prune: image 17 of the probe holds NaN or infinity"):
        prune(build("resnet18"), DataLoader(TensorDataset(images, torch.arange(24)), batch_size=10), budget=0.5)


def test_logits_that_are_not_finite_are_named():
    model = build("resnet18")
    nn.init.constant_(model.fc.bias, torch.nan)
    with pytest.raises(ValueError, match=r"prune: _ResNet gives logits with NaN or infinity for 24 of 24 images"):
        prune(model, DATA, budget=0.5)


def test_a_bfloat16_network_is_not_refused_for_its_rounding():
    model, images = build("resnet18").bfloat16(), TensorDataset(IMAGES.bfloat16(), torch.arange(24))
    assert prune(model, images, budget=0.5, compensate=False).macs > 0


def test_control_flow_on_data_is_fine_where_removal_means_the_same():
    assert prune(Depends("branches"), DATA, budget=0.5).macs > 0


def test_a_split_of_fixed_sizes_keeps_the_channels_that_it_splits():
    slim = prune(Depends("splits"), DATA, budget=0.9).model
    assert slim.first.out_channels == 8
    assert slim.second.out_channels < 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 0}, r"prune\(budget=0\): expected the share"),
        ({"budget": 1.5}, r"budget=1.5\): expected the share"),
        ({"budget": float("nan")}, r"budget=nan\): expected the share"),
        ({"memory": "2 GB"}, r"prune\(memory='2 GB'\): expected gigabytes, a number above 0 such as 2.0"),
        (
            {"budget": 0.2, "protect": ["layer[123]*"]},
            r"budget=0.2\): 0.\d+ of the MACs remain when .* shorter protect=",
        ),
        ({"protect": ["*"]}, "protects every layer"),
        ({"protect": ["layer9*"]}, r"protect='layer9\*'\): matches no layer; there is '"),
        (
            {"protect": [nn.Conv2d(3, 8, 3)]},
            r"protect=\[Conv2d\(3, 8, .*\): expected a glob over layer names, or several",
        ),
        ({"protect": nn.Conv2d(3, 8, 3)}, r"protect=\[Conv2d\(3, 8, .*\): expected a glob"),
        (
            {"example_input": (torch.zeros(1, 3, 32, 32),)},
            r"example_input=a tuple of 1: .*\): expected images .* tensor",
        ),
        ({"probe_size": 0}, r"prune\(probe_size=0\): expected at least 3 images"),
        ({"probe_size": "a"}, r"prune\(probe_size='a'\): expected at least"),
        ({"budget": "0.5"}, r"prune\(budget='0.5'\): expected the share"),
        ({"score": "L1"}, r"prune\(score='L1'\): no such score; did you mean 'l1'\? Expected one of"),
        ({"score": "none such"}, r"no such score; there is .* and \d+ more\. Expected one of"),
        (
            {"example_input": torch.zeros(0, 3, 32, 32)},
            r"example_input=a tensor of shape \(0, 3, 32, 32\)\): .* one at least",
        ),
        ({"score": "taylr"}, r"prune\(score='taylr'\): no such score; did you mean 'taylor'"),
        ({"allocation": "unform"}, r"prune\(allocation='unform'\): expected one of 'uniform', 'shared', 'own'"),
        (
            {"compensate": "nonsense"},
            r"compensate='nonsense'\): expected True \(the same as 'refit'\), 'fold', 'distill', or False",
        ),
    ],
)
def test_errors_quote_what_was_given(options, message):
    with pytest.raises(ValueError, match=message):
        prune(build("resnet18"), DATA, **{"budget": 0.5, **options})


def test_images_that_do_not_fit_the_model():
    grey = TensorDataset(torch.zeros(8, 1, 32, 32), torch.zeros(8, dtype=torch.long))
    with pytest.raises(ValueError, match=r"does not run on .* shape \(1, 1, 32, 32\) .*to prune as example_input="):
        prune(build("resnet18"), grey, budget=0.5)


def test_no_files_are_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    prune(build("resnet18"), DATA, budget=0.5)
    assert not list(Path().iterdir())


def test_a_pruned_network_prints_in_one_line_what_was_done():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    slim = prune(model.append(nn.Linear(8, 4)), [torch.randn(64, 3, 8, 8)], 0.5, score="l1", allocation="uniform")
    share = f"{slim.macs / 1e6:.4g} of {slim.dense_macs / 1e6:.4g} M MACs ({100 * slim.macs / slim.dense_macs:.1f} %)"
    assert repr(slim).startswith(f"Slim(Sequential: {share}, l1/uniform/refit, divergence ")
    assert "\n" not in repr(slim)
    assert len(repr(slim)) < 120
