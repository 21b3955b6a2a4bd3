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
# # Track your own model
#
# At the end you will know
#
# - how to attach `AxisTracker` to a Trainer, and what your model and your data must provide;
# - where its tables and scalars are, and what they contain;
# - how to measure a model without a Trainer;
# - how to track a model with unusual batches or outputs.
#
# The notebook takes about fifteen seconds on one CPU core. It uses the handwritten digits that scikit-learn ships.

# %%
# %matplotlib inline
import logging
import tempfile
import warnings
from pathlib import Path

import lightning.pytorch as L
import torch
import torchvision
from lightning.pytorch.loggers import CSVLogger

from chanaxes_pl import AxisTracker, axis_correlations, compute_axes, read_run
from chanaxes_pl.analysis.correlations import main_correlation
from chanaxes_pl.data import DigitsDataModule
from chanaxes_pl.models import Classifier
from chanaxes_pl.plots import plot_correlations

warnings.filterwarnings("ignore", module="lightning")  # hints about workers and loggers
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
torch.set_num_threads(1)
folder = Path(tempfile.mkdtemp())

# %% [markdown]
# ## One callback
#
# Any LightningModule works if its batches are `(images, labels)` and its `forward(images)` gives logits: put yours in
# place of `Classifier`. Every measurement uses the same labelled images, the *probe set*. The tracker takes it from
# `AxisTracker(probe=…)`, else from the `probe_dataloader()` of the datamodule, else from the validation loader.

# %%
L.seed_everything(0, verbose=False)
model = Classifier("resnet18", num_classes=10, width=0.125, image_size=16, channels_last=True)
data = DigitsDataModule(image_size=16, batch_size=64)
tracker = AxisTracker(schedule="log")
trainer = L.Trainer(
    max_epochs=3,
    accelerator="cpu",
    callbacks=[tracker],
    logger=CSVLogger(folder, "digits"),
    log_every_n_steps=10,
    enable_checkpointing=False,
    enable_progress_bar=False,
    enable_model_summary=False,
)
trainer.fit(model, data)

# %% [markdown]
# `schedule="log"` measures at random initialisation, after steps 1, 2, 4, 8, … of the first epoch, where most of the
# change happens, and then after every epoch. The trained weights are bit for bit those of a training without the
# tracker.
#
# ## What it writes
#
# Every measurement writes one Parquet file to the run folder. `read_run` joins them into one table with a row for each
# channel and measurement.

# %%
print(tracker.folder.relative_to(folder), [path.name for path in sorted(tracker.folder.iterdir())][:3], "…")
table = read_run(tracker.folder)
table[
    ["epoch", "step", "layer", "channel", "input_capture", "peer_overlap", "task_information", "target_excess"]
].tail()

# %% [markdown]
# The main result is ρ(input capture, task information): Spearman's rank correlation over the channels of a layer, and
# its mean over layers. Three numbers help to judge it: the split-half reliability of both metrics, the highest ρ that
# these reliabilities allow (the ceiling), and the same correlation with a random target (the null).

# %%
correlations = axis_correlations(table, resamples=200)
main_correlation(correlations)[
    ["epoch", "step", "rho", "low", "high", "null", "reliability_local", "reliability_target"]
].round(2)

# %%
plot_correlations(correlations, title="ResNet-18 at an eighth of its width, digits")

# %% [markdown]
# The tracker also logs these numbers to every logger of the Trainer under `axis/…`, and to `trainer.callback_metrics`.
# `ModelCheckpoint(monitor="axis/rho")` and `EarlyStopping` can use them.

# %%
{key: round(float(value), 3) for key, value in trainer.callback_metrics.items() if key.count("/") == 1}

# %% [markdown]
# ## Without a Trainer
#
# `compute_axes` measures any model once, here an untrained one of torchvision. `layers` takes `"auto"`,
# `"conv"`, `"conv+linear"`, or globs over the names of the model's layers.

# %%
torch.manual_seed(0)
untrained = torchvision.models.squeezenet1_1(num_classes=10)
larger = DigitsDataModule(image_size=32)
larger.setup("fit")
axes = compute_axes(untrained, larger.probe_dataloader(), layers="features.*.expand*", probe_size=300)
main_correlation(axes.correlations)[["local", "target", "rho", "low", "high", "n"]].round(2)

# %% [markdown]
# ## Other batches, other targets
#
# If a batch is not `(images, labels)`, or the model returns more than logits, pass `step=`, a function `(module, batch)
# → (logits, labels)`. `target` chooses the task variable: the logit margin (default), the log-probability of the
# correct class, the label itself, or a function of logits and labels.

# %%
confident = compute_axes(
    model,
    data.probe_dataloader(),
    step=lambda module, batch: (module(batch[0]) / 2, batch[1]),
    target="log_probability",
    probe_size=300,
)
main_correlation(confident.correlations)[["rho", "low", "high"]].round(2)

# %% [markdown]
# `chanaxes fit --config configs/digits/resnet18.yaml` runs a tracked training from the command line, and `chanaxes
# report RUN_FOLDER` writes a page about it. For several processes add `--trainer.strategy ddp --trainer.devices 2`. The
# next notebook, `02_read_the_axes`, explains the columns of the table.
