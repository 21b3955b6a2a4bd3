"""``PruneModule``: experiments under ``trainer.test``, fine-tuning under ``trainer.fit``, and checkpoints."""

from __future__ import annotations

import copy
import os
import random
import zipfile
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pandas as pd
import pytest
import torch
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, SubsetRandomSampler, TensorDataset, default_collate

from chanaxes_pl import LesionExperiment, PruningExperiment
from chanaxes_pl.lesions.damage_table import lesion_table
from chanaxes_pl.models import Classifier, ImageClassifier, build_backbone
from chanaxes_pl.models.checkpoints import load_classifier, load_weights, read_checkpoint
from chanaxes_pl.network.batches import Placement
from chanaxes_pl.prune_module import PruneModule, _evaluation
from chanaxes_pl.pruning.grid import evaluate, pruning_grid
from chanaxes_pl.pruning.pruner import prune
from chanaxes_pl.pruning.slim_file import Plan, load_slim
from chanaxes_pl.run_folder import RunFolder
from tests.helpers.training import QUIET, RecordingLogger, build, images, trainer

pytestmark = [
    *(pytest.mark.filterwarnings(line) for line in QUIET),
    pytest.mark.filterwarnings("ignore:Using `DistributedSampler` with the dataloaders"),
    # Said where one process of several fine-tunes a network by itself, as it should.
    pytest.mark.filterwarnings("ignore:It is recommended to use `self.log"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
]

GRID = {"budgets": (0.6,), "scores": ("l1", "taylor", "random"), "allocations": ("uniform",)}
VALUES = ["loss", "accuracy", "margin"]


class Data(L.LightningDataModule):
    """Overrides ``prepare_data``, for which Lightning makes all processes meet."""

    def prepare_data(self) -> None:
        """Nothing to fetch."""

    def train_dataloader(self) -> DataLoader:
        return DataLoader(images(32, 1), batch_size=8, shuffle=True)

    def test_dataloader(self) -> DataLoader:
        return DataLoader(images(28, 3), batch_size=8)

    def probe_dataloader(self) -> DataLoader:
        return DataLoader(images(32, 1), batch_size=16)


def network() -> nn.Module:
    return build(dropout=0.0).net.eval()


def made(experiment: str, **options) -> PruningExperiment | LesionExperiment:
    if experiment == "prune":
        return PruningExperiment(**GRID | {"compensate": (False,)} | options)
    return LesionExperiment(**{"operations": ("zero", "mean")} | options)


def ran(root: Path, experiment: str = "prune", settings: dict | None = None, out=None, **options) -> PruneModule:
    module = PruneModule(network(), made(experiment, **options), out=out)
    trainer(root, **settings or {}).test(module, datamodule=Data(), verbose=False)
    return module


def same(batch):
    return batch


def test_pruning_is_the_grids_table_on_disk(tmp_path):
    module = ran(tmp_path, compensate=(False, "fold"))
    data = Data()
    wanted = pruning_grid(
        network(),
        data.probe_dataloader(),
        data.test_dataloader(),
        made("prune", compensate=(False, "fold")),
        progress=False,
    )
    pd.testing.assert_frame_equal(module.table, wanted, check_exact=True)
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "pruning.parquet"), wanted, check_exact=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pruning.parquet", "pruning.png"]


def test_lesions_are_the_tables_of_lesions_and_axes(tmp_path):
    module = ran(tmp_path, "lesion", channels=5)
    data = Data()
    wanted = lesion_table(
        network(),
        data.probe_dataloader(),
        data.test_dataloader(),
        made("lesion", channels=5),
        progress=False,
    )
    pd.testing.assert_frame_equal(module.table[list(wanted)], wanted, check_exact=True)
    assert module.table.attrs["baseline"] == wanted.attrs["baseline"]
    assert pd.read_parquet(tmp_path / "lesions.parquet").attrs["baseline"]["images"] == 28
    assert {"input_capture", "peer_r2", "task_information"} <= set(module.table)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lesions.parquet", "lesions.png"]


