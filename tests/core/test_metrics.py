"""Every fast formula against the slow references of ``tests/reference.py``, over the zoo of cases."""

import math

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose
from sklearn.datasets import load_digits
from torch import nn

from chanaxes_pl import compute_axes
from chanaxes_pl.core.gaussian import CEILING, Association, information, nearest_peers, total_information
from chanaxes_pl.core.metrics import input_capture, target_excess
from chanaxes_pl.core.moments import Moments, cholesky, ridge_inverse
from chanaxes_pl.core.peers import peer_coefficients, peer_overlap, peer_r2, peer_reconstruction
from chanaxes_pl.network.layers import select_layers, widens_pointwise
from chanaxes_pl.network.sampling import sample_positions
from chanaxes_pl.tables import COLUMNS, SPLIT_HALF
from tests.helpers import cases as zoo
from tests.helpers import reference

LOCAL = ("input_capture", "peer_overlap", "peer_r2", "hull_score")
TARGET = ("task_information", "target_excess")


def association(means, target) -> Association:
    means, target = torch.as_tensor(means), torch.as_tensor(target).reshape(len(means), -1)
    joint = torch.cat([means, target], 1).double()
    return Association.of(Moments.of(joint), means.shape[1], slice(means.shape[1], joint.shape[1]))


def pairwise(found: Association) -> torch.Tensor:
    """``[C, C]``, every channel with every other; 0 on the diagonal."""
    channels = len(found.correlation)
    return found.with_peers(torch.arange(channels).expand(channels, channels)).fill_diagonal_(0.0)


