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
# - how to attach `AxisTracker` to a Trainer, and what it needs of your model and your data;
# - where its tables, scalars and figures are, and what is in them;
# - how to look at a model without any Trainer;
# - how to track a model whose batches or outputs are not the usual ones.
#
# Everything here runs in about fifteen seconds on one CPU core, on the handwritten digits that scikit-learn ships.

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

from chanaxes_pl import AxisTracker, compute_axes, read_run
from chanaxes_pl.analysis.correlations import axis_correlations, main_correlation
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
# Any LightningModule will do whose batches are `(images, labels)` and whose `forward(images)` gives logits: put yours
# in place of `Classifier`. The probe, the fixed labelled images that every checkpoint is measured on, comes from the
# datamodule's `probe_dataloader()` if it has one, else from the validation loader, or is given as
# `AxisTracker(probe=…)`.

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
# `schedule="log"` measured random initialisation, then after steps 1, 2, 4, 8, … of the first epoch, where most of it
# happens, and then every epoch. Training itself went on bit for bit as it would have without the tracker.
#
# ## What it leaves
#
# One Parquet file a checkpoint, in the run folder. `read_run` puts them together: a row a channel and checkpoint.

# %%
print(tracker.folder.relative_to(folder), [path.name for path in sorted(tracker.folder.iterdir())][:3], "…")
table = read_run(tracker.folder)
table[
    ["epoch", "step", "layer", "channel", "input_capture", "peer_overlap", "task_information", "target_excess"]
].tail()

# %% [markdown]
# The headline is ρ(input capture, task information): Spearman's rank correlation over a layer's channels, and its
# mean over layers. It comes with what is needed to judge it: the split-half reliability of both metrics, the ceiling
# that follows from them, and the same correlation with a target that knows nothing.

# %%
correlations = axis_correlations(table, resamples=200)
main_correlation(correlations)[
    ["epoch", "step", "rho", "low", "high", "null", "reliability_local", "reliability_target"]
].round(2)

# %%
plot_correlations(correlations, title="ResNet-18 at an eighth of its width, digits")

# %% [markdown]
# The same numbers went to every logger of the Trainer as scalars under `axis/…`, and to `trainer.callback_metrics`,
# so that `ModelCheckpoint(monitor="axis/rho")` or `EarlyStopping` can use them.

# %%
{key: round(float(value), 3) for key, value in trainer.callback_metrics.items() if key.count("/") == 1}

# %% [markdown]
# ## Without a Trainer
#
# `compute_axes` measures a model as it stands, here one of torchvision's that was never trained. `layers` takes
# `"conv"`, `"conv+linear"`, or globs over the model's own layer names.

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
# Where a batch is something else, or the model gives more than logits, one function says how to get there: `(module,
# batch) → (logits, labels)`. `target` chooses the task variable: the logit margin (default), the log-probability of
# the correct class, the label itself, or a function of logits and labels.

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
# On the command line the same is `chanaxes fit --config configs/digits/resnet18.yaml`, and `chanaxes report
# RUN_FOLDER` makes a page of a run. What the columns mean is the next notebook, `02_read_the_axes`.
