# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Read the axes
#
# At the end you will know
#
# - what each metric of the table says about a channel, and what it does not say;
# - how to tell whether an axis correlation means something: interval, reliability, ceiling and null;
# - whether the two axes sort a layer's channels into the same groups;
# - how to set several seeds against each other, paired;
# - how the axes come apart on CIFAR-100, how early they tell which channels will matter, and what a layer's channels
#   form beyond pairs.
#
# The first parts run in about half a minute on one CPU core, on the handwritten digits that scikit-learn ships. The
# last reads the results of the CIFAR-100 runs, which are kept beside the notebooks.

# %%
# %matplotlib inline
import logging
import tempfile
import warnings
from pathlib import Path

import lightning.pytorch as L
import pandas as pd
import torch
from lightning.pytorch.loggers import CSVLogger

from chanaxes_pl import AxisTracker
from chanaxes_pl.analysis.correlations import main_correlation, reliabilities
from chanaxes_pl.analysis.groupings import groupings
from chanaxes_pl.analysis.runs import read_runs
from chanaxes_pl.core.statistics import mean_over_runs
from chanaxes_pl.data import DigitsDataModule
from chanaxes_pl.models import Classifier
from chanaxes_pl.plots import (
    channel_panels,
    distributions,
    plot_channels,
    plot_correlations,
    plot_distributions,
    plot_early_prediction,
    plot_groupings,
    plot_structure,
)

warnings.filterwarnings("ignore", module="lightning")  # hints about workers and loggers
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
torch.set_num_threads(1)
folder = Path(tempfile.mkdtemp())

# %% [markdown]
# ## Two seeds of a small network

# %%
quiet = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
for seed in (0, 1):
    L.seed_everything(seed, verbose=False)
    trainer = L.Trainer(
        max_epochs=2,
        accelerator="cpu",
        callbacks=[AxisTracker(schedule=[1, 4, 16, 40], probe_size=600)],
        logger=CSVLogger(folder, "digits", version=seed),
        log_every_n_steps=10,
        **quiet,
    )
    model = Classifier("resnet18", num_classes=10, width=0.125, image_size=16, channels_last=True)
    trainer.fit(model, DigitsDataModule(image_size=16, batch_size=64))
runs = read_runs([folder / "digits" / "version_0", folder / "digits" / "version_1"], resamples=200)
table = runs.each[0].table

# %% [markdown]
# ## What a row says
#
# The **local axis** looks at a channel's output y and that of its peers, position by position, and never at a label:
#
# - `input_capture`, ½ ln(1 + Var y / σ₀²), σ₀² the layer's median variance: how loud the channel is beside its layer. A
#   channel exactly as loud as the median has ½ ln 2 = 0.35 nats, whatever the network.
# - `peer_overlap`: the mean over peers of the information that both share. High where peers do much the same.
# - `peer_r2`: the share of its variance that *all* peers together explain. It can be near 1 where no single peer
#   resembles the channel: a sum of many small overlaps.
#
# The **target axis** looks at image means and the task variable (by default the logit margin):
#
# - `task_information`: what the channel alone says about it.
# - `target_excess`: what the best pairs with peers say beyond their better half; a channel can be uninformative and
#   complete others.
#
# All five are Gaussian: they see linear relations. `dead` channels have NaN, with the reason beside it.

# %%
columns = ["layer", "channel", "input_capture", "peer_overlap", "peer_r2", "task_information", "target_excess", "dead"]
table.loc[table["step"] == table["step"].max(), columns].sort_values("task_information").tail(5).round(3)

# %% [markdown]
# Over all channels, from initialisation on:

# %%
plot_distributions(distributions(runs.table))

# %% [markdown]
# ## Is a correlation real?
#
# ρ is Spearman's, over the channels of a layer; `network` is the mean over layers. Four numbers stand beside it:
#
# - `low`, `high`: 95 % bootstrap over channels;
# - `reliability_local`, `reliability_target`: how far the metric, measured on one half of the probe, ranks channels as
#   the other half does. An unreliable metric correlates with nothing, so ρ near 0 would prove nothing;
# - `disattenuated`: ρ over the highest ρ that these reliabilities allow;
# - `null`: ρ with a target that knows nothing. At initialisation it need not be near 0: a layer's channels then share a
#   few strong directions, and a chance correlation with one of them moves them all. It shows how far a single target
#   can carry them.