def local_samples(n=400, channels=12, seed=0) -> np.ndarray:
    """Correlated samples of unequal variance."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, channels)) @ rng.normal(size=(channels, channels)) + 3.0


def tolerance(column: str, local: float, target: float, dtype: torch.dtype, mapped: bool) -> float:
    """The ridge solve multiplies rounding by up to 1/λ: a float32 Gram matrix leaves 5 digits of peer R²."""
    if dtype == torch.float32 and (mapped or column.startswith(("peer_r2", "hull"))):
        return 2e-5
    return target if column.startswith(TARGET) else local


#: Channels that nearly repeat each other: −½ ln(1 − ρ²) multiplies the rounding of a float32 ρ by ρ/(1 − ρ²).
NEAR_DUPLICATES = ("duplicated channels", "widening 1×1")


def layer_rows(table: pd.DataFrame, layer: str) -> pd.DataFrame:
    return table[table["layer"] == layer]


# ---------------------------------------------------------------- end to end, over the zoo


@pytest.mark.parametrize("name", zoo.ZOO)
@pytest.mark.parametrize(("dtype", "local", "target"), [(torch.float64, 1e-10, 1e-9), (torch.float32, 1e-6, 1e-8)])
def test_table_agrees_with_the_slow_reference(name, dtype, local, target):
    model, loader = zoo.case(name, dtype)
    outputs, logits, labels = zoo.captured(model, loader)
    table = compute_axes(model, loader, layers="conv+linear", positions="all").table
    margin = reference.margins(logits, labels)
    for layer, output in outputs.items():
        rows = layer_rows(table, layer)
        # A float32 output and the affine map of its float32 input differ by that type's rounding.
        mapped = dtype == torch.float32 and widens_pointwise(select_layers(model, layer)[layer])
        for part, suffix in ((slice(None), ""), (slice(0, None, 2), "_even"), (slice(1, None, 2), "_odd")):
            samples = output[part].swapaxes(1, 2).reshape(-1, output.shape[1])
            with np.errstate(invalid="ignore"):  # +∞ and −∞ in one mean
                means = output[part].astype(np.float64).mean(2)
            expected = reference.layer_columns(samples, means, margin[part])
            for column in LOCAL + TARGET if suffix == "" else SPLIT_HALF:
                rtol = tolerance(column, local, target, dtype, mapped)
                if name in NEAR_DUPLICATES and dtype == torch.float32 and column == "peer_overlap":
                    rtol = max(rtol, 3e-6)
                assert_allclose(
                    rows[column + suffix], expected[column], rtol, 1e-2 * rtol, err_msg=f"{layer} {column}{suffix}"
                )
            if suffix == "":
                assert_allclose(rows["hull_size"], expected["hull_size"])
                assert_allclose(rows["dead"], np.isnan(expected["task_information"]))


@pytest.mark.parametrize("name", ["plain", "dead channels", "1×1 maps", "linear on [B, H, W, C]"])
def test_label_target_is_variance_between_classes_and_wilks_lambda(name):
    model, loader = zoo.case(name)
    outputs, _, labels = zoo.captured(model, loader)
    table = compute_axes(model, loader, layers="conv+linear", positions="all", target="label").table
    for layer, output in outputs.items():
        samples = output.swapaxes(1, 2).reshape(-1, output.shape[1])
        expected = reference.layer_columns(samples, output.mean(2), None, labels)
        for column in TARGET:
            assert_allclose(layer_rows(table, layer)[column], expected[column], 1e-9, err_msg=f"{layer} {column}")


def test_sampled_positions_are_the_ones_that_are_measured():
    model, loader = zoo.case("plain")
    outputs, _, _ = zoo.captured(model, loader)
    table = compute_axes(model, loader, positions=4, layers="conv").table
    for layer in select_layers(model):
        output = outputs[layer]
        chosen = sample_positions(np.arange(len(output)), output.shape[2], 4).numpy()
        samples = np.concatenate([image[:, places].T for image, places in zip(output, chosen, strict=True)])
        assert_allclose(layer_rows(table, layer)["input_capture"], reference.input_capture(samples), 1e-10)
        assert_allclose(layer_rows(table, layer)["peer_overlap"], reference.peer_overlap(samples), 1e-10)


@pytest.fixture(scope="module")
def trained():
    """A small network after some epochs of digits."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(digits.target)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        conv = [nn.Conv2d(1, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 16, 3, stride=2)]
        model = nn.Sequential(
            *conv, nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3, groups=16), nn.ReLU(), nn.Conv2d(16, 8, 1)
        ).append(nn.Flatten())
        model.append(nn.Linear(8, 10))
        optimiser = torch.optim.Adam(model.parameters(), 1e-2)
        for _ in range(6):
            for rows in torch.randperm(len(images)).split(128):
                optimiser.zero_grad()
                nn.functional.cross_entropy(model(images[rows]), labels[rows]).backward()
                optimiser.step()
    model.eval()
    data = torch.utils.data.TensorDataset(images[:400], labels[:400])
    return model, torch.utils.data.DataLoader(data, batch_size=100)


def test_target_metrics_of_a_trained_network_agree_with_the_slow_reference_to_1e_8(trained):
    model, loader = trained
    outputs, logits, labels = zoo.captured(model, loader)
    assert (logits.argmax(1) == labels).mean() > 0.9
    for target in ("logit_margin", "label"):
        table = compute_axes(model, loader, layers="conv+linear", target=target).table
        for layer in set(outputs) - {"9", "10"}:
            means = outputs[layer].astype(np.float64).mean(2)
            margin = reference.margins(logits, labels)
            samples = outputs[layer].swapaxes(1, 2).reshape(-1, means.shape[1])[:500]
            expected = reference.layer_columns(samples, means, margin, labels if target == "label" else None)
            for column in TARGET:
                assert_allclose(layer_rows(table, layer)[column], expected[column], 1e-8, err_msg=f"{layer} {column}")


def test_local_metrics_of_a_trained_network_agree_with_the_slow_reference_to_1e_6(trained):
    model, loader = trained
    outputs, _, _ = zoo.captured(model, loader)
    table = compute_axes(model, loader, positions="all").table
    for layer in set(outputs) - {"9", "10"}:
        samples = outputs[layer].swapaxes(1, 2).reshape(-1, outputs[layer].shape[1])
        rows = layer_rows(table, layer)
        assert_allclose(rows["input_capture"], reference.input_capture(samples), 1e-6, err_msg=layer)
        assert_allclose(rows["peer_overlap"], reference.peer_overlap(samples), 1e-6, err_msg=layer)


