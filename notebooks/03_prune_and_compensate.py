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
# - what it costs a trained network to lose a channel, and how much of that its peers can make up for;
# - how to get a network with half the multiply–accumulates in one call, with nothing retrained;
# - how scores, allocations and budgets are set against each other, at matched cost;
# - how to keep a pruned network, and how to fine-tune it.
#
# It runs in about half a minute on one CPU core, on the handwritten digits that scikit-learn ships.

# %%
# %matplotlib inline
import logging
import tempfile
import warnings
from pathlib import Path

import lightning.pytorch as L
import torch

from chanaxes_pl import PruneModule, load_slim, prune
from chanaxes_pl.analysis.damage import score_damage_correlation
from chanaxes_pl.analysis.text import describe_lesions, describe_pruning
from chanaxes_pl.data import DigitsDataModule
from chanaxes_pl.models import Classifier
from chanaxes_pl.plots import plot_lesions, plot_pruning

warnings.filterwarnings("ignore", module="lightning")  # hints about workers and loggers
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
torch.set_num_threads(1)
folder = Path(tempfile.mkdtemp())

# %% [markdown]
# ## A trained network
#
# A narrow ResNet-18 that reads most digits right after four epochs.

# %%
L.seed_everything(0, verbose=False)
model = Classifier("resnet18", num_classes=10, width=0.125, image_size=16, schedule="one_cycle", channels_last=True)
data = DigitsDataModule(image_size=16, batch_size=64)
quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
trainer = L.Trainer(max_epochs=4, accelerator="cpu", default_root_dir=folder, **quiet)
trainer.fit(model, data)
trainer.test(model, data, verbose=False)

# %% [markdown]
# ## Lesions: what is a channel worth?
#
# Damage is the change of the mean cross-entropy on test images, in nats. `zero` removes the channel's *unit* (all
# channels that residual sums and depthwise layers tie to it), `mean` sets its output to its mean, and `peer` replaces
# it by the best linear combination of the other channels of its layer, which is what peer R² measures.

# %%
lesions = PruneModule(model, "lesion", operations=("zero", "mean", "peer"), channels=3, scores=("l1",), out=folder)
trainer.test(lesions, data, verbose=False)
print(describe_lesions(lesions.table))

# %%
local = ["input_capture", "peer_r2", "task_information"]
plot_lesions(lesions.table, score_damage_correlation(lesions.table, local, resamples=200))

# %% [markdown]
# ## Half the network, in one call
#
# `prune` takes the network, unlabelled training images, and a budget: the share of multiply–accumulates that may
# stay. Channels go by L1 norm unless told otherwise. What stays is then refitted, layer by layer, to what the dense
# network did on those images (`compensate=True`); no label is looked at and nothing is trained.

# %%
slim = prune(model, data.probe_dataloader(), budget=0.5)
bare = prune(model, data.probe_dataloader(), budget=0.5, compensate=False)
print(f"{slim.dense_macs:,} multiply–accumulates an image became {slim.macs:,} ({slim.macs / slim.dense_macs:.1%})")
for name, network in {"not compensated": bare, "refitted": slim}.items():
    (result,) = trainer.test(PruneModule(network), data, verbose=False)
    print(f"{name:16}", {key: round(value, 3) for key, value in result.items()})

# %% [markdown]
# A pruned network is kept in one file: its tensors, with the plan as JSON in the metadata. No pickle is involved.

# %%
slim.save(folder / "half")
again = load_slim(folder / "half")
images = next(iter(data.probe_dataloader()))[0]
print(sorted(path.name for path in folder.glob("half*")))
print("same logits:", torch.equal(again.eval()(images), slim.model.eval()(images)))

# %% [markdown]
# ## The grid: scores at matched cost
#
# `PruneModule(model)` prunes by every score, under every allocation, to every budget, and evaluates each result on
# the test images. Scores are compared under `uniform` (every layer loses the same share) or `shared` (all scores get
# the widths that one reference would choose), so that only the ranking of channels differs.

# %%
grid = PruneModule(
    model,
    budgets=(0.8, 0.6, 0.4, 0.2),
    scores=("input_capture", "task_information", "l1", "random"),
    allocations=("uniform",),
    compensate=(False, "refit"),
    probe_size=300,
    out=folder,
)
trainer.test(grid, data, verbose=False)
print(describe_pruning(grid.table))

# %%
plot_pruning(grid.table)

# %% [markdown]
# ## Fine-tuning
#
# `trainer.fit(PruneModule(slim), …)` trains what is left with one fixed recipe; its checkpoints hold the plan too.

# %%
tuned = PruneModule(slim)
L.Trainer(max_epochs=1, accelerator="cpu", default_root_dir=folder, **quiet).fit(tuned, data)
trainer.test(tuned, data, verbose=False)

# %% [markdown]
# On CIFAR-100, what these comparisons come to is in RESULTS.md, with the commands that repeat it: `chanaxes lesion`,
# `chanaxes prune` and `chanaxes report --text true`.
