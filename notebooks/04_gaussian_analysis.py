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
# - in which direction the weights of a channel must move to capture more of the input, and in which to know more about
#   the task;
# - how to measure the angle between these directions for every channel of a network, and how to read it;
# - when simulated channels start with both information terms coupled, and what uncouples them.
#
# The notebook takes about half a minute on one CPU core.

# %%
# %matplotlib inline
import logging
import warnings

import lightning.pytorch as L
import numpy as np
import pandas as pd
import torch

from chanaxes_pl import compute_axes, simulate
from chanaxes_pl.core.gradients import alignment, capture_gradient, residual, task_gradient
from chanaxes_pl.core.statistics import mean_over_runs
from chanaxes_pl.data import DigitsDataModule
from chanaxes_pl.models import Classifier
from chanaxes_pl.plots import plot_alignment, plot_simulation
from chanaxes_pl.simulation import FLOWS, Problem, half_times, initial_coupling

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
# Input capture grows along $\Sigma w$. Task information grows along $\pm g$, with the sign of $b$, where the *residual*
# $g$ is $c$ without its part along $\Sigma w$. The next cell prints the largest difference between these formulas and
# automatic differentiation, for three channels of four inputs.

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
# w^\top g = 0$. Gradient descent uses the Euclidean metric, in which they need not be orthogonal. The cosine then says
# how far a step that increases one information term also changes the other.

# %%
g, sigma_w = residual(weights, covariance, cross), weights @ covariance
print("wᵀg:        ", (weights * g).sum(1).abs().max().item() < 1e-12)
print(
    "alignment:  ",
    alignment(sigma_w, power.detach(), cross.expand(3, 4), shared.detach())["alignment"].numpy().round(2),
)

# %% [markdown]
# ## Every channel of a network
#
# The measurement does not need the weights, because $\Sigma w = \mathrm{Cov}(x, y)$ and $b = \mathrm{Cov}(y, T)$ are
# moments. `alignment=True` measures the angle in the same pass over the probe images. It is off by default, because it
# reads every input patch. The next cell measures a network before and after three epochs on the digits.

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
# The table also holds the ingredients of the angle: `signal_power` is $D$, `task_covariance` is $b$, and the norms are
# those of $\Sigma w$, $c$ and $g$. The cosine of the gradients, `alignment`, is $a = \mathrm{sign}(b) \cos(\Sigma w,
# g)$. All of these must agree in every channel: $c = g + (b/D)\, \Sigma w$, so that $\|c\|^2 = \|g\|^2 + 2 (|b|/D)\,
# a\, \|\Sigma w\| \|g\| + (b/D)^2 \|\Sigma w\|^2$.

# %%
slope = trained["task_covariance"] / trained["signal_power"]
product = trained["alignment"] * trained["capture_norm"] * trained["residual_norm"]
squared = trained["residual_norm"] ** 2 + 2 * slope.abs() * product + (slope * trained["capture_norm"]) ** 2
print(f"largest relative difference: {(squared / trained['task_norm'] ** 2 - 1).abs().max():.0e}")

# %% [markdown]
# Each box shows the quartiles of the channels of a layer, and the diamond shows their mean. `published=True` would
# shade the range that the paper found in hidden layers of a ResNet-18 trained on CIFAR-100. It is off here, because
# network and task differ.

# %%
both = pd.concat([at_start.assign(epoch=0.0, step=0), trained.assign(epoch=3.0, step=steps)])
plot_alignment(both, title="ResNet-18 at an eighth of its width, digits")

# %%
both["angle"] = both["alignment"].abs()
both.groupby("epoch")["angle"].describe()[["mean", "25%", "50%", "75%"]].round(2)

# %% [markdown]
# In three epochs the two directions turn further apart. The mean falls by about a third. It falls most in the last
# layers, and the first layers keep the largest values.
#
# ## When are both information terms coupled at the start?
#
# The simulation keeps only the two formulas. It has many channels with random weights, an input covariance with a given
# spectrum (here eigenvalues $\propto 1/k$), and a task covariance $c$ of which a given *share* (of $\|c\|^2$) lies
# along the leading eigenvector. A random channel varies most if its weights point along the leading eigenvectors. If
# the task lies there too, this channel also knows more about it. The next cell shows means over five seeds.