def test_a_wrong_reference_would_be_noticed(trained):
    """Negative control: the margin of float32 logits rounded to 3 digits is not the same target."""
    model, loader = trained
    outputs, logits, labels = zoo.captured(model, loader)
    table = compute_axes(model, loader).table
    means = outputs["0"].astype(np.float64).mean(2)
    off = reference.task_information(means, reference.margins(np.round(logits, 1), labels))
    assert not np.allclose(layer_rows(table, "0")["task_information"], off, rtol=1e-8)


# ---------------------------------------------------------------- Gaussian information


def test_ceiling_is_the_information_of_a_correlation_of_0_999():
    assert pytest.approx(3.107, abs=1e-3) == CEILING
    values = information(torch.tensor([1.0, 0.9999, 0.999**2, 7.0], dtype=torch.float64))
    assert_allclose(values, CEILING, 1e-12)
    assert information(torch.tensor(0.998, dtype=torch.float64)) < CEILING


def all_pairs(found):
    """``[C, C]`` information of every pair; the diagonal means nothing."""
    channels = len(found.single)
    return found.with_peers(torch.arange(channels).expand(channels, channels))


@pytest.mark.parametrize("channels", [1, 2, 3, 63, 130, 300])
def test_total_information_and_nearest_peers_are_those_of_the_whole_matrix(channels):
    correlation = torch.corrcoef(torch.randn(channels, 50, dtype=torch.float64)).reshape(channels, channels)
    correlation[:2, :2] = 1.0  # beyond the ceiling
    slow = information(correlation.square()).fill_diagonal_(0.0).sum(1)
    middle = channels // 3
    upper = [correlation[:middle], correlation[middle:, middle:]]
    assert_allclose(total_information(upper), slow, 1e-12, 1e-14)
    for count in {min(10, channels - 1), channels - 1} - {0}:
        found = nearest_peers(correlation, count)
        nearness = correlation.abs().fill_diagonal_(-1.0)
        assert_allclose(nearness.gather(1, found).sort(descending=True).values, nearness.topk(count).values)


@pytest.mark.parametrize("width", [1, 255, 256, 512])
def test_a_padded_cholesky_factor_is_the_plain_one(width):
    matrix = torch.corrcoef(torch.randn(width, 2 * width + 3, dtype=torch.float64)).reshape(width, width)
    factor, failed = cholesky(matrix)
    assert not failed
    assert_allclose(factor, torch.linalg.cholesky(matrix), 0, 1e-12)
    assert cholesky(-matrix)[1]
    inverse, failed = ridge_inverse(matrix, 0.1)
    assert not failed
    unit = torch.eye(width, dtype=torch.float64)
    assert_allclose(inverse @ (matrix + 0.1 * unit), unit, 0, 1e-12)
    assert ridge_inverse(matrix, -2.0)[1]


@pytest.mark.parametrize("inputs", [40, 400])
def test_upper_blocks_are_the_rows_of_the_correlation(inputs):
    """Without the whole matrix where few inputs make the channels, and from it once it is there."""
    weight = torch.randn(300, inputs, dtype=torch.float64)
    mapped = Moments.of(torch.randn(900, inputs, dtype=torch.float64)).mapped(weight, weight[:, 0])
    before = list(mapped.upper)
    assert ("correlation" in vars(mapped)) == (inputs == 400)
    start = 0
    for rows, again in zip(before, mapped.upper, strict=True):
        expected = mapped.correlation[start : start + len(rows), start:]
        assert_allclose(rows, expected, 0, 1e-13)
        assert_allclose(again, expected, 0, 1e-13)
        start += len(rows)
    assert start == 300


def test_information_keeps_nan_and_takes_rounding_below_zero_for_zero():
    assert information(torch.tensor(torch.nan)).isnan()
    assert information(torch.tensor(-1e-17)) == 0.0


