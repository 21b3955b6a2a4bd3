"""Networks in half and double precision: pruned in their own precision, measured exactly."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset

from chanaxes_pl import prune
from chanaxes_pl.network.batches import Placement
from chanaxes_pl.network.layers import by_position, select_layers
from chanaxes_pl.network.probe import Probe
from chanaxes_pl.network.recording import Settings, record
from tests.helpers.networks import CLASSES, build

IMAGES = torch.randn(64, 3, 32, 32, generator=torch.Generator().manual_seed(0))
DATA = TensorDataset(IMAGES, torch.arange(64) % CLASSES)
#: Precision → how much a refit's error may exceed that in float32, as a share of the logits.
KINDS = {torch.float64: 1e-4, torch.float16: 1e-3, torch.bfloat16: 1e-2}


def error(slim: torch.nn.Module, dense: torch.nn.Module, kind: torch.dtype) -> float:
    with torch.no_grad():
        found, wanted = (model(IMAGES.to(kind)).double() for model in (slim, dense))
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("compensate", ["refit", "fold"])
def test_pruned_to_half_with_a_refit_in_its_own_precision(kind, compensate):
    dense = build("resnet18").to(kind)
    slim = prune(dense, DATA, budget=0.5, score="l1", allocation="uniform", compensate=compensate)
    plain = prune(build("resnet18"), DATA, budget=0.5, score="l1", allocation="uniform", compensate=compensate)
    assert {parameter.dtype for parameter in slim.model.parameters()} == {kind}
    assert {parameter.dtype for parameter in dense.parameters()} == {kind}
    assert (slim.report["reason"] == "").all()
    assert error(slim.model, dense, kind) < error(plain.model, build("resnet18"), torch.float32) + 2 * KINDS[kind]
    if kind == torch.float64:  # solved in float64 anyway
        for one, other in zip(slim.model.parameters(), plain.model.parameters(), strict=True):
            torch.testing.assert_close(one.float(), other, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_moments_are_those_of_the_activations_as_they_are(kind):
    """Against NumPy in float64, on the same rounded activations."""
    model = build("resnet18").to(kind)
    layers = select_layers(model, "conv", whole=True)
    settings = Settings(layers=layers, positions="all", reliability=False)
    found = record(model, Probe(DATA, 64), settings, Placement.of(model)).moments()
    seen: dict[str, torch.Tensor] = {}
    for name, layer in layers.items():
        layer.register_forward_hook(
            lambda layer, _, output, name=name: seen.update({name: by_position(layer, output, 64, name)})
        )
    with torch.no_grad():
        model(IMAGES.to(kind))
    for name, moments in found:
        rows = seen[name].double().transpose(1, 2).flatten(0, 1).numpy()
        local = moments.local[0].merge_all(moments.local)
        np.testing.assert_allclose(local.mean.numpy().ravel(), rows.mean(0), rtol=1e-6, atol=1e-6)
        wanted = np.cov(rows.T, bias=True)
        np.testing.assert_allclose(local.covariance.numpy().squeeze(), wanted, rtol=1e-6, atol=1e-6 * wanted.max())


class Autocast(torch.nn.Module):
    """Runs in autocast by itself, either inside its forward or by a decorator."""

    def __init__(self, body: torch.nn.Module, decorated: bool = False, enabled: bool = True) -> None:
        super().__init__()
        self.body, self.decorated, self.enabled = body, decorated, enabled

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if self.decorated:
            return self._run(images).float()
        with torch.autocast("cpu", torch.bfloat16, enabled=self.enabled):
            return self.body(images).float()

    @torch.autocast("cpu", torch.bfloat16)
    def _run(self, images: torch.Tensor) -> torch.Tensor:
        return self.body(images)


@pytest.mark.parametrize("decorated", [False, True])
@pytest.mark.parametrize("compensate", ["fold", "refit", "distill"])
def test_a_network_that_enters_autocast_sees_its_new_weights(decorated, compensate):
    """Inside another autocast its cached weights would outlive their change: the errors were 16 times the outputs."""
    torch.manual_seed(0)
    body = torch.nn.Sequential(
        *(torch.nn.Conv2d(3, 16, 3), torch.nn.ReLU(), torch.nn.Conv2d(16, 16, 3), torch.nn.ReLU()),
        *(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(16, CLASSES)),
    )
    images = torch.randn(128, 3, 10, 10)
    settings = {"budget": 0.5, "score": "l1", "allocation": "uniform"}

    def moved(model: torch.nn.Module, **more) -> float:
        slim = prune(model, [images], **settings, **more)
        with torch.no_grad():
            found, wanted = slim.model(images), model(images)
        return float((found - wanted).norm() / (wanted - wanted.mean(0)).norm())

    own = moved(Autocast(body, decorated), compensate=compensate)
    plain = moved(Autocast(body, enabled=False), compensate=compensate)
    assert own < 1.1 * plain + 0.02
    assert own < 0.7 * moved(Autocast(body, decorated), compensate=False)