# %%
problem = Problem(spectrum=1.0, inputs=32, leading=1, share=0.9, channels=128, seeds=5)
start = initial_coupling(problem)
start.groupby("share")[["rho", "alignment"]].mean().T.round(2)

# %% [markdown]
# Coupling at initialisation therefore shows how the task lies in the input. It does not show anything that the network
# has learned. It needs a large part of $c$ in the leading eigenvector. If $c$ lies among the others, ρ is a little
# below 0, because $D$ is in the denominator of $b^2/D$.
#
# ## What uncouples them?
#
# From the same start, each channel ascends input capture, task information, or the mean of both. Weights stay on the
# unit sphere, as under a normalisation layer; otherwise input capture would grow without bound. Task information does
# not depend on the norm. Time is learning rate × steps of plain gradient ascent.

# %%
flows = pd.concat([simulate(problem, flow, records=40) for flow in FLOWS])
plot_simulation(start, flows)

# %%
halved = half_times(flows).groupby("flow", sort=False)["time"].median().rename("half of ρ lost at")
columns = ["rho", "alignment", "input_capture", "capture_spread", "task_information", "task_spread", "on_leading"]
at_end = flows[flows["time"] == flows["time"].max()].groupby("flow", sort=False)[columns].mean()
at_end.join(halved).replace(np.inf, np.nan).round(3)

# %% [markdown]
# - **Task information.** Channels follow $\pm g$ and lose the coupling first, at a time of about 1. ρ does not stop at
#   0 but falls to nearly −1. All channels move to the same optimum $w \propto \Sigma^{-1} c$, which has little
#   variance. Channels that are closer to it know more and capture less. The channels of a trained network have
#   different optima, and ρ stays near 0.
# - **Input capture.** The coupling grows at first, because the leading eigenvector serves both. In the end all channels
#   collapse on that eigenvector (`on_leading`, and `capture_spread` near 0). ρ then falls because hardly any difference
#   between channels is left to rank.
# - **The mean of both.** Channels also end near the leading eigenvector. Once the mean no longer grows, more of one
#   term means less of the other, and ρ goes to −1.
#
# The angle falls in all three flows. Under input capture it ends at 0 for a different reason: at an eigenvector,
# $\Sigma w$ is parallel to $w$, and $w^\top g = 0$.
#
# ## When they stay coupled
#
# The last simulation is a negative control. With all of $c$ in the leading eigenvector, a channel that captures more
# also knows more. No flow then removes the coupling for good. Losing the coupling therefore requires a task that also
# lies where the input varies little.

# %%
together = Problem(share=1.0, seeds=5)
controls = pd.concat([simulate(together, flow, records=20) for flow in FLOWS])
ends = controls[controls["time"].isin([0.0, controls["time"].max()])]
ends.pivot_table(index="flow", columns="time", values="rho", sort=False).round(2)

# %% [markdown]
# `chanaxes simulate` prints and draws these simulations for any spectrum, share and mixture (`--help` lists its flags).
#
# ## At the size of CIFAR-100
#
# A run tracked with `AxisTracker(alignment=True)`, as in `configs/cifar100/resnet18_quarter.yaml`, keeps the angle of
# every channel at every measurement. `plot_alignment(read_run(folder), published=True)` draws the first and the last
# one, and `chanaxes report` writes the means by layer. The next table shows |cos| for ResNet-18 at a quarter of its
# width, three seeds, 62 % test accuracy, before and after 14 epochs (`02_read_the_axes` has the commands). The paper
# reports 0.05 to 0.18 in hidden layers and about 0.56 in the first layer, for the same network at full width after 200
# epochs.

# %%
angles = mean_over_runs(pd.read_csv("results/alignment.csv"), "angle")
angles.pivot_table(index="layer", columns="epoch", values=["mean", "std"], sort=False).round(2)
