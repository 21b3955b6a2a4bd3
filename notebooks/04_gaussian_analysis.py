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
# # Gaussian linear analysis
#
# At the end you will know
#
# - in which directions a channel's weights have to move to capture more of their input, and to know more of the task;
# - how to measure the angle between these directions for every channel of a network, and what to make of it;
# - when simulated channels start with both information terms coupled, and what parts them.
#
# Everything here runs in about half a minute on one CPU core.

# %%
# %matplotlib inline
import logging
import warnings

import lightning.pytorch as L
import numpy as np
import pandas as pd
import torch

from chanaxes_pl import compute_axes
from chanaxes_pl.core.gradients import alignment, capture_gradient, residual, task_gradient
from chanaxes_pl.core.statistics import mean_over_runs
from chanaxes_pl.data import DigitsDataModule
from chanaxes_pl.models import Classifier
from chanaxes_pl.plots import plot_alignment, plot_simulation
from chanaxes_pl.simulation import FLOWS, Problem, half_times, initial_coupling, simulate

warnings.filterwarnings("ignore", module="lightning")  # hints about workers and loggers
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
torch.set_num_threads(1)

# %% [markdown]
# ## Two gradients
#
# A channel is linear in its input patch, $y = w^\top x$. With $x \sim N(0, \Sigma)$, a task variable $T$ of variance
# $\sigma_T^2$, $c = \mathrm{Cov}(x, T)$, $D = w^\top \Sigma w$ the variance of $y$ and $b = w^\top c$ its covariance
# with $T$,
#
# $$I_X = \tfrac12 \ln(1 + D/\sigma_0^2) \qquad \nabla I_X = \frac{\Sigma w}{\sigma_0^2 + D}$$
#
# $$I_T = -\tfrac12 \ln\Bigl(1 - \frac{b^2}{D \sigma_T^2}\Bigr) \qquad
# \nabla I_T = \frac{b}{\sigma_T^2 D - b^2}\, g, \qquad g = c - \frac{b}{D}\, \Sigma w$$
#
# So input capture grows along $\Sigma w$, task information along the *residual* $g$: what is left of $c$ once its part
# along $\Sigma w$ is taken out. Here are three channels of four inputs: the largest difference between the
# formulas and automatic differentiation.

# %%
torch.manual_seed(0)
mixing = torch.randn(4, 4, dtype=torch.float64)
covariance, cross, variance = mixing @ mixing.T, torch.tensor([1.0, 0.5, 0.0, -0.5], dtype=torch.float64), 20.0
weights = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
power, shared = torch.einsum("ci,ij,cj->c", weights, covariance, weights), weights @ cross
known = -torch.log(1 - shared.square() / (power * variance)) / 2
captured = torch.log(1 + power / 1.0) / 2

by_autograd = [torch.autograd.grad(values.sum(), weights, retain_graph=True)[0] for values in (captured, known)]
weights = weights.detach()
in_closed_form = [capture_gradient(weights, covariance, 1.0), task_gradient(weights, covariance, cross, variance)]
print([f"{float((one - other).abs().max()):.0e}" for one, other in zip(by_autograd, in_closed_form, strict=True)])

# %% [markdown]
# In the inner product of $\Sigma^{-1}$ the two directions are always orthogonal, $\Sigma w \cdot \Sigma^{-1} g =
# w^\top g = 0$. Gradient descent measures lengths in the Euclidean metric, and there nothing makes them so: the cosine
# says how far a step that serves one information also changes the other.

# %%
g, sigma_w = residual(weights, covariance, cross), weights @ covariance
print("wᵀg:        ", (weights * g).sum(1).abs().max().item() < 1e-12)
print(
    "cos(Σw, g): ",
    alignment(sigma_w, power.detach(), cross.expand(3, 4), shared.detach())["alignment"].numpy().round(2),
)

# %% [markdown]
# ## Every channel of a network
#
# Nothing of this needs the weights: $\Sigma w = \mathrm{Cov}(x, y)$ and $b = \mathrm{Cov}(y, T)$ are moments, so that
# `alignment=True` measures the angle in the same pass over the probe images. It is off by default, since it reads every
# input patch. Here before and after three epochs on the digits.

# %%
L.seed_everything(0, verbose=False)
model = Classifier("resnet18", num_classes=10, width=0.125, image_size=16, channels_last=True)
data = DigitsDataModule(image_size=16, batch_size=64)
data.setup("fit")
at_start = compute_axes(model, data.probe_dataloader(), alignment=True).table
trainer = L.Trainer(
    max_epochs=3,
    accelerator="cpu",
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
    enable_model_summary=False,
)
trainer.fit(model, data)
trained = compute_axes(model, data.probe_dataloader(), alignment=True).table
steps = trainer.global_step
ingredients = ["signal_power", "task_covariance", "capture_norm", "task_norm", "residual_norm"]
trained[["layer", "channel", "alignment", *ingredients]].tail().round(4)

# %% [markdown]
# The angle comes with what it is made of: `signal_power` is $D$, `task_covariance` $b$, and the norms are those of
# $\Sigma w$, $c$ and $g$. From them follows what else there is to know about the three vectors, and they have to agree:
# $c = g + (b/D)\, \Sigma w$, so that $\|c\|^2 = \|g\|^2 + 2 (b/D) \cos(\Sigma w, g)\, \|\Sigma w\| \|g\| + (b/D)^2
# \|\Sigma w\|^2$ in every channel.

