"""The laws of Moments, and of the recorder that streams them."""

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose

from chanaxes_pl import compute_axes
from chanaxes_pl.core.moments import Moments, median
from chanaxes_pl.network.moments_metric import MomentsMetric
from chanaxes_pl.network.recording import LayerMoments
from chanaxes_pl.tables import axes_table
from tests.helpers import cases as zoo

law = settings(max_examples=30, deadline=None, derandomize=True)
scales = st.sampled_from([(0.0, 1.0), (1e4, 1.0), (-3.0, 1e-6), (1e4, 1e-3), (0.0, 1e6)])
sizes = st.lists(st.integers(0, 9), min_size=3, max_size=3)
seeds = st.integers(0, 2**31)
widths = st.integers(1, 6)


def batches(seed: int, sizes: list[int], width: int, scale: tuple[float, float]) -> list[torch.Tensor]:
    rng = np.random.default_rng(seed)
    mix = rng.normal(size=(width, width))
    return [torch.tensor(scale[0] + scale[1] * rng.normal(size=(n, width)) @ mix) for n in sizes]


def assert_same(found: Moments, expected: Moments, scale: tuple[float, float] = (0.0, 1.0)) -> None:
    """Equal up to the float64 rounding that a mean of this size leaves."""
    loss = 1e-12 + 1e-14 * abs(scale[0]) / scale[1]
    spread = expected.scatter.diagonal().sqrt()
    limit = torch.outer(spread, spread).max() + expected.count * scale[1] ** 2
    assert found.count == expected.count
    assert_allclose(found.mean, expected.mean, 1e-13, 1e-13 * scale[1])
    assert float((found.scatter - expected.scatter).abs().max()) <= loss * float(limit)


def two_pass(samples: np.ndarray) -> np.ndarray:
    samples = samples.astype(np.float64) - samples.astype(np.float64).mean(0)
    return samples.T @ samples / len(samples)


@given(seeds, sizes, widths, scales)
@law
def test_merge_is_associative(seed, sizes, width, scale):
    a, b, c = map(Moments.of, batches(seed, sizes, width, scale))
    assert_same(a.merge(b).merge(c), a.merge(b.merge(c)), scale)


@given(seeds, sizes, widths, scales)
@law
def test_order_of_merging_does_not_matter(seed, sizes, width, scale):
    a, b, c = map(Moments.of, batches(seed, sizes, width, scale))
    assert_same(a.merge(b).merge(c), c.merge(a).merge(b), scale)


@given(seeds, sizes, widths, scales)
@law
def test_streamed_is_whole(seed, sizes, width, scale):
    parts = batches(seed, sizes, width, scale)
    streamed = Moments.merge_all([Moments.empty(width), *map(Moments.of, parts)])
    whole = torch.cat(parts)
    assert_same(streamed, Moments.of(whole), scale)
    if len(whole):
        assert_same(
            streamed, Moments(streamed.count, whole.mean(0), len(whole) * torch.tensor(two_pass(whole.numpy()))), scale
        )


@given(seeds, st.integers(0, 9), widths, scales)
@law
def test_empty_is_neutral(seed, size, width, scale):
    some = Moments.of(batches(seed, [size], width, scale)[0])
    for merged in (some.merge(Moments.empty(width)), Moments.empty(width).merge(some)):
        assert torch.equal(merged.count, some.count)
        assert torch.equal(merged.mean, some.mean)
        assert torch.equal(merged.scatter, some.scatter)


def test_a_batch_of_no_samples_is_empty():
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        none, empty = Moments.of(torch.empty(0, 4, dtype=dtype)), Moments.empty(4)
        assert none.count == 0
        assert torch.equal(none.mean, empty.mean)
        assert torch.equal(none.scatter, empty.scatter)
    assert Moments.empty(4).covariance.isnan().all()


@given(seeds, sizes, widths, scales)
@law
def test_merge_touches_neither_input_and_shares_no_memory(seed, sizes, width, scale):
    parts = [Moments.of(part) for part in batches(seed, sizes, width, scale)]
    before = [(m.count.clone(), m.mean.clone(), m.scatter.clone()) for m in parts]
    merged = parts[0].merge(parts[1])
    Moments.merge_all(parts)
    merged.merge_(parts[2])
    for moments, (count, mean, scatter) in zip(parts, before, strict=True):
        assert torch.equal(moments.count, count)
        assert torch.equal(moments.mean, mean)
        assert torch.equal(moments.scatter, scatter)


