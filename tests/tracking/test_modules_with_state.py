"""Modules that keep more than parameters and buffers train as without a tracker; networks that change are followed."""

import random

import lightning.pytorch as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import BackboneFinetuning, ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, random_split
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from chanaxes_pl import AxisTracker, compute_axes
from chanaxes_pl.network import hooks
from tests.helpers.training import CLASSES, QUIET, STEPS, Small, build, images, loaders, trainer

pytestmark = [
    *(pytest.mark.filterwarnings(text) for text in QUIET),
    pytest.mark.filterwarnings("ignore:A new version of the following files"),
]


class OwnGenerator(Small):
    """Noise from a generator of the module's own, as of masks."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(1)

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images * torch.rand(images.shape, generator=self.generator))


class OwnNumPy(Small):
    def __init__(self) -> None:
        super().__init__()
        self.streams = {"new": np.random.default_rng(0), "old": np.random.RandomState(0), "python": random.Random(0)}

    def forward(self, images: Tensor) -> Tensor:
        drawn = self.streams["new"].normal() + self.streams["old"].normal() + self.streams["python"].random()
        return super().forward(images + float(drawn))


class Counts(Small):
    """A number, and a tensor that is no buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.total = 0, torch.zeros(())

    def forward(self, images: Tensor) -> Tensor:
        self.calls += 1
        self.total += 1
        return super().forward(images) * (1 + 0.01 * self.calls + 0.01 * float(self.total))


class Remembers(Small):
    """A list of the last outputs, a hidden state, a buffer of the first batch, and what it first makes when it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.last, self.hidden = [], None
        self.register_buffer("centre", None)

    def forward(self, images: Tensor) -> Tensor:
        given = super().forward(images)
        self.last.append(given.detach().mean(0))
        del self.last[:-4]
        if self.centre is None:
            self.centre, self.scale = given.detach().mean(0), float(given.detach().std())
        hidden = 0.0 if self.hidden is None else self.hidden
        self.hidden = given.detach().mean(0) + 0.5 * hidden
        return (given + hidden - self.centre - torch.stack(self.last).mean(0)) / self.scale


class Moves(Small):
    """Parameters that change in forward: averages of others, and weights of bounded norm."""

    def __init__(self) -> None:
        super().__init__()
        self.average = nn.Parameter(self.net[9].weight.detach().clone(), requires_grad=False)

    def forward(self, images: Tensor) -> Tensor:
        self.average.mul_(0.9).add_(self.net[9].weight.detach(), alpha=0.1)
        self.net[0].weight.data = torch.renorm(self.net[0].weight.data, 2, 0, 0.5)
        return super().forward(images) + 0.1 * self.average.sum()


class Merges(Small):
    """A low-rank addition that is part of the weight in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Parameter(torch.randn(CLASSES, 2)), nn.Parameter(torch.randn(2, 8))
        self.merged = False

    def train(self, mode: bool = True) -> "Merges":
        super().train(mode)
        if hasattr(self, "merged") and self.merged == mode:
            self.net[9].weight.data += (-1 if mode else 1) * (self.left @ self.right).detach()
            self.merged = not mode
        return self

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images) + (0 if self.merged else (self.left @ self.right).sum() * images.mean())


class Expanded(Small):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.5]).expand(3).view(1, 3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images - self.mean)


def trained(root, kind: type[Small], *callbacks: L.Callback, **settings) -> list:
    L.seed_everything(3, verbose=False)
    model = kind()
    fitter = trainer(root, *callbacks, **settings)
    fitter.fit(model, **loaders(shuffle=True))
    return [*(value.tolist() for value in model.state_dict().values()), model.losses, torch.rand(1).item()]


KINDS = [OwnGenerator, OwnNumPy, Counts, Remembers, Moves, Merges, Expanded]