@pytest.mark.parametrize("channels", [1, 2])
def test_too_few_channels_to_correlate_leave_a_table_and_one_warning(tmp_path, channels):
    with pytest.warns(UserWarning, match=r"lesions.parquet is written, without a figure .*: no layer has 3 ch") as said:
        module = ran(tmp_path, "lesion", channels=channels)
    assert sum("without a figure" in str(warning.message) for warning in said) == 1
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "lesions.parquet"), module.table, check_exact=True)
    assert [path.name for path in tmp_path.iterdir()] == ["lesions.parquet"]


@pytest.mark.parametrize("experiment", ["prune", "lesion"])
def test_the_network_stays_and_its_figures_are_logged(tmp_path, experiment):
    logger = RecordingLogger()
    dense, before = network(), network().state_dict()
    module = PruneModule(dense, made(experiment), out=tmp_path / "out")
    tester = trainer(tmp_path, logger=logger)
    tester.test(module, datamodule=Data(), verbose=False)
    assert all(torch.equal(tensor, before[name]) for name, tensor in dense.state_dict().items())
    assert module.network is dense
    own = evaluate(network(), Data().test_dataloader(), Placement(same))
    assert float(tester.callback_metrics["test/loss"]) == pytest.approx(own["loss"], rel=1e-5)
    assert float(tester.callback_metrics["test/top1"]) == pytest.approx(own["accuracy"])
    assert {key for _, row in logger.rows for key in row} == {"test/loss", "test/top1", "epoch"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_slim_network_is_only_evaluated(tmp_path):
    slim = prune(network(), images(32, 1), budget=0.6)
    module = PruneModule(slim, out=tmp_path / "out")
    (result,) = trainer(tmp_path).test(module, datamodule=Data(), verbose=False)
    wanted = evaluate(slim.model, Data().test_dataloader(), Placement(same))
    assert result["test/top1"] == pytest.approx(wanted["accuracy"])
    assert result["test/loss"] == pytest.approx(wanted["loss"])
    assert not (tmp_path / "out").exists()
    asked = PruneModule(slim, made("prune"), out=tmp_path / "out")
    trainer(tmp_path).test(asked, datamodule=Data(), verbose=False)
    assert (tmp_path / "out" / "pruning.parquet").exists()


def test_fast_dev_run_writes_nothing(tmp_path):
    module = ran(tmp_path, settings={"fast_dev_run": True})
    assert len(module.table) == 4
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("limit", "batches"), [(2, 2), (0.5, 2), (1.0, 4)])
def test_limited_test_batches(tmp_path, limit, batches):
    module = ran(tmp_path, settings={"limit_test_batches": limit})
    first = [batch for _, batch in zip(range(batches), Data().test_dataloader(), strict=False)]
    assert module.table.loc[0, VALUES].to_dict() == evaluate(network(), first, Placement(same))


@pytest.mark.parametrize(
    ("experiment", "options", "limit"),
    [("prune", {"finetune_epochs": 1}, 1.0), ("lesion", {}, 1.0), ("prune", {}, 3)],
)
@pytest.mark.filterwarnings("ignore:.*use of fork\\(\\) may lead to deadlocks")
def test_two_processes_get_the_table_of_one(tmp_path, experiment, options, limit):
    """Also where they train different numbers of networks."""
    tables = []
    for settings in ({}, {"devices": 2, "strategy": "ddp_fork"}):
        torch.manual_seed(0)
        folder = tmp_path / str(len(tables))
        ran(tmp_path, experiment, settings | {"limit_test_batches": limit}, out=folder, **options)
        (file,) = folder.glob("*.parquet")
        tables.append(pd.read_parquet(file))
    pd.testing.assert_frame_equal(*tables, rtol=1e-6)


@pytest.mark.filterwarnings("ignore:.*use of fork\\(\\) may lead to deadlocks")
def test_two_processes_write_into_the_trainers_folder(tmp_path):
    ran(tmp_path, settings={"devices": 2, "strategy": "ddp_fork"})
    assert sorted(path.name for path in tmp_path.rglob("pruning*")) == ["pruning.parquet", "pruning.png"]


def test_finetuned_networks_of_the_grid(tmp_path):
    data = Data()
    before = dict(vars(data))
    module = PruneModule(network(), made("prune", finetune_epochs=2), lr=0.05)
    tester = trainer(tmp_path)
    tester.test(module, datamodule=data, verbose=False)
    assert module.table["tuned_loss"].isna().tolist() == [True, False, False, False]
    assert (module.table["tuned_loss"] != module.table["loss"])[1:].all()
    assert data.trainer is tester
    assert vars(data) == before | {"trainer": tester}