@given(seeds, sizes, widths, scales)
@law
def test_merging_in_place_gives_the_same_bits(seed, sizes, width, scale):
    a, b, _ = map(Moments.of, batches(seed, sizes, width, scale))
    merged = a.merge(b)
    in_place = a.merge_(b)
    assert in_place is a
    assert torch.equal(a.count, merged.count)
    assert torch.equal(a.mean, merged.mean)
    assert torch.equal(a.scatter, merged.scatter)


@given(seeds, st.integers(1, 9), widths, st.integers(1, 5))
@law
def test_mapped_is_moments_of_the_mapped_samples(seed, size, width, rows):
    samples = batches(seed, [size], width, (2.0, 1.0))[0]
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, width, dtype=torch.float64, generator=generator)
    bias = torch.randn(rows, dtype=torch.float64, generator=generator)
    assert_same(Moments.of(samples).mapped(weight, bias), Moments.of(samples @ weight.T + bias), (0.0, 10.0))


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_mapped_by_a_bias_that_is_not_finite_leaves_nothing_finite_of_that_variable_alone(wrong):
    samples, weight = torch.randn(20, 2, dtype=torch.float64), torch.randn(3, 2, dtype=torch.float64)
    mapped = Moments.of(samples).mapped(weight, torch.tensor([0.0, wrong, 1.0], dtype=torch.float64))
    assert mapped.live.tolist() == [True, False, True]
    assert mapped.variance.isfinite().tolist() == [True, False, True]


@pytest.mark.parametrize("width", [255, 256, 257, 301])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_blocked_gram_matrix_of_a_wide_layer_is_the_plain_one(width, dtype):
    samples = torch.randn(50, width, dtype=dtype, generator=torch.Generator().manual_seed(width))
    found = Moments.of(samples)
    assert_allclose(found.scatter, found.scatter.T, 1e-12, 1e-11)
    assert_allclose(found.covariance, two_pass(samples.numpy()), 0, 1e-6 if dtype == torch.float32 else 1e-13)


def naive_variance(samples: torch.Tensor) -> torch.Tensor:
    """What not to do: E[x²] − E[x]², all in float32."""
    return samples.square().mean(0) - samples.mean(0).square()


def test_a_mean_of_1e4_costs_float32_samples_no_digits():
    samples = 1e4 + torch.randn(20_000, 5, generator=torch.Generator().manual_seed(0))
    expected = two_pass(samples.numpy()).diagonal()
    assert_allclose(Moments.of(samples).variance, expected, 2e-6)
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        assert_allclose(naive_variance(samples), expected, 2e-6)


def test_a_scale_of_1e_6_costs_float32_samples_no_digits():
    samples = 1e-6 * torch.randn(5000, 5, generator=torch.Generator().manual_seed(0))
    assert_allclose(Moments.of(samples).variance, two_pass(samples.numpy()).diagonal(), 2e-6)


def test_more_rows_than_one_float32_product_takes():
    samples = torch.randn(4096 * 2 + 5, 3, generator=torch.Generator().manual_seed(0))
    assert Moments.of(samples).count == len(samples)
    assert_allclose(Moments.of(samples).covariance, two_pass(samples.numpy()), 1e-6, 1e-7)


def test_autocast_does_not_change_the_result():
    samples = 5 + torch.randn(300, 7, generator=torch.Generator().manual_seed(0))
    outside = Moments.of(samples)
    with torch.autocast("cpu", torch.bfloat16):
        inside = Moments.of(samples)
        assert (samples.T @ samples).dtype == torch.bfloat16  # autocast was at work
    assert inside.scatter.dtype == torch.float64
    assert torch.equal(inside.scatter, outside.scatter)
    assert torch.equal(inside.mean, outside.mean)


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_matmul_precision_settings_do_not_change_the_result_and_stay(precision):
    samples = torch.randn(300, 64, generator=torch.Generator().manual_seed(0))
    outside, before = Moments.of(samples), torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        inside, kept = Moments.of(samples), torch.get_float32_matmul_precision()
    finally:
        torch.set_float32_matmul_precision(before)
    assert torch.equal(inside.scatter, outside.scatter)
    assert kept == precision