@pytest.mark.parametrize("kind", KINDS)
def test_a_module_that_keeps_something_trains_as_without_a_tracker(tmp_path, kind):
    assert trained(tmp_path / "bare", kind) == trained(tmp_path / "tracked", kind, AxisTracker(schedule="1 steps"))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind is not Expanded])
def test_those_modules_are_found_out_where_nothing_is_put_back(tmp_path, kind, monkeypatch):
    monkeypatch.setattr(hooks, "_attributes", lambda _module: lambda: None)
    monkeypatch.setattr(hooks, "_parameters", lambda _model: [])
    monkeypatch.setattr(hooks, "_empty_buffers", lambda _module: lambda: None)
    assert trained(tmp_path / "bare", kind) != trained(tmp_path / "tracked", kind, AxisTracker(schedule="1 steps"))


class Scores(Small):
    """Metrics of torchmetrics, updated in a step that is the tracker's too, and in forward."""

    def __init__(self) -> None:
        super().__init__()
        self.accuracy, self.norm = MulticlassAccuracy(CLASSES), MeanMetric()

    def forward(self, images: Tensor) -> Tensor:
        given = super().forward(images)
        self.norm.update(given.detach().norm())
        return given

    def shared(self, batch: list[Tensor]) -> tuple[Tensor, Tensor]:
        logits = self(batch[0])
        self.accuracy.update(logits, batch[1])
        return logits, batch[1]

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(*self.shared(batch))


def test_the_users_metrics_do_not_count_probe_images(tmp_path):
    def metrics(name: str, *callbacks: L.Callback) -> list[float]:
        L.seed_everything(3, verbose=False)
        model = Scores()
        trainer(tmp_path / name, *callbacks).fit(model, loaders()["train_dataloaders"])
        return [float(model.accuracy.compute()), float(model.norm.compute())]

    tracker = AxisTracker(images(), schedule="1 steps", step=lambda module, batch: module.shared(batch))
    assert metrics("bare") == metrics("tracked", tracker)


class Splits(L.LightningDataModule):
    """Draws its validation set anew whenever it is asked for it."""

    def train_dataloader(self) -> DataLoader:
        return loaders(shuffle=True)["train_dataloaders"]

    def val_dataloader(self) -> DataLoader:
        return DataLoader(random_split(images(), [30, 10])[0], 8)


@pytest.mark.parametrize("every", [1, 2, 5])
def test_validation_images_that_are_drawn_draw_none_of_the_trainings(tmp_path, every):
    def weights(name: str, *callbacks: L.Callback) -> list:
        L.seed_everything(3, verbose=False)
        model = Small()
        trainer(tmp_path / name, *callbacks, max_epochs=4, check_val_every_n_epoch=every).fit(
            model, datamodule=Splits()
        )
        return [model.losses, model.net[9].weight.tolist(), torch.rand(1).item()]

    assert weights("bare") == weights("tracked", AxisTracker())


class Lazy(Small):
    def __init__(self) -> None:
        super().__init__()
        self.net[9] = nn.LazyLinear(CLASSES)


def test_parameters_without_a_size_are_refused_before_training(tmp_path):
    with pytest.raises(ValueError, match=r"AxisTracker: the parameter 'net.9.weight' of Lazy has no size .* run one"):
        trainer(tmp_path, AxisTracker()).fit(Lazy(), **loaders())
    tracker = AxisTracker()
    trainer(tmp_path, tracker, num_sanity_val_steps=1).fit(Lazy(), **loaders())
    assert len(tracker.correlations)


class Thaws(Small):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = self.net[:4]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW((p for p in self.parameters() if p.requires_grad), lr=0.01)


def test_layers_chosen_by_what_changes_stay_those_of_the_beginning(tmp_path):
    tracker = AxisTracker(layers=lambda _name, layer: layer.weight.requires_grad)
    thaw = BackboneFinetuning(unfreeze_backbone_at_epoch=1, train_bn=False)
    trainer(tmp_path, tracker, thaw, max_epochs=3).fit(Thaws(), **loaders())
    assert tracker.table["layer"].unique().tolist() == ["net.4", "net.9"]
    assert tracker._history.last_step == 3 * STEPS