def slim(budget: float = 0.6):
    return prune(network(), images(32, 1), budget=budget)


def test_a_slim_network_is_fine_tuned(tmp_path):
    small = slim()
    before, shapes = copy.deepcopy(small.model), [p.shape for p in small.model.parameters()]
    module = PruneModule(small, lr=0.05)
    trainer(tmp_path, max_epochs=6).fit(module, datamodule=Data())
    assert [p.shape for p in module.network.parameters()] == shapes
    assert any(not torch.equal(a, b) for a, b in zip(module.network.parameters(), before.parameters(), strict=True))
    data = DataLoader(images(32, 1), batch_size=8)
    assert evaluate(module.network, data, Placement(same))["loss"] < evaluate(before, data, Placement(same))["loss"]


@pytest.mark.parametrize("labelled", [True, False])
def test_a_slim_network_learns_from_its_teacher(tmp_path, labelled):
    """Without labels, too; the teacher stays as it is and is in no checkpoint."""
    teacher, small = network().train(), prune(network(), images(32, 1), budget=0.3, compensate=False)
    state, logger = copy.deepcopy(teacher.state_dict()), RecordingLogger()
    module = PruneModule(small, teacher=teacher, lr=0.05)
    assert not any("teacher" in name for name in module.state_dict())
    data: Any = images(32, 1) if labelled else [image for image, _ in images(32, 1)]
    fitter = trainer(tmp_path, max_epochs=8, logger=logger, log_every_n_steps=1)
    fitter.fit(module, train_dataloaders=DataLoader(data, batch_size=8))
    losses = [row["train/loss"] for _, row in logger.of("train/loss")]
    assert losses[-1] < 0.5 * losses[0]
    assert ("train/top1" in fitter.callback_metrics) == labelled
    assert teacher.training
    assert all(torch.equal(value, state[key]) for key, value in teacher.state_dict().items())


def test_two_processes_learn_from_a_teacher_as_one_does(tmp_path):
    """Each takes half of all images at every step, and there is no norm that could look at that."""

    def classifier(channels: int) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(3, channels, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 4)
        )

    teacher, small, data = classifier(12), classifier(6), [image for image, _ in images(8, 1)]
    found = []
    for settings, size in (({}, 8), ({"devices": 2, "strategy": "ddp_fork"}, 4)):
        module = PruneModule(copy.deepcopy(small), teacher=teacher, lr=0.05)
        fitter = trainer(tmp_path, max_epochs=6, **settings)
        fitter.fit(module, train_dataloaders=DataLoader(data, batch_size=size))
        found.append(module.network.state_dict())
    for key, value in found[0].items():
        torch.testing.assert_close(found[1][key], value)
        assert not torch.equal(value, small.state_dict()[key])


def test_a_teacher_of_another_shape_is_refused(tmp_path):
    teacher = build_backbone("resnet18", 9, 0.125)
    with pytest.raises(
        ValueError, match=r"the teacher gives outputs \[8, 9\], the network \[8, 4\]: expected the same"
    ):
        trainer(tmp_path, max_epochs=1).fit(PruneModule(slim(), teacher=teacher), datamodule=Data())


def fitted(root: Path, module: L.LightningModule, epochs: int, ckpt_path: Path | None = None) -> Path:
    """The last checkpoint; the learning rate is that of two epochs throughout."""
    saver = L.callbacks.ModelCheckpoint(root, filename="{epoch}", save_top_k=-1)
    fitter = trainer(root, saver, max_epochs=2, enable_checkpointing=True)
    fitter.fit(module, train_dataloaders=DataLoader(images(32, 1), batch_size=8), ckpt_path=ckpt_path)
    return root / f"epoch={epochs - 1}.ckpt"


