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
# - how to judge an axis correlation by its interval, reliability, ceiling and null;
# - whether the two axes sort the channels of a layer into the same groups;
# - how to compare several seeds, paired;
# - how the axes come apart on CIFAR-100, how early they predict which channels will matter, and which structure the
#   channels of a layer have beyond pairs.
#
# The first parts take about half a minute on one CPU core and use the handwritten digits that scikit-learn ships. The
# last part reads the results of the CIFAR-100 runs in `results/`.

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

from chanaxes_pl import AxisTracker, read_runs
from chanaxes_pl.analysis.correlations import main_correlation, reliabilities
from chanaxes_pl.analysis.groupings import groupings
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
# The **local axis** uses the output y of a channel and of its peers at single positions. It never uses a label.
#
# - `input_capture` is ½ ln(1 + Var y / σ₀²), where σ₀² is the median variance of the layer. It measures how strong the
#   channel is within its layer. A channel with the median variance has ½ ln 2 = 0.35 nats in every network.
# - `peer_overlap` is the mean over peers of the information that the channel shares with each of them. It is high if
#   peers do much the same.
# - `peer_r2` is the share of the channel's variance that *all* peers together explain. It can be near 1 although no
#   single peer resembles the channel, because many small overlaps add up.
#
# The **target axis** uses image means and the task variable (by default the logit margin).
#
# - `task_information` is what the channel alone says about the task variable.
# - `target_excess` is what the best pairs with peers say beyond the better channel of the pair. A channel without task
#   information of its own can still add to that of others.
#
# All five measure Gaussian information, that is, linear relations. `dead` channels have NaN and a reason.

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
# ρ is Spearman's rank correlation over the channels of a layer; `network` is the mean over layers. The table adds:
#
# - `low`, `high`: a 95 % bootstrap interval over channels;
# - `reliability_local`, `reliability_target`: how well both halves of the probe set agree in ranking the channels by
#   the metric. An unreliable metric correlates with nothing, so that ρ near 0 would prove nothing;
# - `disattenuated`: ρ divided by the highest ρ that these reliabilities allow;
# - `null`: ρ with a random target. It can be far from 0 at initialisation: the channels of a layer then share a few
#   strong directions, and a chance correlation with one of them moves all channels. It shows how large ρ can get by
#   chance.

# %%
columns = ["run", "step", "rho", "low", "high", "null", "reliability_local", "reliability_target", "disattenuated"]
main_correlation(runs.correlations)[columns].round(2)

# %%
reliable = reliabilities(runs.table)
reliable[reliable["layer"] == "network"].pivot_table(index="metric", columns="step", values="reliability").round(2)

# %% [markdown]
# The next figure shows every channel as a point: its ranks within the layer at the first and at the last measurement.
# Channels of coupled axes lie along the diagonal.

# %%
steps = {"initialisation": runs.steps[0], "end": runs.steps[-1]}
plot_channels(channel_panels(runs.table, steps), list(runs.each[0].widths))

# %% [markdown]
# ## Do the axes sort channels alike?
#
# A rank correlation sees only monotonic relations. k-means groups channels by both local metrics, and again by both
# target metrics. The adjusted Rand index measures how well the two groupings agree. The figure also shows how well each
# axis agrees with itself on the other half of the probe set, which is the most that the two axes could reach.

# %%
last = runs.table[runs.table["step"] == runs.steps[-1]]
plot_groupings(groupings(last).assign(when="end of training"))

# %% [markdown]
# ## Several seeds
#
# `read_runs` reads several run folders. `mean` is the mean over runs, with their standard deviation and a bootstrap
# over runs. `change` pairs two measurements of the same run, so that differences between seeds at the start drop out.
# On the command line, `chanaxes report RUN RUN …` writes a page about several runs.

# %%
pair = {"layer": "network", "local": "input_capture", "target": "task_information"}
means, change = runs.mean(), runs.change(runs.steps[0], runs.steps[-1])
means[(means[list(pair)] == pair).all(axis=1)][["step", "mean", "std", "low", "high", "runs"]].round(2)

# %%
change[(change[list(pair)] == pair).all(axis=1)].round(2)

# %% [markdown]
# ## CIFAR-100
#
# The rest shows ResNet-18 at a quarter of its width, three seeds, 14 epochs, 62 % test accuracy. `chanaxes report`
# wrote the numbers in `results/`:
#
# ```bash
# CONFIG="--config configs/cifar100/resnet18_quarter.yaml --data.root DIR"
# chanaxes fit $CONFIG --seed_everything 0  # and 1, and 2; each makes a RUN
# chanaxes lesion $CONFIG --ckpt_path RUN/checkpoints/last.ckpt --channels 16 --evaluation_size 1000 \
#     --operations '["zero","mean","peer"]'
# chanaxes report RUN RUN RUN --out results
# ```
#
# `correlations.csv` holds the main pair of metrics for every layer, and only the means over layers of the other pairs.

# %%
correlations = pd.read_csv("results/correlations.csv")
plot_correlations(correlations, title="ResNet-18 at quarter width, CIFAR-100")

# %%
trajectory = mean_over_runs(main_correlation(correlations))
trajectory[["epoch", "step", "mean", "std", "low", "high", "runs"]].iloc[::3].round(2)

# %% [markdown]
# The axes are coupled at random initialisation and more strongly in the first steps. They come apart within an epoch or
# two, while both metrics stay reliable.
#
# How early do the metrics predict the trained network? The left panel shows their rank correlation with the damage of
# removing a channel of the trained network. The right panel shows that with the order in which input capture would
# prune it. No metric predicts either at initialisation. Bands are bootstraps over the three runs.

# %%
early = mean_over_runs(pd.read_csv("results/early.csv")).rename(columns={"mean": "rho"})
plot_early_prediction(early)

# %% [markdown]
# ## Structure within a layer
#
# `layer_structure(model, probe)` asks three questions about a layer. Do its channels form groups? It joins channels by
# overlap or by excess and compares the communities with those of the same weights in random places. What do triplets
# know beyond their best pair? Does a channel have much of a metric if the channels that it reads have much of it? The
# figure shows means of the three trained networks.

# %%
structure = pd.read_csv("results/structure.csv").groupby("layer", sort=False).mean(numeric_only=True).reset_index()
plot_structure(structure)
