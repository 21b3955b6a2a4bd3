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
# # Segmentation and regression
#
# At the end you will know
#
# - that `AxisTracker()` needs no setting for tasks other than classification, and how it chooses the task variable;
# - what the two axes mean for a network that segments, and for one that predicts a number.
#
# Both networks learn from crops of photographs, which scikit-image and scikit-learn ship. The notebook takes about a
# minute on one CPU core.

# %%
# %matplotlib inline
import logging
import tempfile
import warnings

import lightning.pytorch as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from chanaxes_pl import AxisTracker
from chanaxes_pl.analysis.correlations import main_correlation
from chanaxes_pl.data import PhotosDataModule
from chanaxes_pl.plots import plot_correlations

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", module="lightning")

# %% [markdown]
# ## The data
#
# The label of a pixel is 1 where the brightness changes strongly, which a fixed filter decides; the label of an image
# is the share of such pixels in it.


# %%
def edges(images: Tensor) -> Tensor:
    """[B, H, W]: 1 where the gradient of the brightness is steep, 255 (not labelled) at the border."""
    sobel = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]])
    gradient = F.conv2d(images.mean(1, keepdim=True), torch.stack([sobel, sobel.T])[:, None], padding=1)
    labels = (gradient.norm(dim=1) > 0.4).long()
    labels[:, [0, -1]] = labels[:, :, [0, -1]] = 255
    return labels


def crops(split: str) -> Tensor:
    return photos.read(split).images.float() / 255


photos = PhotosDataModule(crops=100, test_crops=40)
train, test = crops("train"), crops("test")
share = (edges(test) == 1).float().mean()
print(f"{len(train)} training crops, {len(test)} test crops; {share:.0%} of the pixels are edges")

# %% [markdown]
# ## Segmentation
#
# A small U-Net gives one logit a pixel. Labels of 0 and 1 with one logit each make the **mean signed logit** the task
# variable T of an image: how sure the network is of the right answer, averaged over the labelled pixels. A channel's
# task information then says how well its mean over the image tells in which images the network is right, and input
# capture, as always, how much of its input it captures.


# %%
def block(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU())


class UNet(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2, self.bottom = block(3, 16), block(16, 32), block(32, 64)
        self.up2, self.up1, self.head = block(64 + 32, 32), block(32 + 16, 16), nn.Conv2d(16, 1, 1)

    def forward(self, images: Tensor) -> Tensor:
        first = self.down1(images)
        second = self.down2(F.max_pool2d(first, 2))
        third = F.interpolate(self.bottom(F.max_pool2d(second, 2)), scale_factor=2)
        second = F.interpolate(self.up2(torch.cat([third, second], 1)), scale_factor=2)
        return self.head(self.up1(torch.cat([second, first], 1)))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        labelled = labels != 255
        return F.binary_cross_entropy_with_logits(self(images)[:, 0][labelled], labels[labelled].float())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.002)


def fit(model: L.LightningModule, labels: tuple[Tensor, Tensor]) -> AxisTracker:
    tracker = AxisTracker(schedule="log", probe=TensorDataset(test, labels[1]))
    trainer = L.Trainer(
        max_epochs=6,
        accelerator="cpu",
        callbacks=[tracker],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tempfile.mkdtemp(),
    )
    trainer.fit(model, DataLoader(TensorDataset(train, labels[0]), 64, shuffle=True))
    return tracker


L.seed_everything(0, verbose=False)
unet = UNet()
tracker = fit(unet, (edges(train), edges(test)))
with torch.no_grad():
    labels = edges(test)
    right = ((unet.eval()(test)[:, 0] > 0).long() == labels)[labels != 255].float().mean()
print(f"task variable: {tracker.table['target'].iloc[0]}; {right:.1%} of the test pixels are right")
main_correlation(tracker.correlations)[["step", "rho", "null"]].round(2)

# %%
plot_correlations(tracker.correlations, title="U-Net, edges of photographs")

# %% [markdown]
# ## Regression
#
# The same crops, and one number for each: the share of edges in it. One output with real labels makes the **label
# itself** the task variable, so task information says how much of the label a channel's mean predicts linearly.


# %%
class Regressor(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        maps = [block(3, 16), nn.MaxPool2d(2), block(16, 32), nn.MaxPool2d(2), block(32, 64), nn.AdaptiveAvgPool2d(1)]
        self.net = nn.Sequential(*maps, nn.Flatten(), nn.Linear(64, 1))

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return F.mse_loss(self(batch[0])[:, 0], batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.002)


def amount(images: Tensor) -> Tensor:
    return (edges(images) == 1).float().mean((1, 2))


L.seed_everything(0, verbose=False)
regressor = Regressor()
tracker = fit(regressor, (amount(train), amount(test)))
with torch.no_grad():
    wanted = amount(test)
    error = (regressor.eval()(test)[:, 0] - wanted).square().mean() / wanted.var()
print(f"task variable: {tracker.table['target'].iloc[0]}; {1 - error:.1%} of the variance explained on test crops")
main_correlation(tracker.correlations)[["step", "rho", "null"]].round(2)

# %%
plot_correlations(tracker.correlations, title="Regression on the share of edges")