SWITCH = """
import torch
from chanaxes_pl.core.moments import true_float32
matmul = torch.backends.cuda.matmul
matmul.fp32_precision = 'tf32'
before = matmul.fp32_precision
with true_float32(torch.device("cuda")):
    print(matmul.fp32_precision)
assert matmul.fp32_precision == before
"""


@pytest.mark.skipif(not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="torch has the older switch only")
def test_tf32_is_off_inside_and_as_it_was_afterwards():
    """In a process of its own: torch's two switches, once mixed, do not come back."""
    result = subprocess.run([sys.executable, "-c", SWITCH], capture_output=True, text=True, check=False)
    assert result.stdout == "ieee\n", result.stderr


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_samples_are_squared_in_float32(dtype):
    samples = (3 + torch.randn(500, 4, generator=torch.Generator().manual_seed(0))).to(dtype)
    assert_allclose(Moments.of(samples).covariance, two_pass(samples.float().numpy()), 1e-5, 1e-6)


def test_samples_are_left_as_they_were():
    for dtype in (torch.float32, torch.float64):
        samples = torch.randn(20, 3, dtype=dtype)
        copy = samples.clone()
        Moments.of(samples)
        assert torch.equal(samples, copy)


def test_correlation_and_select():
    samples = torch.randn(60, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    moments = Moments.of(samples)
    assert_allclose(moments.correlation, np.corrcoef(samples.numpy().T), 1e-12)
    keep = torch.tensor([True, False, True, True, False])
    assert_allclose(moments.select(keep).scatter, Moments.of(samples[:, keep]).scatter, 1e-12)
    assert_allclose(moments.select(torch.tensor([3, 0])).mean, samples[:, [3, 0]].mean(0), 1e-12)
    assert moments.select(torch.ones(5, dtype=torch.bool)) is moments


def test_live_leaves_out_the_constant_the_negligible_and_the_not_finite():
    samples = torch.randn(40, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    samples[:, 1] = 0.1
    samples[:, 2] *= 1e-8
    samples[3, 4], samples[5, 5] = torch.nan, torch.inf
    assert Moments.of(samples).live.tolist() == [True, False, False, True, False, False]
    assert Moments.of(samples * 1e-9).live.tolist() == [True, False, False, True, False, False]
    assert not Moments.of(samples[:, 4:]).live.any()
    assert not Moments.of(samples[:, 1:2]).live.any()


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=9))
@law
def test_median_is_numpys(values):
    assert math.isclose(median(torch.tensor(values, dtype=torch.float64)), np.median(values), abs_tol=1e-12)


def test_the_metric_streams_and_merges_what_processes_stack():
    parts = batches(0, [5, 3, 8], 4, (1.0, 1.0))
    metric = MomentsMetric(Moments.empty(4))
    for part in parts:
        metric.update(Moments.of(part))
    assert_same(metric.merged, Moments.of(torch.cat(parts)))
    one, other = MomentsMetric(Moments.empty(4)), MomentsMetric(Moments.empty(4))
    one.update(Moments.of(parts[0]))
    other.update(Moments.of(torch.cat(parts[1:])))
    stacked = MomentsMetric(Moments.empty(4))
    stacked.update(Moments.of(parts[0]))
    for name in ("count", "mean", "scatter"):  # what a sync without reduction leaves
        setattr(stacked, name, torch.stack([getattr(one, name), getattr(other, name)]))
    count, mean, scatter = stacked.compute()
    assert_same(Moments(count, mean, scatter), Moments.of(torch.cat(parts)))
    metric.reset()
    assert metric.count == 0
    assert (metric.scatter == 0).all()


# ---------------------------------------------------------------- streaming over a probe


def assert_same_table(found, expected, rtol=1e-9):
    assert list(found.columns) == list(expected.columns)
    assert (found["reason"] == expected["reason"]).all()
    numbers = found.select_dtypes("number").columns
    assert_allclose(found[numbers], expected[numbers], rtol, 1e-11)