@pytest.mark.parametrize("from_dense", [False, True])
def test_resumed_is_as_if_never_interrupted(tmp_path, from_dense):
    whole = PruneModule(slim())
    first = fitted(tmp_path / "a", whole, 1)
    kept = torch.load(first, weights_only=True)["chanaxes_plan"]
    assert Plan.from_json(kept) == whole.plan
    resumed = PruneModule(network() if from_dense else slim())
    fitted(tmp_path / "b", resumed, 2, first)
    assert resumed.plan == whole.plan
    for (name, a), b in zip(resumed.state_dict().items(), whole.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_a_fine_tuned_checkpoint_loads_in_one_call(tmp_path):
    module = PruneModule(slim())
    fitted(tmp_path, module, 1)
    path, data = tmp_path / "epoch=1.ckpt", torch.stack([image for image, _ in images(8, 1)])
    wanted = module.network.eval()(data)
    loaded = load_slim(path, network())
    assert not loaded.training
    assert torch.equal(loaded(data), wanted)
    again = PruneModule.load_from_checkpoint(path, model=network())
    assert again.plan == module.plan
    assert torch.equal(again.network.eval()(data), wanted)
    with pytest.raises(ValueError, match=r"of a pruned network; load it with load_slim\(path, the dense network\)"):
        PruneModule(path)
    with pytest.raises(ValueError, match=r"epoch=1.ckpt: the plan does not say how to build the network"):
        load_slim(path)
    with pytest.raises(ValueError, match=r"epoch=1.ckpt: the plan is for another network than this Linear"):
        load_slim(path, nn.Linear(2, 2))


def test_a_fine_tuned_classifier_is_built_by_its_checkpoint(tmp_path):
    dense = build_backbone("resnet18", 4, 0.125)
    small = prune(dense.eval(), images(32, 1), budget=0.6)
    module = PruneModule(small)
    fitted(tmp_path, module, 1)
    data = torch.stack([image for image, _ in images(8, 1)])
    assert torch.equal(load_slim(tmp_path / "epoch=1.ckpt")(data), module.network.eval()(data))


class Own(L.LightningModule):
    """A LightningModule with a training of its own."""

    def __init__(self, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.net, self.norm = network(), norm or nn.Identity()

    def forward(self, x):
        return self.net(self.norm(x))

    def training_step(self, batch, _):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01)


def test_a_pruned_module_that_trained_itself_loads_in_one_call(tmp_path):
    small = prune(Own().eval(), images(32, 1), budget=0.6).model.train()
    fitted(tmp_path, small, 1)
    data = torch.stack([image for image, _ in images(8, 1)])
    assert torch.equal(load_slim(tmp_path / "epoch=1.ckpt", Own())(data), small.eval()(data))
    with pytest.raises(ValueError, match=r"epoch=1.ckpt: the checkpoint holds no plan, so pass a newly built dense"):
        load_slim(tmp_path / "epoch=1.ckpt")
    with pytest.raises(ValueError, match="would tell the width of 'norm', a norm without weights: fine-tune with"):
        load_slim(tmp_path / "epoch=1.ckpt", Own(nn.BatchNorm2d(3, affine=False)))


class Holder(Own):
    """Has the network as one of its attributes."""

    def __init__(self, network: nn.Module) -> None:
        L.LightningModule.__init__(self)
        self.model = network

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        return self.model(batch)


def test_the_network_in_a_module_of_ones_own_loads_in_one_call(tmp_path):
    data = torch.stack([image for image, _ in images(8, 1)])
    for name, held in {"pruned": slim().model, "dense": network()}.items():
        fitted(tmp_path / name, Holder(held.train()), 1)
        loaded = load_slim(tmp_path / name / "epoch=1.ckpt", network())
        assert torch.equal(loaded(data), held.eval()(data))


def test_rows_of_another_learning_rate_are_not_taken_over(tmp_path):
    tables = []
    for folder, lr in (("a", 1e-6), ("a", 0.1), ("b", 0.1)):
        module = PruneModule(network(), made("prune", finetune_epochs=1), lr=lr, out=tmp_path / folder)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(PruneModule, "_write", lambda *_: None)  # as if interrupted at the very end
            trainer(tmp_path).test(module, datamodule=Data(), verbose=False)
        tables.append(module.table)
    assert not tables[0].equals(tables[1])
    pd.testing.assert_frame_equal(tables[1], tables[2], check_exact=True)


def test_a_checkpoint_pruned_otherwise_is_refused(tmp_path):
    first = fitted(tmp_path / "a", PruneModule(slim()), 1)
    with pytest.raises(ValueError, match="pruned differently from this one"):
        fitted(tmp_path / "b", PruneModule(slim(0.4)), 2, first)


def test_errors_say_what_was_expected(tmp_path):
    with pytest.raises(ValueError, match=r"experiment='prun'\): expected 'prune', 'lesion', PruningExperiment"):
        PruneModule(network(), "prun")  # type: ignore[arg-type]
    with pytest.raises(
        TypeError, match=r"PruneModule\(model=None\): expected a network, .*, or the path of a Classifier's"
    ):
        PruneModule(None)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"PruneModule\(teacher='x'\): expected a network, what prune returned$"):
        PruneModule(network(), teacher="x")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="has no Linear layer; expected a classifier of images, with num_classes="):
        PruneModule(nn.Conv2d(3, 4, 1))
    with pytest.raises(ValueError, match=r"PruneModule: found no probe images: pass probe=a Dataset"):
        trainer(tmp_path).test(PruneModule(network()), DataLoader(images(), batch_size=8), verbose=False)
    module = PruneModule(network(), made("prune", finetune_epochs=1), probe=images())
    with pytest.raises(ValueError, match="datamodule=one with training images"):
        trainer(tmp_path).test(module, DataLoader(images(), batch_size=8), verbose=False)


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    """Of an untrained Classifier, in a run folder."""
    torch.manual_seed(0)
    classifier = Classifier("resnet18", 10, width=0.25)
    fitter = trainer(tmp_path)
    fitter.strategy.connect(classifier)
    path = tmp_path / "run" / "checkpoints" / "last.ckpt"
    fitter.save_checkpoint(path)
    return path