class Grows(Small):
    def on_train_epoch_start(self) -> None:
        if self.current_epoch == 1:
            self.net[4], self.net[5], self.net[9] = nn.Conv2d(6, 12, 3), nn.BatchNorm2d(12), nn.Linear(12, CLASSES)


def test_a_network_that_grows_is_followed_with_a_warning(tmp_path):
    tracker = AxisTracker()
    with pytest.warns(UserWarning, match=r"other channels than at the last measurement, in net.4: correlations"):
        trainer(tmp_path, tracker, max_epochs=3).fit(Grows(), **loaders())
    assert tracker.table.groupby("layer").size().to_dict() == {"net.0": 6, "net.4": 12}
    assert len(tracker._history.checkpoints) == 4


class Renames(Small):
    def on_train_epoch_start(self) -> None:
        if self.current_epoch == 1:
            self.other, self.net = self.net, None

    def forward(self, images: Tensor) -> Tensor:
        return (self.other if self.net is None else self.net)(images)


def test_a_network_of_other_names_is_followed_too(tmp_path):
    tracker = AxisTracker()
    with pytest.warns(UserWarning, match="other channels than at the last measurement, in "):
        trainer(tmp_path, tracker, max_epochs=3).fit(Renames(), **loaders())
    assert tracker.table["layer"].unique().tolist() == ["other.0", "other.4"]


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
def test_what_did_not_change_is_not_written_to():
    """NaN is not equal to itself, expanded and nested tensors cannot be written to, and backward sees what is."""

    class Keeps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 2)
            self.nan = torch.tensor([torch.nan, 1.0])
            self.wide = torch.tensor([torch.nan]).expand(3)
            self.nested = torch.nested.as_nested_tensor([torch.ones(2), torch.ones(3)])

    module = Keeps()
    module.hidden = module.layer(module.nan)
    versions = [tensor._version for tensor in (module.nan, module.hidden, module.layer.weight)]
    with hooks.preserved(module):
        pass
    assert [tensor._version for tensor in (module.nan, module.hidden, module.layer.weight)] == versions
    module.hidden.sum().backward()


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
def test_resumed_in_the_middle_of_an_epoch_the_first_row_says_so(tmp_path):
    save = ModelCheckpoint(tmp_path, every_n_train_steps=2, save_top_k=-1)
    trainer(tmp_path, save, max_epochs=1).fit(build(), **loaders())
    tracker = AxisTracker()
    path = tmp_path / "epoch=0-step=2.ckpt"
    trainer(tmp_path, tracker).fit(build(), **loaders(), ckpt_path=path, weights_only=True)
    first = tracker._history.checkpoints[0]
    assert first[1] == 2
    assert 0 < first[0] < 1


def test_layers_that_all_fail_are_told_with_the_reason():
    class Frames(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 6, 3), nn.Linear(6, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            frames = torch.stack([x, x.flip(3), x.flip(2)], 1)
            return self.head(self.conv(frames.flatten(0, 1)).mean((2, 3)).view(len(x), 3, 6).mean(1))

    with pytest.warns(UserWarning, match=r"none of the 1 tracked layers could be measured.*'conv': it gave an output"):
        table = compute_axes(Frames(), images()).table
    assert table["input_capture"].isna().all()


def test_labels_that_are_missing_are_told():
    x, labels = images().tensors[0], images().tensors[0].mean((1, 2, 3))
    labels[3] = torch.nan
    network = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 1))
    with pytest.warns(UserWarning, match=r"the task variable \(label\) is not finite for some images.*leave those"):
        table = compute_axes(network, torch.utils.data.TensorDataset(x, labels)).table
    assert table["task_information"].isna().all()
    assert table["input_capture"].notna().all()