def merged(parts: list[dict[str, LayerMoments]]) -> dict[str, LayerMoments]:
    """What a collective call would give every process."""

    def together(kind: str, name: str):
        return tuple(Moments.merge_all(group) for group in zip(*(getattr(p[name], kind) for p in parts), strict=True))

    return {
        name: LayerMoments(m.channels, together("local", name), together("joint", name)) for name, m in parts[0].items()
    }


def table_of(moments: dict[str, LayerMoments]):
    return axes_table(moments.items(), {name: m.channels for name, m in moments.items()})


STREAMED = ["plain", "widening 1×1", "dead channels", "linear on [B, H, W, C]", "more channels than samples"]


@pytest.mark.parametrize("name", STREAMED)
@pytest.mark.parametrize("batch", [1, 7, 1000])
def test_batch_size_does_not_matter(name, batch):
    model, loader = zoo.case(name)
    other = zoo.loader_of(loader.dataset.tensors[0], batch)
    options = {"layers": "conv+linear", "positions": 5}
    assert_same_table(compute_axes(model, other, **options).table, compute_axes(model, loader, **options).table)


@pytest.mark.parametrize("name", STREAMED)
@pytest.mark.parametrize("world", [2, 3, 7])
def test_any_number_of_processes_gives_one_table_also_from_uneven_shares(name, world):
    model, loader = zoo.case(name)
    loader = zoo.loader_of(loader.dataset.tensors[0][:40], 4)
    shares = [zoo.recorded(model, loader, rank, world) for rank in range(world)]
    counts = [sum(int(part.count) for part in next(iter(share.values())).joint) for share in shares]
    assert sum(counts) == 40
    assert max(counts) - min(counts) <= 1
    assert_same_table(table_of(merged(shares)), table_of(zoo.recorded(model, loader)))


def test_one_share_alone_is_not_the_whole():
    """Negative control of the test above."""
    model, loader = zoo.case("plain")
    with pytest.raises(AssertionError):
        assert_same_table(table_of(zoo.recorded(model, loader, 0, 2)), table_of(zoo.recorded(model, loader)))


@pytest.mark.parametrize("name", STREAMED)
def test_the_two_halves_merge_into_the_whole(name):
    model, loader = zoo.case(name)
    halves, whole = (zoo.recorded(model, loader, halves=kept) for kept in (True, False))
    for layer, moments in halves.items():
        assert len(moments.local) == len(moments.joint) == 2
        assert len(whole[layer].local) == len(whole[layer].joint) == 1
    found, expected = table_of(halves), table_of(whole)
    assert expected.filter(regex="_even|_odd").isna().all(axis=None)
    kept = [column for column in expected if not column.endswith(("_even", "_odd"))]
    assert_same_table(found[kept], expected[kept])


def test_halves_are_the_even_and_the_odd_images():
    model, loader = zoo.case("plain")
    images, labels = loader.dataset.tensors
    table = compute_axes(model, loader, positions="all").table
    for half, start in (("even", 0), ("odd", 1)):
        data = torch.utils.data.TensorDataset(images[start::2], labels[start::2])
        alone = compute_axes(model, data, positions="all").table
        assert_allclose(table[f"input_capture_{half}"], alone["input_capture"], 1e-10)
        assert_allclose(table[f"target_excess_{half}"], alone["target_excess"], 1e-8)


@pytest.mark.parametrize("target", ["logit_margin", "label"])
def test_the_null_target_knows_nothing(target):
    model, _ = zoo.case("plain")
    images = zoo.images_2d(2000).double()
    moments = zoo.recorded(model, zoo.loader_of(images, 250), target=target)["0"]
    joint, targets = Moments.merge_all(moments.joint), moments.targets
    assert targets == (1 if target == "logit_margin" else zoo.CLASSES - 1)
    assert_allclose(joint.mean[-targets:], 0, atol=4 / math.sqrt(2000))
    assert_allclose(joint.variance[-targets:], 1, atol=4 * math.sqrt(2 / 2000))
    correlation = joint.correlation[-targets:].clone()
    correlation[:, -targets:] -= torch.eye(targets)
    assert_allclose(correlation, 0, atol=4.5 / math.sqrt(2000))
    again = zoo.recorded(model, zoo.loader_of(images, 250), target=target)["0"]
    assert torch.equal(again.joint[0].scatter, moments.joint[0].scatter)