def test_a_classifier_comes_back_from_its_checkpoint(checkpoint):
    torch.manual_seed(0)
    wanted = Classifier("resnet18", 10, width=0.25).state_dict()
    loaded = load_classifier(checkpoint)
    assert not loaded.training
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in loaded.state_dict().items())
    assert RunFolder.of_checkpoint(checkpoint).path == checkpoint.parents[1]
    assert PruneModule(checkpoint).folder == checkpoint.parents[1]
    assert PruneModule(checkpoint, out="else").folder == Path("else")


class Evil:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def test_what_is_no_checkpoint_is_refused(tmp_path, checkpoint, monkeypatch):
    monkeypatch.chdir(tmp_path)
    evil, cut, plain, other = (tmp_path / f"{name}.ckpt" for name in ("evil", "cut", "plain", "other"))
    torch.save({"state_dict": {}, "x": Evil()}, evil)
    cut.write_bytes(checkpoint.read_bytes()[:5000])
    torch.save([1, 2], plain)
    torch.save({"state_dict": {}, "hyper_parameters": {"lr": 1}}, other)
    for path, message in {
        evil: "not a checkpoint of tensors and plain values",
        cut: "it was cut off or changed",
        plain: "holds no state_dict",
        other: "no checkpoint of a Classifier .* pass the network itself",
    }.items():
        with pytest.raises(ValueError, match=message):
            load_classifier(path)
    assert not Path("executed").exists()
    with pytest.raises(FileNotFoundError, match=r"gone.ckpt: no such checkpoint; expected a file such as"):
        load_classifier("gone.ckpt")


def test_weights_of_another_width_leave_the_model_as_it_was(checkpoint):
    narrow = Classifier("resnet18", 10, width=0.125)
    before = copy.deepcopy(narrow.state_dict())
    with pytest.raises(ValueError, match=r"network.conv1.weight is \[16, 3, 3, 3\], here \[8, 3, 3, 3\]"):
        load_weights(narrow, checkpoint)
    assert all(torch.equal(tensor, before[name]) for name, tensor in narrow.state_dict().items())
    load_weights(Classifier("resnet18", 10, width=0.25), checkpoint)


