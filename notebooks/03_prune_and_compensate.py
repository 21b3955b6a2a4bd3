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
# # Prune and compensate
#
# At the end you will know
#
# - how much damage the removal of a channel does, and how much of it the peers of the channel can repair;
# - how to get a network with half the multiply–accumulates in one call, without retraining;
# - how to compare scores, allocations and budgets at matched cost;
# - how to save a pruned network, and how to fine-tune it.
#
# The notebook takes about half a minute on one CPU core. It uses the handwritten digits that scikit-learn ships.

# %%
# %matplotlib inline
import logging
import tempfile
import warnings
from pathlib import Path

import lightning.pytorch as L
import torch

from chanaxes_pl import LesionExperiment, PruneModule, PruningExperiment, load_slim, prune
from chanaxes_pl.analysis.damage import score_damage_correlation
from chanaxes_pl.analysis.text import describe_lesions, describe_pruning
from chanaxes_pl.data import DigitsDataModule
from chanaxes_pl.models import Classifier
from chanaxes_pl.plots import plot_lesions, plot_pruning, plot_sensitivity

warnings.filterwarnings("ignore", module="lightning")  # hints about workers and loggers
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
torch.set_num_threads(1)
folder = Path(tempfile.mkdtemp())

# %% [markdown]
# ## A trained network
#
# A narrow ResNet-18 recognises most digits after four epochs.

# %%
L.seed_everything(0, verbose=False)
model = Classifier("resnet18", num_classes=10, width=0.125, image_size=16, schedule="one_cycle", channels_last=True)
data = DigitsDataModule(image_size=16, batch_size=64)
quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
trainer = L.Trainer(max_epochs=4, accelerator="cpu", default_root_dir=folder, **quiet)
trainer.fit(model, data)
trainer.test(model, data, verbose=False)

# %% [markdown]
# ## Lesions: how much does a channel matter?
#
# Damage is the change of the mean cross-entropy on test images, in nats. `zero` removes the *unit* of the channel, that
# is, all channels that residual sums and depthwise layers tie to it. `mean` sets the output of the channel to its mean.
# `peer` replaces the output by the best linear combination of the other channels of the layer; peer R² measures how
# good this combination is.

# %%
experiment = LesionExperiment(operations=("zero", "mean", "peer"), channels=3, scores=("l1",))
lesions = PruneModule(model, experiment, out=folder)
trainer.test(lesions, data, verbose=False)
print(describe_lesions(lesions.table))

# %%
local = ["input_capture", "peer_r2", "task_information"]
plot_lesions(lesions.table, score_damage_correlation(lesions.table, local, resamples=200))

# %% [markdown]
# ## Half the network, in one call
#
# `prune` takes the network, training images, and a budget: the share of multiply–accumulates that remains. In each
# group of layers the channels go first whose loss the others can best make up for (`score="reconstruction"`). It
# measures how far the outputs move when each group alone loses some, and cuts where that moves them least
# (`allocation="sensitivity"`). It then refits the remaining weights, layer by layer, to the outputs of the dense
# network on these images (`compensate=True`). It uses no labels and trains nothing.

# %%
slim = prune(model, data.probe_dataloader(), budget=0.5)
bare = prune(model, data.probe_dataloader(), budget=0.5, compensate=False)
print(f"{slim.dense_macs:,} multiply–accumulates an image became {slim.macs:,} ({slim.macs / slim.dense_macs:.1%})")
for name, network in {"not compensated": bare, "refitted": slim}.items():
    (result,) = trainer.test(PruneModule(network), data, verbose=False)
    print(f"{name:16}", {key: round(value, 3) for key, value in result.items()})

# %% [markdown]
# What each step gained, by the divergence of the outputs from those of the dense network, and what the widths were
# chosen by: a group whose line stays low can lose most of its channels.

# %%
slim.steps.round(3)

# %%
plot_sensitivity(slim.sensitivity)

# %% [markdown]
# `save` writes one safetensors file, with the plan of the removal in its metadata. Loading it needs no pickle.

# %%
slim.save(folder / "half")
again = load_slim(folder / "half")
images = next(iter(data.probe_dataloader()))[0]
print(sorted(path.name for path in folder.glob("half*")))
print("same logits:", torch.equal(again.eval()(images), slim.model.eval()(images)))

# %% [markdown]
# ## The grid: scores at matched cost
#
# `PruneModule(model, PruningExperiment(…))` prunes by every score, under every allocation, to every budget, and
# evaluates each network on the test images. Compare scores under `uniform` (every layer loses the same share) or
# `shared` (all scores get the widths that one reference score chooses): then only the ranking of channels differs.

# %%
experiment = PruningExperiment(
    budgets=(0.8, 0.6, 0.4, 0.2),
    scores=("input_capture", "task_information", "l1", "random"),
    allocations=("uniform",),
    compensate=(False, "refit"),
    probe_size=300,
)
grid = PruneModule(model, experiment, out=folder)
trainer.test(grid, data, verbose=False)
print(describe_pruning(grid.table))

# %%
plot_pruning(grid.table)

# %% [markdown]
# ## Fine-tuning
#
# `trainer.fit(PruneModule(slim), …)` trains the pruned network with one fixed recipe. Its checkpoints hold the plan
# too.

# %%
tuned = PruneModule(slim)
L.Trainer(max_epochs=1, accelerator="cpu", default_root_dir=folder, **quiet).fit(tuned, data)
trainer.test(tuned, data, verbose=False)

# %% [markdown]
# `results/README.md` shows these comparisons on CIFAR-100, with the commands that repeat them: `chanaxes lesion`,
# `chanaxes prune` and `chanaxes report --text`.
