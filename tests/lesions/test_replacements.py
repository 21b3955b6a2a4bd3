"""What replaces a channel, against slow regressions, and its two forms against each other."""

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from torch.utils.data import DataLoader, TensorDataset

from chanaxes_pl.core.moments import Moments
from chanaxes_pl.lesions.replacements import REPLACEMENTS, Replacement, measure_replacements
from chanaxes_pl.network.batches import Placement
from chanaxes_pl.network.hooks import observed
from chanaxes_pl.network.probe import Probe
from chanaxes_pl.network.recording import Settings
from tests.helpers import cases as zoo
from tests.helpers import reference
from tests.helpers.filters import as_filter
from tests.helpers.lesions import lesion


def loader(n=24, side=8, size=10, seed=2) -> DataLoader:
    images = torch.randn(n, 3, side, side, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return DataLoader(TensorDataset(images, torch.arange(n) % 4), batch_size=size)


def replacements_of(network, layers="conv", data=None) -> dict[str, Replacement]:
    settings = Settings(layers=layers, positions="all", reliability=False)
    return measure_replacements(network, Probe(data or loader(seed=3)), settings, Placement(lambda batch: batch))


def snapshot(network) -> dict:
    state = {name: value.clone() for name, value in network.state_dict().items()}
    hooks = {n: (len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in network.named_modules()}
    flags = {
        n: (m.training, getattr(m, "inplace", None), getattr(m, "bias", 0) is None) for n, m in network.named_modules()
    }
    return {"state": state, "hooks": hooks, "flags": flags, "parameters": [id(p) for p in network.parameters()]}


def assert_unchanged(before, network):
    after = snapshot(network)
    state, state_after = before.pop("state"), after.pop("state")
    assert after == before
    assert list(state) == list(state_after)
    assert all(value.equal(state_after[name]) for name, value in state.items())


@pytest.mark.parametrize(
    "name", ["plain", "dead channels", "duplicated channels", "linear on [B, H, W, C]", "one channel"]
)
def test_repairs_agree_with_the_slow_reference(name):
    network, data = zoo.case(name)
    outputs, _, _ = zoo.captured(network, data)
    # The logits of a network of one channel are all the same, but for a factor: any peer would do.
    for layer, statistics in replacements_of(network, "conv" if name == "one channel" else "conv+linear", data).items():
        samples = outputs[layer].swapaxes(1, 2).reshape(-1, outputs[layer].shape[1])
        live = Moments.of(torch.from_numpy(samples)).live.numpy()
        kept = samples[:, live]
        peer, _, sizes = reference.peer_reconstruction(kept)
        rho, std = reference.correlation_matrix(kept), kept.std(0)
        hull = np.zeros_like(peer)
        for i in np.flatnonzero(np.isfinite(sizes)):
            near = sorted((j for j in range(len(rho)) if j != i), key=lambda j: -abs(rho[i, j]))[: int(sizes[i])]
            hull[i, near] = reference.ridge_r2(rho, i, near)[0]
        for found, expected in ((statistics.peer, peer), (statistics.hull, hull)):
            whole = np.zeros((len(live), len(live)))
            whole[np.ix_(live, live)] = expected * std[:, None] / std
            assert_allclose(found.numpy(), whole, rtol=1e-6, atol=1e-9)
        assert_allclose(statistics.mean.numpy()[live], kept.mean(0), rtol=1e-9, atol=1e-12)
        assert_allclose(statistics.std.numpy()[live], std, rtol=1e-9)


def test_a_duplicate_is_rebuilt_by_its_twin():
    network, data = zoo.case("duplicated channels")
    statistics = replacements_of(network, data=data)["0"]
    offset, peers, weights = statistics.rule("hull", 3)
    assert peers.tolist() == [0]
    assert_allclose([offset, float(weights[0])], [0.0, 1.0], atol=2e-3)  # but for the ridge
    offset, peers, weights = statistics.rule("hull", 5)
    assert_allclose([offset, float(weights[0])], [3 + 2 * network[0].bias[1].item(), -2.0], atol=5e-3)


@pytest.mark.parametrize("name", ["plain", "linear on [B, H, W, C]", "widening 1×1", "Conv1d"])
@pytest.mark.parametrize("operation", REPLACEMENTS)
def test_a_rewritten_output_and_a_rewritten_filter_give_the_same_logits(name, operation):
    network, data = zoo.case(name)
    images = next(iter(data))[0]
    replacements = replacements_of(network, "conv+linear", data)
    before = snapshot(network)
    modules = dict(network.named_modules())
    with observed(network):
        for layer, statistics in replacements.items():
            with lesion(network, layer, 2, operation, statistics=statistics):
                rewritten = network(images)
            with as_filter(modules[layer], 2, statistics, operation):
                torch.testing.assert_close(network(images), rewritten, rtol=1e-9, atol=1e-10)
            assert not rewritten.allclose(network(images))
    assert_unchanged(before, network)


@pytest.mark.parametrize("name", ["depthwise", "grouped"])
def test_channels_that_read_different_inputs_have_no_filter(name):
    network, data = zoo.case(name)
    with pytest.raises(ValueError, match="grouped convolution's channels read different inputs"):
        as_filter(network[0], 0, replacements_of(network, data=data)["0"]).__enter__()
