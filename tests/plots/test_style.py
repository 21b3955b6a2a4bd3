"""What all figures share: frame, type, zero lines, bands, and labels of layers and of training time."""

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest

from chanaxes_pl.core.metrics import METRICS
from chanaxes_pl.plots import plot_accuracy, plot_cost, plot_distributions, plot_groupings
from chanaxes_pl.plots.distributions import QUANTILES
from chanaxes_pl.plots.style import banded, canvas, horizontal, words
from chanaxes_pl.plots.ticks import layer_ticks, short, time_axis


def test_all_panels_have_the_same_look_and_the_settings_of_others_stay():
    mpl.get_backend()  # resolved on first use
    before = dict(mpl.rcParams)
    with canvas(2, 3, (6, 4), "a title", sharex=True) as (figure, panels):
        assert panels.shape == (2, 3)
    assert figure.get_suptitle() == "a title"
    for axes in panels.flat:
        assert [side for side, spine in axes.spines.items() if spine.get_visible()] == ["left", "bottom"]
        assert axes.yaxis.label.get_fontsize() == 9
    assert dict(mpl.rcParams) == before


def test_a_band_ends_where_its_edges_are_unknown():
    x, y = np.arange(4.0), pd.Series([1.0, 2.0, 3.0, 4.0])
    low = y.where(y < 3) - 0.5
    with canvas(1, 1, (3, 3)) as (_, ((axes,),)):
        banded(axes, x, y, low, y + 0.5, "black", alpha=0.2, label="line")
        horizontal(axes)
    (band,) = axes.collections
    assert band.get_paths()[0].vertices[:, 0].max() == 1
    line, zero = axes.lines
    assert line.get_ydata().tolist() == y.tolist()
    assert list(zero.get_ydata()) == [0, 0]


def test_as_many_layers_are_named_as_fit():
    layers = [f"features.{place}" for place in range(60)]
    at, names = layer_ticks(layers, most=30)
    assert list(at) == list(range(0, 60, 2))
    assert names[:2] == ["0", "2"]
    assert [len(layer_ticks(layers[:count], most=30)[0]) for count in (30, 31)] == [30, 16]
    assert short("conv1", ["conv1", "layer1.0"]) == "conv1"


@pytest.mark.parametrize("steps", [[0], [0, 1], [7, 70, 700], [0, 10, 100, 1000, 10_000, 100_000, 200_000, 400_000]])
def test_time_is_labelled_at_checkpoints_that_do_not_crowd(steps):
    with canvas(1, 1, (3, 3)) as (_, ((axes,),)):
        time_axis(axes, pd.DataFrame({"step": steps, "epoch": np.array(steps) / 10}))
    ticks = axes.get_xticks()
    assert set(ticks) <= set(steps)
    assert ticks[0] == steps[0]
    assert len(ticks) <= 6
    left, right = axes.get_xlim()
    assert left < steps[0]
    assert steps[-1] < right


def test_curves_show_the_numbers_of_their_tables():
    runs = pd.DataFrame({"run": ["a", "a", "b"], "step": [0, 1, 0], "seconds": [1.0, 3.0, 2.0]})
    seconds, share = plot_cost(runs.assign(time_share=[0.1, 0.2, 0.3])).axes
    assert [line.get_ydata().tolist() for line in seconds.lines] == [[1, 3], [2]]
    assert [line.get_ydata().tolist() for line in share.lines] == [[10, 20], [30]]

    accuracies = pd.DataFrame({"run": ["a", "b", "a"], "split": ["val", "val", "test"], "epoch": 1, "accuracy": 0.5})
    (axes,) = plot_accuracy(accuracies).axes
    assert [line.get_ydata().tolist() for line in axes.lines] == [[50]] * 3
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["validation images", "test images"]


def test_distributions_show_the_median_of_each_metric():
    quantiles = pd.DataFrame({"step": np.repeat([1, 10], len(QUANTILES)), "quantile": 2 * QUANTILES})
    quantiles = quantiles.assign(epoch=quantiles["step"], nats=quantiles["step"] * quantiles["quantile"])
    figure = plot_distributions(pd.concat([quantiles.assign(metric=metric) for metric in METRICS]))
    assert [axes.get_title() for axes in figure.axes] == [words(metric) for metric in METRICS]
    for axes in figure.axes:
        assert axes.lines[0].get_ydata().tolist() == [0.5, 5.0]
        assert len(axes.collections) == 2


def test_groupings_have_a_panel_for_each_checkpoint_with_all_layers():
    groups = pd.DataFrame({"when": ["start", "start", "end"], "layer": ["f.0", "f.1", "f.0"], "ari": [0.1, 0.2, 0.3]})
    figure = plot_groupings(groups.assign(ceiling_local=0.9, ceiling_target=0.8))
    start, end = figure.axes
    assert start.lines[0].get_ydata().tolist() == [0.1, 0.2]
    assert end.lines[0].get_ydata().tolist()[0] == 0.3
    assert np.isnan(end.lines[0].get_ydata()[1])
    assert [label.get_text() for label in end.get_xticklabels()] == ["0", "1"]


def test_powers_on_a_logarithmic_axis_are_set_as_powers():
    with canvas(1, 2, (2, 2)) as (_, panels):
        panels[0, 0].loglog([1, 100], [1, 100])
        panels[0, 1].plot([0, 1])
        panels[0, 1].set_xticks([0, 1], ["$a_{$", "b"])
    labels = [label for label in panels[0, 0].get_xticklabels() if "mathdefault" in label.get_text()]
    assert labels
    assert all(label.get_parse_math() for label in labels)
    assert not any(label.get_parse_math() for label in panels[0, 1].get_xticklabels())


def test_names_may_hold_dollars(tmp_path):
    with canvas(1, 1, (2, 2), "runs/$a_{$ x") as (figure, panels):
        panels[0, 0].plot([0, 1], label="$b_{$")
        panels[0, 0].legend()
    figure.savefig(tmp_path / "figure.png")