def unzipped(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")  # torch, on pickles of other kinds
def test_a_damaged_checkpoint_ends_in_a_value_error(tmp_path, checkpoint):
    """300 checkpoints with bytes changed, or cut off: each gives the saved weights or one kind of error."""
    rng, path = random.Random(0), tmp_path / "damaged.ckpt"
    files = unzipped(checkpoint)
    errors = []
    (pickled,) = (name for name in files if name.endswith("data.pkl"))
    for _ in range(300):
        data = bytearray(files[pickled])
        for _ in range(rng.randint(1, 3)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in files.items():
                archive.writestr(name, bytes(data) if name == pickled else content)
        try:
            read_checkpoint(path)
        except ValueError as error:
            errors.append(str(error))
    assert len(errors) > 100
    assert all(error.startswith(f"{path}: ") and "\n" not in error for error in errors)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hyper_parameters": [1]}, "it names no backbone"),
        ({"hyper_parameters": {"backbone": "resnet18", 5: 1}}, "its settings make no Classifier"),
        ({"hyper_parameters": {"backbone": "resnet18", "num_classes": "7"}}, "its settings make no Classifier"),
        ({"hyper_parameters": {"backbone": "resnet18", "num_classes": 10**30}}, "its settings make no Classifier"),
        ({"hyper_parameters": {"backbone": "resnet18", "num_classes": 10**12}}, "a checkpoint of another network"),
        ({"hyper_parameters": {"backbone": "resnet18", "num_classes": 10, "width": 1e4}}, "of another network"),
        ({"state_dict": 5}, "holds no state_dict; expected"),
        ({"state_dict": {"network.conv1.weight": 5}}, r"conv1.weight is a int, here \[16, 3, 3, 3\]"),
        ({"state_dict": {5: torch.ones(2)}}, "of another network"),
        ({"state_dict": {"network.conv1.weight": torch.ones(1).expand(16, 3, 3, 3)}}, "3, 3, 3. of repeated numbers"),
    ],
)
def test_settings_and_weights_of_another_kind_are_refused_before_anything_is_built(checkpoint, change, message):
    torch.save(torch.load(checkpoint, weights_only=True) | change, checkpoint)
    with pytest.raises(ValueError, match=f"last.ckpt: .*{message}"):
        load_classifier(checkpoint)


# --- data and networks of one's own -------------------------------------------------------------------------------


class Marked(Data):
    """Test images 40 to 59 of a data set; those before are no test images."""

    def test_dataloader(self) -> DataLoader:
        torch.manual_seed(0)
        return DataLoader(images(60, 3), 10, sampler=SubsetRandomSampler(range(40, 60)))


class MarkedByBatches(Data):
    """The same, named by the sampler of a batch sampler, of which the loader itself knows nothing."""

    def test_dataloader(self) -> DataLoader:
        return DataLoader(images(60, 3), batch_sampler=BatchSampler(SubsetRandomSampler(range(40, 60)), 10, False))


@pytest.mark.parametrize("data", [Marked, MarkedByBatches])
@pytest.mark.parametrize("size", [None, 15, 40])
def test_only_test_images_count_whatever_the_sampler(tmp_path, size, data):
    module = PruneModule(network(), made("prune", evaluation_size=size, scores=("l1",)))
    fitter = trainer(tmp_path)
    fitter.test(module, datamodule=data(), verbose=False)
    found = list(_evaluation(fitter, size))
    seen = torch.cat([pictures for pictures, _ in found])
    assert len(found[0][0]) == 10
    last = images(60, 3).tensors[0][40:]
    assert len(seen) == min(size or 20, 20)
    assert all(any(torch.equal(one, other) for other in last) for one in seen)


def test_test_images_in_batches_of_the_users_own_are_drawn_from_too(tmp_path):
    class Own(Data):
        def test_dataloader(self) -> DataLoader:
            return DataLoader(images(12, 3), batch_sampler=[[0, 1], [2, 3, 4], [9, 10]])

    fitter = trainer(tmp_path)
    fitter.test(PruneModule(slim()), datamodule=Own(), verbose=False)
    assert sum(len(labels) for _, labels in _evaluation(fitter, 5)) == 5