@given(st.integers(0, 10**6), st.integers(2, 7), st.integers(1, 4))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_a_pair_knows_at_least_what_the_better_of_the_two_knows(seed, channels, width):
    rng = np.random.default_rng(seed)
    means = rng.normal(size=(30, channels)) @ rng.normal(size=(channels, channels))
    means[:, -1] = means[:, 0] * (1 + 1e-4 * rng.normal(size=30))  # a near duplicate
    found = association(means, means[:, :1] + rng.normal(size=(30, width)))
    better = torch.maximum(found.single[:, None], found.single)
    assert (pairwise(found) - better).fill_diagonal_(0.0).min() > -1e-9
    assert target_excess(found).min() > -1e-9
    assert_allclose(pairwise(found), pairwise(found).T, 1e-9, 1e-12)


def test_a_target_of_several_numbers_is_a_regression_on_them():
    rng = np.random.default_rng(1)
    target = rng.normal(size=(80, 3))
    means = target @ rng.normal(size=(3, 6)) + rng.normal(size=(80, 6))
    left = reference.residual(means, target)
    found = association(means, target)
    assert_allclose(found.single, reference.task_information_from_residuals(means, left), 1e-10)
    off_diagonal = ~np.eye(6, dtype=bool)
    pairs = reference.pair_information_from_residuals(means, left)
    assert_allclose(pairwise(found)[off_diagonal], pairs[off_diagonal], 1e-9)


def test_a_repeated_target_column_adds_nothing():
    rng = np.random.default_rng(2)
    target = rng.normal(size=(50, 1))
    means = target + rng.normal(size=(50, 4))
    twice = association(means, np.hstack([target, 3 * target]))
    assert_allclose(twice.single, association(means, target).single, 1e-8)


def test_both_forms_of_the_pair_formula_agree_for_a_scalar_target():
    rng = np.random.default_rng(3)
    means = local_samples(60, 5)
    target = means[:, 0] + rng.normal(size=60)
    expected = reference.pair_information_from_residuals(means, reference.residual(means, target))
    assert_allclose(reference.pair_information(means, target), expected, 1e-9)


@pytest.mark.filterwarnings("ignore:the task variable .* is not finite")
@pytest.mark.parametrize("value", [0.0, 0.1, 1e4 / 3, torch.nan, torch.inf])
def test_a_target_that_does_not_vary_or_is_not_finite_gives_nan_with_the_reason(value):
    model, loader = zoo.case("plain")

    def constant(logits, labels):
        return torch.full((len(labels),), value, dtype=torch.float64)

    table = compute_axes(model, loader, target=constant).table
    assert table[list(TARGET)].isna().all(axis=None)
    assert table["input_capture"].notna().all()
    assert set(table["reason"]) == {"target does not vary" if math.isfinite(value) else "target not finite"}


@pytest.mark.filterwarnings("ignore:the task variable .* is not finite")
def test_one_image_with_a_target_that_is_not_finite_is_enough_for_nan():
    model, loader = zoo.case("plain")
    margin = lambda z, labels: torch.where(z[:, 0] == z[:, 0].max(), torch.inf, z[:, 1])  # noqa: E731
    table = compute_axes(model, loader, target=margin).table
    assert table["task_information"].isna().all()
    assert set(table["reason"]) == {"target not finite"}


# ---------------------------------------------------------------- metrics by themselves


@pytest.mark.parametrize(
    ("noise", "power"),
    [
        ("median", np.median),
        ("mean", np.mean),
        ("q0.25", lambda v: np.quantile(v, 0.25)),
        ("q1", np.max),
        (0.5, lambda v: 0.5),
        (2, lambda v: 2.0),
    ],
)
def test_noise_power_of_input_capture(noise, power):
    samples = local_samples(channels=8)
    variance = samples.var(0)
    found = input_capture(Moments.of(torch.tensor(samples)), noise)
    assert_allclose(found, 0.5 * np.log1p(variance / power(variance)), 1e-10)