# %%
columns = ["run", "step", "rho", "low", "high", "null", "reliability_local", "reliability_target", "disattenuated"]
main_correlation(runs.correlations)[columns].round(2)

# %%
reliable = reliabilities(runs.table)
reliable[reliable["layer"] == "network"].pivot_table(index="metric", columns="step", values="reliability").round(2)

# %% [markdown]
# The same as points: ranks within the layer at the first and at the last checkpoint. Coupled axes would lie along the
# diagonal.

# %%
steps = {"initialisation": runs.steps[0], "end": runs.steps[-1]}
plot_channels(channel_panels(runs.table, steps), list(runs.each[0].widths))

# %% [markdown]
# ## Do the axes sort channels alike?
#
# A correlation sees only what is monotonic. k-means groups channels by both local metrics, and again by both target
# metrics; the adjusted Rand index says how far the groupings agree, beside the agreement of each axis with itself on
# the other half of the probe, which is all that could be asked of it.

# %%
last = runs.table[runs.table["step"] == runs.steps[-1]]
plot_groupings(groupings(last).assign(when="end of training"))

# %% [markdown]
# ## Several seeds
#
# `read_runs` puts run folders side by side. `mean` is over runs, with their standard deviation and a bootstrap over
# runs; `change` pairs two checkpoints of the same run, so that what seeds differ in from the start drops out. On the
# command line, `chanaxes report RUN RUN …` makes a page of all this.

# %%
pair = {"layer": "network", "local": "input_capture", "target": "task_information"}
means, change = runs.mean(), runs.change(runs.steps[0], runs.steps[-1])
means[(means[list(pair)] == pair).all(axis=1)][["step", "mean", "std", "low", "high", "runs"]].round(2)

# %%
change[(change[list(pair)] == pair).all(axis=1)].round(2)

# %% [markdown]
# ## CIFAR-100
#
# What follows was measured on ResNet-18 at a quarter of its width, three seeds, 14 epochs, 62 % test accuracy. The
# numbers in `results/` are what `chanaxes report` wrote of these runs:
#
# ```bash
# CONFIG="--config configs/cifar100/resnet18_quarter.yaml --data.root DIR"
# chanaxes fit $CONFIG --seed_everything 0  # and 1, and 2; each makes a RUN
# chanaxes lesion $CONFIG --ckpt_path RUN/checkpoints/last.ckpt --channels 16 --evaluation_size 1000 \
#     --operations '["zero","mean","peer"]'
# chanaxes report RUN RUN RUN --out results
# ```
#
# `correlations.csv` is cut down to the headline pair, and to the means over layers of the other pairs.

# %%
correlations = pd.read_csv("results/correlations.csv")
plot_correlations(correlations, title="ResNet-18 at quarter width, CIFAR-100")

# %%
trajectory = mean_over_runs(main_correlation(correlations))
trajectory[["epoch", "step", "mean", "std", "low", "high", "runs"]].iloc[::3].round(2)

# %% [markdown]
# Coupled at random initialisation, more so in the first steps, and apart within an epoch or two, at full reliability.
#
# How early do the metrics know the end? Left, their rank correlation with the damage that removing a channel of the
# trained network does; right, with the order in which input capture would prune it. At initialisation nothing is known
# yet: which channels will matter is decided in training. Bands are bootstraps over the three runs.

# %%
early = mean_over_runs(pd.read_csv("results/early.csv")).rename(columns={"mean": "rho"})
plot_early_prediction(early)

# %% [markdown]
# ## Structure within a layer
#
# `layer_structure(model, loader)` looks at a layer as a graph of channels, joined by overlap
# or by excess, and asks a community detection how far it falls into groups, beside the same weights dealt at random; at
# what triplets know beyond their best pair; and at whether a channel that reads channels high in a metric is high in it
# too. Means of the three trained networks:

# %%
structure = pd.read_csv("results/structure.csv").groupby("layer", sort=False).mean(numeric_only=True).reset_index()
plot_structure(structure)