def test_a_limit_counts_the_users_batches_and_what_a_loader_drops_is_no_test_image(tmp_path):
    class Own(Data):
        options: dict[str, Any]

        def test_dataloader(self) -> DataLoader:
            return DataLoader(images(30, 3), **self.options)

    cases = [
        ({"batch_sampler": [[0, 1], [2, 3, 4], [9, 10]]}, 2, 40, 5),
        ({"batch_size": 8, "drop_last": True}, 1.0, 40, 24),
        ({"batch_size": 8, "drop_last": True}, 2, 40, 16),
        ({"batch_size": 8}, 0.5, 10, 10),
    ]
    for options, limit, size, expected in cases:
        data, fitter = Own(), trainer(tmp_path, limit_test_batches=limit)
        data.options = options
        fitter.test(PruneModule(slim()), datamodule=data, verbose=False)
        assert sum(len(labels) for _, labels in _evaluation(fitter, size)) == expected
    fitter = trainer(tmp_path)
    fitter.test(PruneModule(slim()), DataLoader([(images(4, 3).tensors)], batch_size=None), verbose=False)
    with pytest.raises(ValueError, match=r"are chosen, and shared by processes, by their index.*evaluation_size=None"):
        _evaluation(fitter, 2)


@pytest.mark.parametrize(
    "collate",
    [
        lambda items: {"image": default_collate(items)[0], "label": default_collate(items)[1]},
        lambda items: [*default_collate(items), torch.arange(len(items))],
        lambda items: [default_collate(items)[0], default_collate(items)[1].int()],
    ],
    ids=["mapping", "three", "int32"],
)
def test_batches_of_other_kinds_are_trained_and_tested_on(tmp_path, collate):
    module, fitter = PruneModule(slim()), trainer(tmp_path, max_epochs=1)
    loader = DataLoader(images(16, 1), 8, collate_fn=collate)
    fitter.fit(module, train_dataloaders=loader)
    (found,) = fitter.test(module, loader, verbose=False)
    (plain,) = fitter.test(module, DataLoader(images(16, 1), 8), verbose=False)
    assert found == pytest.approx(plain)


def test_of_several_test_loaders_each_is_evaluated_and_the_first_is_pruned_on(tmp_path):
    loaders = [DataLoader(images(count, seed), 8) for count, seed in ((28, 3), (16, 4))]
    module = PruneModule(network(), made("prune", scores=("l1",)), probe=images(32, 1))
    for _ in range(2):  # a second test begins anew
        found = trainer(tmp_path).test(module, loaders, verbose=False)
    for index, loader in enumerate(loaders):
        (alone,) = trainer(tmp_path).test(ImageClassifier(network(), 4), loader, verbose=False)
        for name, value in alone.items():
            assert found[index][f"{name}/dataloader_idx_{index}"] == pytest.approx(value)
    assert module.table["accuracy"][0] == pytest.approx(found[0]["test/top1/dataloader_idx_0"])


def test_validation_has_no_part_in_what_a_teacher_teaches(tmp_path):
    teacher = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 1))
    data = TensorDataset(images(32, 1).tensors[0], torch.rand(32, 1))
    strange = TensorDataset(30 * images(32, 2).tensors[0], torch.rand(32, 1))
    small = prune(teacher, data, budget=0.6, score="l1", allocation="uniform", compensate=False)
    found = []
    for validation in (None, DataLoader(strange, 8)):
        module, fitter = PruneModule(copy.deepcopy(small), teacher=teacher), trainer(tmp_path, max_epochs=1)
        fitter.fit(module, DataLoader(data, 8), validation)
        found.append(module.network.state_dict())
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


def test_networks_of_the_grid_learn_from_the_teacher(tmp_path):
    tables = []
    for place, teacher in enumerate((None, network(), network().requires_grad_(False))):
        if place == 2:
            torch.nn.init.normal_(next(teacher.parameters()))
        module = PruneModule(network(), made("prune", finetune_epochs=1), teacher=teacher, lr=0.05, out=tmp_path)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(PruneModule, "_write", lambda *_: None)  # rows of another teacher stay
            trainer(tmp_path).test(module, datamodule=Data(), verbose=False)
        tables.append(module.table["tuned_loss"][1:].tolist())
    assert tables[0] != tables[1] != tables[2]