@pytest.mark.parametrize("noise", ["mode", "q0", "q1.5", "qx", "qnan", 0, -1.0, math.nan])
def test_noise_of_another_kind_is_refused(noise):
    with pytest.raises(ValueError, match=r"noise=.*expected 'median', 'mean', a quantile"):
        input_capture(Moments.of(torch.randn(9, 3)), noise)


def test_peer_coefficients_and_r2_agree_with_one_solve_a_channel():
    samples = local_samples(channels=14)
    for ridge in (1e-3, 0.1):
        coefficients, r2, size = reference.peer_reconstruction(samples, ridge)
        local = Moments.of(torch.tensor(samples))
        found = peer_reconstruction(local, ridge)
        assert_allclose(peer_coefficients(local, ridge), coefficients, 1e-8, 1e-10)
        assert_allclose(found.r2, r2, 1e-9)
        assert_allclose(found.hull_size, size)
        assert_allclose(peer_r2(Moments.of(torch.tensor(samples)), ridge), r2, 1e-9)


@pytest.mark.parametrize("still", [[], [1], [0, 2]])
@pytest.mark.parametrize("spoiled", [False, True])
def test_channels_that_few_inputs_make_get_what_their_own_samples_give(still, spoiled):
    """Through the low rank of their correlations, also where some of the inputs do not vary, or a bias is NaN."""
    inputs = torch.tensor(local_samples(channels=5))
    inputs[:, still] = 0.5
    weight = torch.randn(16, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    bias = torch.arange(16.0, dtype=torch.float64)
    bias[3] = torch.nan if spoiled else 3.0
    mapped, samples = Moments.of(inputs).mapped(weight, bias), inputs @ weight.T + bias
    assert mapped.root is not None
    assert mapped.live.tolist() == [not (spoiled and channel == 3) for channel in range(16)]
    for metric in (input_capture, peer_overlap, peer_r2, lambda moments: peer_reconstruction(moments).hull_score):
        assert_allclose(metric(mapped), metric(Moments.of(samples)), 1e-9)
    halves = [Moments.of(part).mapped(weight, bias) for part in (inputs[::2], inputs[1::2])]
    assert_allclose(Moments.merge_all(halves).covariance, mapped.covariance, 1e-10, 1e-12)


def test_hull_is_one_peer_for_a_duplicate_and_the_cap_where_ten_are_not_enough():
    rng = np.random.default_rng(4)
    samples = rng.normal(size=(4000, 40))
    samples = np.column_stack([samples, samples[:, 0], samples.sum(1)])
    found = peer_reconstruction(Moments.of(torch.tensor(samples)))
    assert found.hull_size[40] == 1
    assert found.r2[41] > 0.9
    assert found.hull_size[41] == 10
    assert_allclose(found.hull_score, found.r2 / found.hull_size, 1e-12)


def test_dead_channels_take_no_part_in_what_the_others_get():
    samples = torch.tensor(local_samples(channels=6))
    spoiled = samples.clone()
    spoiled[:, [1, 4]] = 2.0
    with_dead, without = Moments.of(spoiled), Moments.of(samples[:, [0, 2, 3, 5]])
    for metric in (input_capture, peer_overlap, peer_r2):
        found = metric(with_dead)
        assert found[[1, 4]].isnan().all()
        assert_allclose(found[[0, 2, 3, 5]], metric(without), 1e-10)
    assert (peer_coefficients(with_dead)[[1, 4]] == 0).all()
    assert (peer_coefficients(with_dead)[:, [1, 4]] == 0).all()


def test_metrics_do_not_depend_on_the_unit_of_the_output():
    samples = torch.tensor(local_samples(channels=6))
    for metric in (input_capture, peer_overlap, peer_r2):
        assert_allclose(metric(Moments.of(samples * 1e-9)), metric(Moments.of(samples)), 1e-9)


def test_correlations_that_rounding_made_indefinite_are_mended():
    """Moments that no samples have: the smallest eigenvalue of their correlations is far below −λ."""
    scatter = torch.full((3, 3), -0.9, dtype=torch.float64).fill_diagonal_(1.0)
    local = Moments(torch.tensor(10.0, dtype=torch.float64), torch.zeros(3, dtype=torch.float64), 10 * scatter)
    assert torch.linalg.eigvalsh(scatter)[0] < -0.5
    found = peer_reconstruction(local)
    nearest = torch.full((3, 3), -0.5, dtype=torch.float64).fill_diagonal_(1.0)  # without the negative eigenvalue
    mended = Moments(local.count, local.mean, 10 * nearest)
    torch.testing.assert_close(found.r2, peer_reconstruction(mended).r2, rtol=1e-9, atol=0)
    torch.testing.assert_close(peer_coefficients(local), peer_coefficients(mended), rtol=1e-9, atol=0)
    torch.testing.assert_close(peer_r2(local), found.r2)


def test_a_lone_channel_has_no_peers_and_says_nan():
    lone = Moments.of(torch.randn(20, 1, dtype=torch.float64))
    assert peer_overlap(lone).isnan().all()
    assert_allclose(input_capture(lone), 0.5 * np.log(2))
    assert peer_reconstruction(lone).hull_size.isnan().all()


def test_target_excess_looks_at_the_nearest_candidates_and_averages_the_best_partners():
    rng = np.random.default_rng(6)
    means = rng.normal(size=(200, 70)) + rng.normal(size=(200, 1))
    target = means[:, :20].sum(1) + 5 * rng.normal(size=200)
    found = association(means, target)
    single, pairs = reference.task_information(means, target), reference.pair_information(means, target)
    default = target_excess(found)
    assert_allclose(default, reference.target_excess(means, single, pairs), 1e-9)
    assert_allclose(target_excess(found, 7, 3), reference.target_excess(means, single, pairs, 7, 3), 1e-9)
    assert not np.allclose(default, reference.target_excess(means, single, pairs, 69, 10))


def test_exclusive_or_is_all_excess():
    """Two channels that know the sum only together: each alone has half of it, the pair has it all."""
    rng = np.random.default_rng(7)
    means = rng.normal(size=(100_000, 2))
    found = target_excess(association(means, means.sum(1)))
    assert_allclose(found, CEILING - 0.5 * np.log(2), rtol=0.01)


def test_channels_at_the_ceiling_are_counted():
    model, loader = zoo.case("duplicated channels")
    table = compute_axes(model, loader).table
    assert table["at_ceiling"].to_numpy().nonzero()[0].tolist() == [0, 1, 3, 5]
    assert not compute_axes(*zoo.case("one channel")).table["at_ceiling"].any()


def test_columns_of_the_table_are_those_of_the_schema():
    table = compute_axes(*zoo.case("plain")).table
    assert list(table.columns[:9]) == ["layer", "channel", *COLUMNS]
    assert (table["reason"] == "").all()


def test_a_layer_without_one_live_channel_is_a_layer_of_nan_with_the_reason():
    model, loader = zoo.case("plain")
    model[0].weight.data.zero_()
    table = compute_axes(model, loader).table
    rows = layer_rows(table, "0")
    assert rows["dead"].all()
    assert set(rows["reason"]) == {"dead: its output does not vary"}
    assert rows[list(COLUMNS)].isna().all(axis=None)
    assert not rows["at_ceiling"].any()


def test_dead_and_not_finite_channels_say_which_they_are():
    table = compute_axes(*zoo.case("dead channels")).table.set_index("channel")
    assert table["reason"][table["dead"]].to_dict() == {
        1: "dead: its output does not vary",
        4: "dead: its output does not vary",
        6: "output not finite",
        7: "output not finite",
    }
    assert (table["reason"][~table["dead"]] == "").all()
    widened = compute_axes(*zoo.case("dead channels of a widening 1×1")).table.set_index("channel")
    assert widened["reason"][widened["dead"]].to_dict() == {
        2: "dead: its output does not vary",
        5: "output not finite",
        6: "output not finite",
    }