# %%
slope = trained["task_covariance"] / trained["signal_power"]
product = trained["alignment"] * trained["capture_norm"] * trained["residual_norm"]
squared = trained["residual_norm"] ** 2 + 2 * slope * product + (slope * trained["capture_norm"]) ** 2
print(f"largest relative difference: {(squared / trained['task_norm'] ** 2 - 1).abs().max():.0e}")

# %% [markdown]
# Below, a box holds the quartiles of a layer's channels and the diamond is their mean. `published=True` would shade
# what the paper found in hidden layers of a ResNet-18 trained on CIFAR-100; this is another network and another task.

# %%
both = pd.concat([at_start.assign(epoch=0.0, step=0), trained.assign(epoch=3.0, step=steps)])
plot_alignment(both, title="ResNet-18 at an eighth of its width, digits")

# %%
both["angle"] = both["alignment"].abs()
both.groupby("epoch")["angle"].describe()[["mean", "25%", "50%", "75%"]].round(2)

# %% [markdown]
# Three epochs turn the two directions further apart: the mean falls by about a third, most of all in the last layers,
# while the first layers keep the largest values.
#
# ## When are both information terms coupled at the start?
#
# A simulation leaves out everything but the two formulas: many channels from random weights, an input whose covariance
# has a given spectrum, here eigenvalues $\propto 1/k$, and a task covariance $c$ of which a given *share* (of
# $\|c\|^2$) lies along the leading eigenvector. A random channel varies most where it happens to look along the leading
# eigenvectors. If that is where the task is, it also knows more of it. Means over five seeds:

# %%
problem = Problem(spectrum=1.0, inputs=32, leading=1, share=0.9, channels=128, seeds=5)
start = initial_coupling(problem)
start.groupby("share")[["rho", "alignment"]].mean().T.round(2)

# %% [markdown]
# Coupling at initialisation says how the task lies in the input, then, and nothing of what the network has learned. It
# needs a good part of $c$ in the leading eigenvector; with $c$ among the others, ρ is even a little below 0, since $D$
# stands in the denominator of $b^2/D$.
#
# ## What parts them?
#
# From the same start, each channel ascends input capture, task information, or the mean of both. Weights stay on the
# unit sphere, as under a normalisation layer: input capture would grow without bound, while task information does not
# depend on the norm. Time is learning rate × steps of plain gradient ascent.

# %%
flows = pd.concat([simulate(problem, flow, records=40) for flow in FLOWS])
plot_simulation(start, flows)

# %%
halved = half_times(flows).groupby("flow", sort=False)["time"].median().rename("half of ρ lost at")
columns = ["rho", "alignment", "input_capture", "capture_spread", "task_information", "task_spread", "on_leading"]
at_end = flows[flows["time"] == flows["time"].max()].groupby("flow", sort=False)[columns].mean()
at_end.join(halved).replace(np.inf, np.nan).round(3)

# %% [markdown]
# - **Task information** follows $g$, and the coupling is gone first, at a time of about 1. But it does not stop at 0: ρ
#   falls on to nearly −1. All channels are on their way to the same optimum $w \propto \Sigma^{-1} c$, where little
#   variance is; who is further on knows more and captures less. A trained network, whose channels do not all want the
#   same, stays near 0 instead.
# - **Input capture** strengthens the coupling at first: what a channel gains of the leading eigenvector serves both. In
#   the end all channels collapse on that eigenvector (`on_leading`, and `capture_spread` near 0), and ρ fades because
#   there is hardly a difference left to rank.
# - **The mean of both** ends near the leading eigenvector too. Where the mean no longer grows, more of one is less
#   of the other, and ρ goes to −1.
#
# The angle falls in all three. Under input capture it ends at 0 for a reason of its own: at an eigenvector, $\Sigma w$
# is parallel to $w$, and $w^\top g = 0$.
#
# ## When nothing parts them
#
# A negative control: with all of $c$ in the leading eigenvector, to capture is to know. Then no flow takes the coupling
# away for good, so that its loss tells of a task that also lies where the input varies little.

# %%
together = Problem(share=1.0, seeds=5)
controls = pd.concat([simulate(together, flow, records=20) for flow in FLOWS])
ends = controls[controls["time"].isin([0.0, controls["time"].max()])]
ends.pivot_table(index="flow", columns="time", values="rho", sort=False).round(2)

# %% [markdown]
# `chanaxes simulate` prints and draws the same for any spectrum, share and mixture (`--help` lists its flags).
#
# ## At the size of CIFAR-100
#
# A run tracked with `AxisTracker(alignment=True)`, as in `configs/cifar100/resnet18_quarter.yaml`, keeps the angle of
# every channel at every checkpoint: `plot_alignment(read_run(folder), published=True)` draws its first and last, and
# `chanaxes report` writes the means by layer. These are of ResNet-18 at a quarter of its width, three seeds, 62 % test
# accuracy, before and after 14 epochs (how to make them: `02_read_the_axes`). Published for the same network at full
# width after 200 epochs: 0.05 to 0.18 in hidden layers, about 0.56 in the first.

# %%
angles = mean_over_runs(pd.read_csv("results/alignment.csv"), "angle")
angles.pivot_table(index="layer", columns="epoch", values=["mean", "std"], sort=False).round(2)
