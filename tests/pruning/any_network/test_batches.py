"""Batches and outputs that are no pairs and no tensors: pruning and lesions give what they give for those."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import pandas as pd
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from chanaxes_pl import LesionExperiment, PruningExperiment, find_units, lesion_table, prune, pruning_grid
from chanaxes_pl.analysis.scores import SCORES
from chanaxes_pl.network.tracing import PartialForward

IMAGES = torch.randn(24, 3, 8, 8, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(24) % 4
PAIRS = DataLoader(TensorDataset(IMAGES, LABELS), 8)


@dataclass
class Item:
    pixel_values: Tensor
    labels: Tensor


@dataclass
class Output:
    logits: Tensor


class Named(NamedTuple):
    out: Tensor
    other: Tensor


class Net(nn.Module):
    """A small network that wraps up its logits."""

    def __init__(self, wrap: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.ReLU())
        self.head = nn.Linear(6, 4)
        self.wrap = wrap

    def forward(self, x: Tensor) -> Any:
        return self.wrap(self.head(self.body(x).mean((2, 3))))


def plain(logits: Tensor) -> Tensor:
    return logits


def named(logits: Tensor) -> dict[str, Tensor]:
    return {"logits": logits, "other": logits.sum(1)}


def several(logits: Tensor) -> tuple[Tensor, ...]:
    return logits, logits.sum(1)


def both(logits: Tensor) -> Named:
    return Named(logits, logits.sum(1))


def network(wrap: Callable[[Tensor], Any] = plain) -> nn.Module:
    torch.manual_seed(0)
    return Net(wrap).eval()


def mappings() -> list[Any]:
    return [{"image": images, "label": labels, "path": ["?"] * 8} for images, labels in PAIRS]


def objects() -> list[Any]:
    return [Item(images, labels) for images, labels in PAIRS]


def unknown() -> list[Any]:
    return [{"picture": images, "kind": labels} for images, labels in PAIRS]


def step(module: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    return module(batch["picture"]), batch["kind"]


KINDS = [(mappings, named), (objects, Output), (mappings, several), (objects, both)]


def equal(a: nn.Module, b: nn.Module) -> bool:
    pairs = zip(a.state_dict().items(), b.state_dict().items(), strict=True)
    return all(name == other and torch.equal(mine, theirs) for (name, mine), (other, theirs) in pairs)


@pytest.mark.parametrize(("batches", "wrap"), KINDS)
@pytest.mark.parametrize("score", ["l1", "taylor", "keep_both", "chip", "reconstruction"])
def test_pruned_as_with_pairs_and_tensors(batches, wrap, score):
    wanted = prune(network(), PAIRS, budget=0.7, score=score)
    found = prune(network(wrap), batches(), budget=0.7, score=score)
    assert equal(found.model, wanted.model)
    pd.testing.assert_frame_equal(found.report, wanted.report, check_exact=True)
    assert find_units(network(wrap), IMAGES[:1]).groups.keys() == find_units(network(), IMAGES[:1]).groups.keys()


@pytest.mark.parametrize(("batches", "wrap"), KINDS)
def test_grids_and_lesions_as_with_pairs_and_tensors(batches, wrap):
    grid = PruningExperiment(budgets=(0.7,), scores=("l1", "taylor"), compensate=("fold",))
    lesions = LesionExperiment(channels=3)
    wanted, found = (
        (
            pruning_grid(network(kind), given, given, grid, progress=False),
            lesion_table(network(kind), given, given, lesions, progress=False),
        )
        for kind, given in ((plain, PAIRS), (wrap, batches()))
    )
    for one, other in zip(found, wanted, strict=True):
        pd.testing.assert_frame_equal(one, other, check_exact=True)


@pytest.mark.parametrize("wrap", [plain, named, Output, several, both])
def test_wrapped_logits_are_run_again_in_part(wrap):
    net = network(wrap)
    with torch.no_grad():
        forward = PartialForward(net)
        assert torch.equal(forward.run(IMAGES), network()(IMAGES))
        assert forward.partial
        assert torch.equal(forward.rerun(edits={"body.0": torch.zeros_like}), lesioned())


def lesioned() -> Tensor:
    net = network()
    net.body[0].weight.zero_()
    net.body[0].bias.zero_()
    return net(IMAGES)


@pytest.mark.parametrize("score", ["l1", "taylor", "keep_both", "chip", "reconstruction"])
def test_a_step_shows_where_images_and_labels_are(score):
    wanted = prune(network(), PAIRS, budget=0.7, score=score)
    assert equal(prune(network(), unknown(), budget=0.7, score=score, step=step).model, wanted.model)


@pytest.mark.parametrize(
    "score", [*(name for name, kind in SCORES.items() if kind in ("local", "joint")), "activation_rms", "l2"]
)
def test_images_alone_do_for_scores_of_weights_and_activations(score):
    assert equal(
        prune(network(), [IMAGES[:8], IMAGES[8:]], budget=0.7, score=score).model,
        prune(network(), [(IMAGES[:8], LABELS[:8]), (IMAGES[8:], LABELS[8:])], budget=0.7, score=score).model,
    )


@pytest.mark.parametrize("score", [*(name for name, kind in SCORES.items() if kind in ("target", "both")), "taylor"])
def test_scores_of_the_task_ask_for_labels(score):
    with pytest.raises(ValueError, match=rf"prune\(score='{score}'\): needs labels, and the batches of the probe hold"):
        prune(network(), [IMAGES], budget=0.7, score=score)
    with pytest.raises(
        ValueError, match=rf"score='{score}'\): needs labels, and a batch has the keys image, kind, and"
    ):
        prune(network(), [{"image": IMAGES, "kind": LABELS}], budget=0.7, score=score)


def test_a_grid_with_a_step():
    grid = PruningExperiment(budgets=(0.7,), scores=("taylor", "random"))
    wanted = pruning_grid(network(), PAIRS, PAIRS, grid, progress=False)
    found = pruning_grid(network(), unknown(), unknown(), grid, progress=False, step=step)
    pd.testing.assert_frame_equal(found, wanted, check_exact=True)


def test_a_step_that_shows_no_images_is_refused():
    with pytest.raises(ValueError, match=r"prune\(step=…\): passes 0 values to Net, expected its images alone"):
        prune(network(), unknown(), budget=0.7, step=lambda _, batch: (batch["picture"], batch["kind"]))
    with pytest.raises(ValueError, match=r"has the keys picture, kind: .* otherwise pass step=lambda module, batch"):
        prune(network(), unknown(), budget=0.7)


def test_images_of_bytes_are_named_with_the_layer_s_error():
    data = [((IMAGES * 50).to(torch.uint8), LABELS)]
    with pytest.raises(ValueError, match=r"lesion_table: Net.forward was called with the images .*unsigned char"):
        lesion_table(network(), data, data, LesionExperiment(), progress=False)
    with pytest.raises(ValueError, match=r"prune: Net does not run on a torch.uint8 batch of shape \(1, 3, 8, 8\)"):
        prune(network(), data, budget=0.7)


def test_one_glob_protects_like_a_list_of_one():
    one = prune(network(), PAIRS, budget=0.9, protect="body.0").model
    assert equal(one, prune(network(), PAIRS, budget=0.9, protect=["body.0"]).model)
    assert (one.body[0].out_channels, one.body[3].out_channels < 6) == (8, True)
    with pytest.raises(ValueError, match=r"prune\(protect='nope\*'\): matches no layer; there is "):
        prune(network(), PAIRS, budget=0.9, protect="nope*")