def test_a_regression_learns_from_its_teacher(tmp_path):
    teacher = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 1))
    data = TensorDataset(images(32, 1).tensors[0], torch.rand(32, 1))
    small = prune(teacher, data, budget=0.6, score="l1", allocation="uniform", compensate=False)
    module, fitter = PruneModule(small, teacher=teacher), trainer(tmp_path, max_epochs=1)
    fitter.fit(module, DataLoader(data, 8))
    assert "train/loss" in fitter.callback_metrics
    assert "train/top1" not in fitter.callback_metrics
    with pytest.raises(
        ValueError, match=r"a tensor of shape \(8, 1\) of torch.float32: expected the index of each image's class"
    ):
        fitter.test(module, DataLoader(data, 8), verbose=False)


def test_without_a_probe_the_datamodules_validation_images_are_one(tmp_path):
    class Validated(L.LightningDataModule):
        staged: tuple[str, ...] = ()

        def setup(self, stage: str) -> None:
            self.staged += (stage,)
            if stage == "fit":  # as many do it
                self.held_out = images(32, 1)

        def val_dataloader(self) -> DataLoader:
            return DataLoader(self.held_out, batch_size=16)

        def test_dataloader(self) -> DataLoader:
            return DataLoader(images(28, 3), batch_size=8)

    module, data = PruneModule(network(), made("prune")), Validated()
    trainer(tmp_path).test(module, datamodule=data, verbose=False)
    assert data.staged == ("test", "fit")
    pd.testing.assert_frame_equal(module.table, ran(tmp_path).table)


def regression(outputs: int = 1) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, outputs))


@pytest.mark.parametrize(("count", "size"), [(9, 8), (4, 1)])
def test_a_batch_of_one_number_has_no_variance_and_does_no_harm(tmp_path, count, size):
    torch.manual_seed(0)
    teacher, data = regression(), [image for image, _ in images(count, 1)]
    module = PruneModule(copy.deepcopy(teacher), teacher=teacher, lr=1e-4)
    with torch.no_grad():
        module.network[0].weight.mul_(0.9)
    trainer(tmp_path, max_epochs=2).fit(module, DataLoader(data, size))
    assert all(parameter.isfinite().all() for parameter in module.parameters())


def test_several_labels_learn_each_logit_of_the_teacher(tmp_path):
    """A softmax would not see that all logits are off by one number; each label's probability is."""
    torch.manual_seed(0)
    teacher, labels = regression(3), torch.arange(96).reshape(32, 3) % 2
    small = copy.deepcopy(teacher)
    with torch.no_grad():
        small[-1].bias.add_(1.5)
    data = TensorDataset(images(32, 1).tensors[0], labels)
    module, logger = PruneModule(small, teacher=teacher, lr=0.5), RecordingLogger()
    fitter = trainer(tmp_path, max_epochs=10, logger=logger, log_every_n_steps=1)
    fitter.fit(module, DataLoader(data, 8), DataLoader(data, 8))
    losses = [row["val/loss"] for _, row in logger.of("val/loss")]
    assert losses[-1] < 0.05 * losses[0]  # validated without an accuracy
    with torch.no_grad():
        off = module.network(data.tensors[0]) - teacher(data.tensors[0])
    assert float(off.abs().mean()) < 0.15  # 1.5 before


@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
def test_the_teacher_takes_on_the_trainers_precision(tmp_path, precision):
    fitter = trainer(tmp_path, max_epochs=1, precision=precision)
    fitter.fit(PruneModule(slim(), teacher=network()), datamodule=Data())
    assert fitter.callback_metrics["train/loss"].isfinite()


def test_a_wrong_number_of_classes_is_told(tmp_path):
    class HeadFirst(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head, self.body, self.gate = nn.Conv2d(8, 4, 1), nn.Conv2d(3, 8, 3), nn.Linear(8, 8)

        def forward(self, pixels):
            seen = self.body(pixels).relu().mean((2, 3))
            return self.head((seen * self.gate(seen).sigmoid())[..., None, None]).flatten(1)

    module = PruneModule(HeadFirst(), experiment=LesionExperiment(channels=3))
    with pytest.raises(ValueError, match="HeadFirst gives 4 logits, and the accuracies are of 8: pass num_classes=4"):
        trainer(tmp_path).test(module, DataLoader(images(8, 1), 8), verbose=False)
    trainer(tmp_path).validate(PruneModule(HeadFirst(), num_classes=4), DataLoader(images(8, 1), 8), verbose=False)
