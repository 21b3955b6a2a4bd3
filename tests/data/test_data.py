"""The data modules: splits, probe, loaders, augmentation, layouts; on synthetic trees and the real digits."""

import os
import pickle
import re
import struct
import tempfile
import zlib
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler
from torchvision.transforms import v2
from torchvision.transforms.v2.functional import to_pil_image

from chanaxes_pl.data import (
    CIFAR10DataModule,
    CIFAR100DataModule,
    DigitsDataModule,
    ImageNet100DataModule,
    InMemoryDataModule,
    PhotosDataModule,
    TinyImageNetDataModule,
)
from chanaxes_pl.data.augment import random_crop_flip
from chanaxes_pl.data.files import TensorImages, decode, list_classes, list_images, load, read_image
from chanaxes_pl.data.photos import PHOTOS, photo_files
from chanaxes_pl.data.splits import EpochSampler, balanced_order, held_out_count, seeded_generator, stratified_split

# Lightning 2.6 asks torch 2.15 for a class that torch has since deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")


def noise(size: int, seed: int) -> Tensor:
    return torch.randint(0, 256, (3, size, size), dtype=torch.uint8, generator=seeded_generator(seed))


def write_image(path: Path, image: Tensor) -> None:
    to_pil_image(image).save(path)


def write_classes(folder: Path, classes: list[str], count: int, size: int, inside: str = "") -> None:
    suffix = "png" if size < 64 else "JPEG"
    for label, name in enumerate(classes):
        (folder / name / inside).mkdir(parents=True)
        for index in range(count):
            write_image(folder / name / inside / f"{name}_{index}.{suffix}", noise(size, 1000 * label + index))


@pytest.fixture
def cifar(tmp_path: Path) -> Path:
    classes = [f"class{i}" for i in range(10)]
    write_classes(tmp_path / "cifar10" / "train", classes, 6, 32)
    write_classes(tmp_path / "cifar10" / "test", classes, 2, 32)
    return tmp_path


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    tree = tmp_path / "tiny-imagenet-200"
    wnids = ["n03", "n01", "n02"]
    write_classes(tree / "train", wnids, 4, 64, "images")
    (tree / "wnids.txt").write_text("\n".join(wnids))
    (tree / "words.txt").write_text("n01\tgoldfish, Carassius auratus\nn02\tcentipede\n")
    (tree / "val" / "images").mkdir(parents=True)
    for index in range(4):
        write_image(tree / "val" / "images" / f"val_{index}.JPEG", noise(64, index))
    lines = [f"val_{i}.JPEG\t{wnid}\t0\t0\t9\t9" for i, wnid in enumerate(["n02", "n01", "n99", "n03"])]
    (tree / "val" / "val_annotations.txt").write_text("\n".join(lines) + "\n")
    return tmp_path


@pytest.fixture
def imagenet(tmp_path: Path) -> Path:
    for split, count in (("train", 4), ("val", 1)):
        write_classes(tmp_path / split, ["n01", "n02", "n03"], count, 80)
    return tmp_path


@pytest.fixture(scope="module")
def digits() -> DigitsDataModule:
    module = DigitsDataModule(image_size=8)
    module.setup()
    return module


def everything(loader: DataLoader) -> tuple[Tensor, Tensor]:
    images, labels = zip(*loader, strict=True)
    return torch.cat(images), torch.cat(labels)


def image_set(images: Tensor) -> set[bytes]:
    return {image.numpy().tobytes() for image in images}


class Recorder(L.LightningModule):
    """A linear classifier that keeps every batch it is given."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.classify = nn.Sequential(nn.Flatten(), nn.Linear(features, 10))
        self.seen: dict[str, list[Tensor]] = {"training": [], "validation": [], "test": []}

    def _step(self, batch: list[Tensor], stage: str) -> Tensor:
        images, labels = batch
        self.seen[stage].append(images.clone())
        return nn.functional.cross_entropy(self.classify(images), labels)

    def training_step(self, batch: list[Tensor]) -> Tensor:
        return self._step(batch, "training")

    def validation_step(self, batch: list[Tensor]) -> None:
        self._step(batch, "validation")

    def test_step(self, batch: list[Tensor]) -> None:
        self._step(batch, "test")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def quiet_trainer(**kwargs: object) -> L.Trainer:
    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "accelerator": "cpu",
    }
    return L.Trainer(**{**quiet, "enable_checkpointing": False, **kwargs})


# ---------------------------------------------------------------------------------------------- splits


@pytest.mark.parametrize("count", [0, 1, 7, 30, 59])
def test_split_is_disjoint_covers_and_is_stratified(count: int) -> None:
    labels = torch.tensor([0] * 30 + [1] * 20 + [2] * 10)[torch.randperm(60, generator=seeded_generator(5))]
    kept, held_out = stratified_split(labels, count, seeded_generator(0))
    assert sorted(torch.cat([kept, held_out]).tolist()) == list(range(60))
    assert len(held_out) == count
    share = torch.bincount(labels[held_out], minlength=3) - count * torch.tensor([30, 20, 10]) / 60
    assert share.abs().max() < 1


def test_split_follows_its_seed_alone() -> None:
    labels = torch.arange(100) % 10
    first, again, other = (stratified_split(labels, 20, seeded_generator(seed))[1] for seed in (0, 0, 1))
    assert first.equal(again)
    assert not first.equal(other)


@pytest.mark.parametrize("val_size", [-1, -0.1, 1.0, 5000.0, float("nan")])
def test_val_size_out_of_range(val_size: float) -> None:
    with pytest.raises(ValueError, match=rf"val_size={val_size!r}: expected an int"):
        DigitsDataModule(val_size=val_size)


def test_val_size_leaves_something_to_train_on() -> None:
    assert held_out_count(9, 10) == 9
    with pytest.raises(ValueError, match="val_size=1437 holds out 1437 of 1437 images"):
        DigitsDataModule(val_size=1437).setup("fit")


@pytest.mark.parametrize(("kwargs", "message"), [({"batch_size": 0}, "batch_size=0"), ({"seed": -1}, "seed=-1")])
def test_arguments_out_of_range(kwargs: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DigitsDataModule(**kwargs)


def test_digits_are_split_into_all_of_the_set(digits: DigitsDataModule) -> None:
    subset = digits.train_dataloader().dataset
    parts = [subset[i][0][None] for i in range(len(subset))]  # type: ignore[arg-type]
    loaders = [digits.val_dataloader(), digits.test_dataloader()]
    sets = [image_set(torch.cat(parts))] + [image_set(everything(loader)[0]) for loader in loaders]
    assert [len(s) for s in sets] == [1293, 144, 360]  # no digit occurs twice
    assert len(set.union(*sets)) == 1797


def test_the_test_images_do_not_depend_on_the_seed(digits: DigitsDataModule) -> None:
    other = DigitsDataModule(image_size=8, seed=1)
    assert everything(other.test_dataloader())[0].equal(everything(digits.test_dataloader())[0])
    assert not everything(other.val_dataloader())[0].equal(everything(digits.val_dataloader())[0])


# ----------------------------------------------------------------------------------------------- probe


def spread(labels: Tensor, classes: int) -> int:
    counts = torch.bincount(labels, minlength=classes)
    return int(counts.max() - counts.min())


@pytest.mark.parametrize("classes", [1, 2, 3, 10, 11])
def test_every_prefix_of_the_probe_and_its_halves_are_balanced(classes: int) -> None:
    generator = seeded_generator(3)
    sizes = [9 + i % 3 for i in range(classes)]  # unequal: balance must hold while every class lasts
    labels = torch.repeat_interleave(torch.arange(classes), torch.tensor(sizes))
    labels = labels[torch.randperm(len(labels), generator=generator)]
    order = balanced_order(labels, generator)
    assert sorted(order.tolist()) == list(range(len(labels)))
    for n in range(1, 9 * classes + 1):
        prefix = labels[order[:n]]
        assert max(spread(prefix, classes), spread(prefix[::2], classes), spread(prefix[1::2], classes)) <= 1


def test_probe_is_fixed_normalised_training_images(digits: DigitsDataModule) -> None:
    images, labels = everything(digits.probe_dataloader())
    again, _ = everything(digits.probe_dataloader())
    assert images.equal(again)
    assert images.dtype == torch.float32
    assert labels.dtype == torch.int64
    subset = digits.train_dataloader().dataset
    train = torch.stack([subset[i][0] for i in range(len(subset))])  # type: ignore[arg-type]
    assert image_set(images) == image_set(digits.evaluation_transform(train))
    item, label = digits.probe_dataloader().dataset[7]
    assert item.equal(images[7])
    assert label == labels[7]


def test_probe_images_follow_the_seed_of_the_module_alone(digits: DigitsDataModule) -> None:
    images, _ = everything(digits.probe_dataloader())
    torch.manual_seed(123)
    same, other = DigitsDataModule(image_size=8), DigitsDataModule(image_size=8, seed=1)
    assert everything(same.probe_dataloader())[0].equal(images)
    assert not everything(other.probe_dataloader())[0].equal(images)


def test_no_loader_touches_the_global_random_stream(digits: DigitsDataModule) -> None:
    before = torch.get_rng_state()
    for name in ("probe", "train", "val", "test"):
        for images, _ in getattr(digits, f"{name}_dataloader")():
            if name == "train":
                digits.training_transform(images)
    assert torch.get_rng_state().equal(before)


# --------------------------------------------------------------------------------- augmentation, transforms


def shifted(image: Tensor, top: int, left: int, flip: bool, padding: int) -> Tensor:
    """Slow and obvious: crop the padded image pixel by pixel, then mirror the rows."""
    height, width = image.shape[1:]
    result = torch.zeros_like(image)
    for row in range(height):
        for column in range(width):
            y, x = row + top - padding, column + left - padding
            if 0 <= y < height and 0 <= x < width:
                result[:, row, column] = image[:, y, x]
    return torch.stack([row.flip(-1) for row in result]) if flip else result


@pytest.mark.parametrize("flip", [False, True])
def test_each_image_is_a_shifted_copy_in_its_own_way(flip: bool) -> None:
    padding, images = 1, torch.stack([noise(6, seed) for seed in range(40)])[:, :, :5]  # not square
    augmented = random_crop_flip(images, padding, flip, seeded_generator(0))
    found = set()
    for image, result in zip(images, augmented, strict=True):
        choices = [(t, s, f) for t in range(3) for s in range(3) for f in ((False, True) if flip else (False,))]
        matches = [choice for choice in choices if shifted(image, *choice, padding).equal(result)]
        assert len(matches) == 1
        found.add(matches[0])
    assert len(found) > (12 if flip else 7)


def test_one_image_repeated_is_augmented_in_many_ways(digits: DigitsDataModule) -> None:
    images = digits.test_dataloader().dataset[0][0].expand(64, -1, -1, -1)
    assert len(image_set(digits.training_transform(images))) > 5
    assert not digits.training_transform(images).equal(digits.training_transform(images))


def test_digits_are_never_mirrored() -> None:
    module = DigitsDataModule(image_size=8)
    image = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    image[..., 3, 2:4] = torch.tensor([100, 200], dtype=torch.uint8)  # brighter to the right
    for augmented in module.training_transform(image.expand(32, -1, -1, -1))[:, 0]:
        assert augmented.argmax() == augmented.flatten().topk(2).indices[1] + 1


def test_without_augmentation_training_is_transformed_as_evaluation() -> None:
    module = DigitsDataModule(augment=False)
    images = torch.stack([noise(32, 0), noise(32, 1)])
    assert module.training_transform(images).equal(module.evaluation_transform(images))


@pytest.mark.parametrize("cls", [DigitsDataModule, CIFAR10DataModule, CIFAR100DataModule, TinyImageNetDataModule])
def test_evaluation_is_plain_torchvision(cls: type[InMemoryDataModule]) -> None:
    images = torch.stack([noise(32, 0), noise(32, 1)])
    plain = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(cls.mean, cls.std)])
    batch, labels = cls().on_after_batch_transfer((images, torch.tensor([0, 1])), 0)
    assert batch.equal(torch.stack([plain(image) for image in images]))
    assert labels.tolist() == [0, 1]


def test_float_images_pass_untouched() -> None:
    batch = (torch.rand(2, 3, 8, 8), torch.tensor([0, 1]))
    assert DigitsDataModule().on_after_batch_transfer(batch, 0) is batch


# -------------------------------------------------------------------------------------------- the Trainer


def test_every_epoch_has_another_order_that_the_global_seed_fixes(digits: DigitsDataModule) -> None:
    torch.manual_seed(0)
    loader = digits.train_dataloader()
    first, second = everything(loader)[1], everything(loader)[1]
    assert not first.equal(second)
    assert everything(digits.train_dataloader())[1].equal(first)
    torch.manual_seed(1)
    assert not everything(digits.train_dataloader())[1].equal(first)


def test_the_trainer_augments_in_training_only(digits: DigitsDataModule) -> None:
    model, trainer = Recorder(3 * 8 * 8), quiet_trainer(max_epochs=1, limit_train_batches=2)
    trainer.fit(model, datamodule=digits)
    trainer.test(model, datamodule=digits, verbose=False)
    held_out = digits.evaluation_transform(everything(digits.val_dataloader())[0])
    assert torch.cat(model.seen["validation"][-2:]).equal(held_out)
    test = digits.evaluation_transform(everything(digits.test_dataloader())[0])
    assert torch.cat(model.seen["test"]).equal(test)
    probe = image_set(everything(digits.probe_dataloader())[0])
    assert len(image_set(torch.cat(model.seen["training"])) & probe) < 64  # of 256; a ninth is not shifted


def test_a_resumed_run_sees_the_batches_it_would_have_seen(tmp_path: Path) -> None:
    def run(epochs: int, resume: str | None = None) -> tuple[L.Trainer, list[Tensor]]:
        L.seed_everything(1, verbose=False)
        model, trainer = Recorder(3 * 8 * 8), quiet_trainer(max_epochs=epochs)
        trainer.fit(
            model, datamodule=DigitsDataModule(batch_size=512, image_size=8), ckpt_path=resume, weights_only=True
        )
        return trainer, model.seen["training"]

    _, whole = run(3)
    trainer, start = run(1)
    trainer.save_checkpoint(tmp_path / "first.ckpt")
    _, rest = run(3, str(tmp_path / "first.ckpt"))
    assert len(whole) == 6
    assert all(a.equal(b) for a, b in zip(whole, start + rest, strict=True))
    assert not whole[0].equal(whole[2])


def test_training_without_held_out_images() -> None:
    module = DigitsDataModule(batch_size=512, val_size=0, image_size=8)
    assert len(module.val_dataloader()) == 0
    with pytest.warns(UserWarning, match="Total length of `DataLoader` across ranks is zero"):
        quiet_trainer(max_epochs=1).fit(Recorder(3 * 8 * 8), datamodule=module)


def test_images_follow_the_precision_of_the_trainer() -> None:
    model, trainer = (
        Recorder(3 * 8 * 8),
        quiet_trainer(max_epochs=1, limit_train_batches=1, precision="bf16-true"),
    )
    trainer.fit(model, datamodule=DigitsDataModule(image_size=8))
    assert model.seen["training"][0].dtype == torch.bfloat16


def test_two_distributed_shards_cover_the_training_set(digits: DigitsDataModule) -> None:
    loader = digits.train_dataloader()
    assert isinstance(loader.sampler, EpochSampler)
    shards = []
    for rank in range(2):
        sampler = DistributedSampler(loader.dataset, num_replicas=2, rank=rank, shuffle=True)  # type: ignore[arg-type]
        shards.append(everything(DataLoader(loader.dataset, 64, sampler=sampler, collate_fn=loader.collate_fn))[0])
    assert len(shards[0]) == len(shards[1]) == 647  # one repeat fills up 1,293
    assert len(image_set(torch.cat(shards))) == 1293


def test_a_batch_larger_than_the_training_set() -> None:
    with pytest.raises(ValueError, match="batch_size=2000: there are only 1293 training images"):
        DigitsDataModule(batch_size=2000).train_dataloader()


COMMAND_LINE = [
    DigitsDataModule,
    PhotosDataModule,
    CIFAR100DataModule,
    TinyImageNetDataModule,
    ImageNet100DataModule,
]


@pytest.mark.parametrize("cls", COMMAND_LINE)
def test_help_shows_the_options_that_all_share_with_type_and_text(cls: type[L.LightningDataModule]) -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(cls, "data")
    text = " ".join(parser.format_help().split())
    for flag, words in [
        ("--data.batch_size BATCH_SIZE", r"images a batch, on each device\. \(type: int, default: 128\)"),
        ("--data.val_size VAL_SIZE", r"[^-]*\(type: int \| float, default: (0\.1|5000)\)"),
        ("--data.seed SEED", r"fixes the held-out images and the probe\. \(type: int, default: 0\)"),
        (r"--data.augment \{true,false\}", r"[^(]*at random[^(]*\(type: bool, default: True\)"),
    ]:
        assert re.search(f"{flag} {words}", text), (flag, text)


@pytest.mark.parametrize("cls", COMMAND_LINE)
def test_arguments_are_known_to_the_command_line(cls: type[L.LightningDataModule]) -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(cls, "data")
    for size, expected in (("7", 7), ("0.25", 0.25)):
        parsed = parser.parse_args([f"--data.val_size={size}", "--data.batch_size=3", "--data.augment=false"])
        made = cls(**vars(parsed.data))
        assert (made.val_size, made.batch_size, made.augment) == (expected, 3, False)


# ------------------------------------------------------------------------------------------------- CIFAR


@pytest.mark.parametrize("inside", ["", "cifar10"])
def test_cifar_class_folders(cifar: Path, inside: str) -> None:
    module = CIFAR10DataModule(cifar / inside, batch_size=4, val_size=10)
    module.prepare_data()
    module.setup()
    images, labels = next(iter(module.train_dataloader()))
    assert (images.shape, images.dtype, labels.dtype) == ((4, 3, 32, 32), torch.uint8, torch.int64)
    assert module.class_names == [f"class{i}" for i in range(10)]
    test, targets = everything(module.test_dataloader())
    assert targets.tolist() == [i // 2 for i in range(20)]
    assert test[5].equal(noise(32, 2001))
    assert [len(everything(loader)[1]) for loader in (module.val_dataloader(), module.probe_dataloader())] == [10, 50]


def test_cifar_archive_of_torchvision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda path, md5=None: Path(path).exists())
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    pixels = torch.arange(200 * 3072).remainder(251).to(torch.uint8).view(200, 3072)
    batch = {"data": pixels.numpy(), "fine_labels": [i % 100 for i in range(200)]}
    names = {"fine_label_names": [f"class{i}" for i in range(100)]}
    for name, content in (("train", batch), ("test", batch), ("meta", names)):
        (folder / name).write_bytes(pickle.dumps(content))
    module = CIFAR100DataModule(tmp_path, val_size=50, download=True)  # what is there is not fetched again
    module.prepare_data()
    images, labels = everything(module.test_dataloader())
    assert images.equal(pixels.view(200, 3, 32, 32))
    assert labels.tolist() == batch["fine_labels"]
    assert module.class_names == names["fine_label_names"]
    (folder / "test").unlink()
    with pytest.raises(ValueError, match=r"cifar-100-python: incomplete or corrupted.*--data.download true"):
        CIFAR100DataModule(tmp_path).setup("test")


def test_cifar_download_is_torchvisions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    class Archive(CIFAR10DataModule.archive):
        def __init__(self, root: str, download: bool = False) -> None:
            calls.append((root, download))

    monkeypatch.setattr(CIFAR10DataModule, "archive", Archive)
    CIFAR10DataModule(tmp_path).prepare_data()
    assert calls == []
    CIFAR10DataModule(tmp_path, download=True).prepare_data()
    assert calls == [(str(tmp_path), True)]


def test_cifar_missing(tmp_path: Path) -> None:
    message = rf"CIFAR10DataModule: no data set in {tmp_path}/nowhere\..*train/, test/.*--data.download true"
    with pytest.raises(FileNotFoundError, match=message):
        CIFAR10DataModule(tmp_path / "nowhere").setup("fit")


def test_cifar_wrong_number_of_classes(cifar: Path) -> None:
    with pytest.raises(ValueError, match="train: 10 class folders, expected 100"):
        CIFAR100DataModule(cifar / "cifar10").setup("fit")


def test_an_empty_class_folder_is_named(cifar: Path) -> None:
    for path in (cifar / "cifar10/train/class3").iterdir():
        path.unlink()
    with pytest.raises(FileNotFoundError, match=r"train/class3: no image \(.jpeg, .jpg, .png\)"):
        CIFAR10DataModule(cifar).setup("fit")


def test_a_class_that_only_training_has_is_named(cifar: Path) -> None:
    (cifar / "cifar10/test/class3").rename(cifar / "cifar10/test/cat")
    with pytest.raises(FileNotFoundError, match="test/class3: no such folder"):
        CIFAR10DataModule(cifar).setup("test")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a readable image"),
        (b"no image", "not a readable image"),
        (b"\x89PNG\r\n\x1a\n\x00\x00\x00\x05IHDR\x00\x00\x00\x00\x00\x00\x00\x00\x00", "not a readable image"),
        (None, "8×8 pixels, expected 32×32"),
    ],
)
def test_a_bad_image_is_named(cifar: Path, content: bytes | None, message: str) -> None:
    path = cifar / "cifar10/train/class3/class3_1.png"
    if content is None:
        write_image(path, noise(8, 0))
    else:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"class3_1.png: {message}"):
        CIFAR10DataModule(cifar).setup("fit")


def test_hidden_files_are_no_images(cifar: Path) -> None:
    (cifar / "cifar10/train/class3/._class3_1.png").write_bytes(b"written by macOS")
    CIFAR10DataModule(cifar, val_size=10).setup("fit")


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_link_that_leads_nowhere_is_named(cifar: Path, split: str) -> None:
    (cifar / "cifar10" / split / "class3/lost.png").symlink_to(cifar / "elsewhere.png")
    with pytest.raises(FileNotFoundError, match=r"lost.png: expected an image file: it is a link to .*elsewhere.png"):
        CIFAR10DataModule(cifar, val_size=10).setup()


def test_a_class_that_is_a_link_to_nowhere_is_named(cifar: Path) -> None:
    (cifar / "cifar10/train/class3").rename(cifar / "class3")
    (cifar / "cifar10/train/class3").symlink_to(cifar / "class3")
    CIFAR10DataModule(cifar, val_size=10).setup("fit")  # a link to a folder is as good as a folder
    (cifar / "class3").rename(cifar / "elsewhere")
    message = r"train/class3: expected a class folder: it is a link to .*/class3, which is missing"
    with pytest.raises(FileNotFoundError, match=message):
        CIFAR10DataModule(cifar, val_size=10).setup("fit")


def test_hidden_folders_and_loose_files_are_no_classes(cifar: Path) -> None:
    (cifar / "cifar10/train/.ipynb_checkpoints").mkdir()
    (cifar / "cifar10/train/._class3").write_bytes(b"written by macOS")
    (cifar / "cifar10/train/README.txt").write_text("ten classes")
    assert list_classes(cifar / "cifar10/train") == [f"class{i}" for i in range(10)]


def test_a_folder_named_like_an_image_is_named(cifar: Path) -> None:
    (cifar / "cifar10/train/class3/more.png").mkdir()
    with pytest.raises(FileNotFoundError, match=r"more.png: expected an image file\."):
        CIFAR10DataModule(cifar, val_size=10).setup("fit")


def test_grey_of_16_bits_keeps_its_range(tmp_path: Path) -> None:
    grey = np.array([[0, 255, 256], [4660, 32768, 65535]], np.uint16)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    assert read_image(tmp_path / "grey.png").tolist() == [[[0, 0, 1], [18, 128, 255]]] * 3


def test_an_image_of_too_many_pixels_is_named(tmp_path: Path) -> None:
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)  # 60,000 x 60,000, and no pixel in it
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")]
    body = [struct.pack(">I", len(c)) + kind + c + struct.pack(">I", zlib.crc32(kind + c)) for kind, c in chunks]
    (tmp_path / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(body))
    with pytest.raises(ValueError, match=r"bomb.png: not a readable image \(.*decompression bomb"):
        read_image(tmp_path / "bomb.png")


# ------------------------------------------------------------------------------------------------- cache


def cached(cifar: Path) -> tuple[TensorImages, list[Path]]:
    train = cifar / "cifar10" / "train"
    images = load(list_images(train, list_classes(train)), 32, cifar / "cache")
    return images, sorted((cifar / "cache").iterdir())


def test_the_cache_holds_what_was_decoded(cifar: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, files = cached(cifar)
    assert len(files) == 1
    monkeypatch.setattr("chanaxes_pl.data.files.decode", None)  # not called again
    again, _ = cached(cifar)
    assert again.images.equal(first.images)
    assert again.labels.equal(first.labels)
    again.images[0] = 0  # a private copy: the file keeps its content
    assert cached(cifar)[0].images.equal(first.images)


def test_a_changed_image_is_decoded_again(cifar: Path) -> None:
    cached(cifar)
    write_image(cifar / "cifar10/train/class0/class0_0.png", noise(32, 77))
    images, files = cached(cifar)
    assert len(files) == 2
    assert images.images[0].equal(noise(32, 77))


@pytest.mark.parametrize("keep", [0, 60, -1000])
def test_a_truncated_cache_is_reported_and_replaced(cifar: Path, keep: int) -> None:
    first, (path,) = cached(cifar)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.warns(UserWarning, match=rf"{path.name}: damaged cache"):
        again, _ = cached(cifar)
    assert again.images.equal(first.images)
    assert cached(cifar)[0].images.equal(first.images)


def test_a_cache_that_cannot_be_written_leaves_nothing(cifar: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("numpy.save", full)
    with pytest.raises(OSError, match="no space left"):
        cached(cifar)
    assert list((cifar / "cache").iterdir()) == []


# ------------------------------------------------------------------------------------------------ photos


@pytest.fixture
def coordinates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """In place of the photographs, pictures whose pixels say where they are: red is x, green is y, blue the picture."""
    for number, (package, file) in enumerate(PHOTOS.values()):
        path = tmp_path / package / file
        path.parent.mkdir(parents=True, exist_ok=True)
        rows, columns = torch.meshgrid(torch.arange(128), torch.arange(128 + number), indexing="ij")
        pixels = torch.stack([columns, rows, torch.full_like(rows, number)]).to(torch.uint8)
        to_pil_image(pixels).save(path, "PNG")  # also under a name that ends in .jpg: nothing is lost

    def found(name: str) -> ModuleSpec:
        spec = ModuleSpec(name, None, is_package=True)
        spec.submodule_search_locations = [str(tmp_path / name)]
        return spec

    monkeypatch.setattr("chanaxes_pl.data.photos.find_spec", found)
    return tmp_path


def test_crops_of_each_part_lie_within_it_and_cover_it(coordinates: Path) -> None:
    module = PhotosDataModule(crops=200, test_crops=50, val_size=0.2)
    training = module._split_training()
    parts = {
        "train": (training.data.images[training.kept], training.data.labels[training.kept]),
        "val": everything(module.val_dataloader()),
        "test": everything(module.test_dataloader()),
    }
    for name, (images, labels) in parts.items():
        assert images[:, 2].float().mean((1, 2)).equal(labels.float())
        assert torch.bincount(labels).tolist() == [{"train": 160, "val": 40, "test": 50}[name]] * 15
        for label in range(15):
            border = round(0.7 * (128 + label))
            x, y = images[labels == label, 0].int(), images[labels == label, 1].int()
            assert (x[:, 0, -1] - x[:, 0, 0]).eq(31).all()
            assert (y[:, -1, 0] - y[:, 0, 0]).eq(31).all()
            left, right = (0, border - 1) if name == "train" else (border, 127 + label)
            top, bottom = {"train": (0, 127), "val": (0, 63), "test": (64, 127)}[name]
            assert left <= x.min() <= left + 2
            assert right - 2 <= x.max() <= right
            assert top <= y.min() <= top + 5
            assert bottom - 5 <= y.max() <= bottom


def test_crops_follow_the_seed_and_test_crops_do_not(coordinates: Path) -> None:
    def crops(seed: int) -> list[Tensor]:
        module = PhotosDataModule(crops=4, test_crops=2, val_size=15, seed=seed)
        return [module._split_training().data.images, everything(module.test_dataloader())[0]]

    first, again, other = crops(0), crops(0), crops(1)
    assert first[0].equal(again[0])
    assert not first[0].equal(other[0])
    assert first[1].equal(other[1])


def test_a_missing_photograph_is_named(coordinates: Path) -> None:
    (coordinates / "skimage/data/retina.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r'retina.jpg: no such photograph\. pip install "scikit-image'):
        PhotosDataModule().setup("fit")


def test_without_scikit_image_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "chanaxes_pl.data.photos.find_spec", lambda name: None if name == "skimage" else find_spec(name)
    )
    with pytest.raises(FileNotFoundError, match=r'package skimage.* is missing\. pip install "scikit-image'):
        PhotosDataModule().setup("fit")


@pytest.mark.parametrize("kwargs", [{"crops": 0}, {"test_crops": 0}])
def test_photos_need_crops(kwargs: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"crops=\d+, test_crops=\d+: expected at least 1"):
        PhotosDataModule(**kwargs)


def test_real_photographs() -> None:
    if find_spec("skimage") is None:
        pytest.skip('needs scikit-image: pip install "chanaxes_pl[demo]"')
    assert [path.stem for path in photo_files()] == list(PHOTOS)
    module = PhotosDataModule(crops=60, test_crops=2)
    images, labels = everything(module.probe_dataloader())
    assert torch.bincount(labels).tolist() == [54] * 15
    assert images.mean((0, 2, 3)).abs().max() < 0.1
    assert (images.std((0, 2, 3)) - 1).abs().max() < 0.1


# ----------------------------------------------------------------------------------------- Tiny-ImageNet


@pytest.mark.parametrize("inside", ["", "tiny-imagenet-200"])
def test_tiny_imagenet(tiny: Path, inside: str) -> None:
    module = TinyImageNetDataModule(tiny / inside, batch_size=2, val_size=3)
    assert module.num_classes == 3  # before anything is read
    module.setup()
    assert module.class_names == ["goldfish", "centipede", "n03"]
    images, labels = everything(module.test_dataloader())
    assert labels.tolist() == [1, 0, 2]  # n99 is not among the classes
    files = [tiny / f"tiny-imagenet-200/val/images/val_{i}.JPEG" for i in (0, 1, 3)]
    assert images.equal(decode(list_images(files[0].parent, ["."]), 64)[[0, 1, 3]])
    assert sorted(everything(module.probe_dataloader())[1].tolist()) == [0] * 3 + [1] * 3 + [2] * 3


def test_tiny_imagenet_missing(tmp_path: Path) -> None:
    assert TinyImageNetDataModule(tmp_path).num_classes == 200
    message = rf"no data set in {tmp_path}\..*wnids.txt, train/.*cs231n.stanford.edu/tiny-imagenet-200.zip"
    with pytest.raises(FileNotFoundError, match=message):
        TinyImageNetDataModule(tmp_path).setup("fit")


def test_tiny_imagenet_annotation_without_image(tiny: Path) -> None:
    (tiny / "tiny-imagenet-200/val/images/val_1.JPEG").unlink()
    with pytest.raises(FileNotFoundError, match=r"val_1.JPEG: no such image, but .*val_annotations.txt names it"):
        TinyImageNetDataModule(tiny).setup("test")


def test_tiny_imagenet_unreadable_annotations(tiny: Path) -> None:
    annotations = tiny / "tiny-imagenet-200/val/val_annotations.txt"
    annotations.write_text("val_0.JPEG\tn01\t0\nval_1.JPEG n02\n")
    with pytest.raises(ValueError, match=r"val_annotations.txt, line 2: expected file, tab.*'val_1.JPEG n02'"):
        TinyImageNetDataModule(tiny).setup("test")
    annotations.write_text("val_0.JPEG\tn77\n")
    with pytest.raises(ValueError, match="no image of the 3 classes"):
        TinyImageNetDataModule(tiny).setup("test")


def test_tiny_imagenet_lists_may_begin_with_a_mark_and_end_in_blank_lines(tiny: Path) -> None:
    tree = tiny / "tiny-imagenet-200"
    expected = everything(TinyImageNetDataModule(tiny).test_dataloader())
    names = TinyImageNetDataModule(tiny).class_names
    for name in ("val/val_annotations.txt", "wnids.txt", "words.txt"):
        (tree / name).write_text("\ufeff" + (tree / name).read_text() + "\n \n", encoding="utf-8")
    module = TinyImageNetDataModule(tiny)
    assert [part.tolist() for part in everything(module.test_dataloader())] == [part.tolist() for part in expected]
    assert (module.num_classes, module.class_names) == (3, names)


def test_tiny_imagenet_lists_may_have_the_line_ends_of_windows(tiny: Path) -> None:
    tree = tiny / "tiny-imagenet-200"
    names = TinyImageNetDataModule(tiny).class_names
    for name in ("val/val_annotations.txt", "wnids.txt", "words.txt"):
        (tree / name).write_bytes((tree / name).read_bytes().replace(b"\n", b"\r\n"))
    annotations = tree / "val/val_annotations.txt"
    annotations.write_bytes(b"val_0.JPEG\tn02\r\nval_1.JPEG\tn01\r\n")  # no boxes: the class id ends the line
    module = TinyImageNetDataModule(tiny)
    assert everything(module.test_dataloader())[1].tolist() == [1, 0]
    assert module.class_names == names


def test_tiny_imagenet_annotated_link_that_leads_nowhere(tiny: Path) -> None:
    image = tiny / "tiny-imagenet-200/val/images/val_1.JPEG"
    image.unlink()
    image.symlink_to(tiny / "lost.JPEG")
    with pytest.raises(FileNotFoundError, match=r"val_1.JPEG: no such image.*: it is a link to .*lost.JPEG"):
        TinyImageNetDataModule(tiny).setup("test")


@pytest.mark.parametrize(
    ("content", "message"), [(b"n1 n2 n1", "lists the class n1 twice"), (b"\xff\xfen\x001\x00", "not UTF-8 text")]
)
def test_tiny_imagenet_faulty_class_list(tiny: Path, content: bytes, message: str) -> None:
    (tiny / "tiny-imagenet-200/wnids.txt").write_bytes(content)
    with pytest.raises(ValueError, match=rf"wnids.txt: {message}"):
        TinyImageNetDataModule(tiny)


def test_tiny_imagenet_empty_class_list(tiny: Path) -> None:
    (tiny / "tiny-imagenet-200/wnids.txt").write_text("\n")
    with pytest.raises(ValueError, match=r"wnids.txt: lists no class"):
        TinyImageNetDataModule(tiny)


# ------------------------------------------------------------------------------------------ ImageNet-100


def test_imagenet_streams_through_workers(imagenet: Path) -> None:
    module = ImageNet100DataModule(imagenet, batch_size=4, val_size=3, num_workers=1, image_size=56, num_classes=3)
    module.setup()
    loader = module.train_dataloader()
    (images, labels), *rest = loader
    assert (images.shape, images.dtype, labels.dtype, len(rest)) == (
        (4, 3, 56, 56),
        torch.float32,
        torch.int64,
        1,
    )
    assert not labels.equal(next(iter(loader))[1]) or not images.equal(next(iter(loader))[0])
    del loader
    plain = v2.Compose(
        [
            v2.Resize(64),
            v2.CenterCrop(56),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    reference = decode(list_images(imagenet / "val", ["n01", "n02", "n03"]), 80)
    evaluated, targets = everything(module.test_dataloader())
    assert evaluated.equal(torch.stack([plain(image) for image in reference]))
    assert targets.tolist() == [0, 1, 2]
    probe, targets = everything(module.probe_dataloader())
    assert probe.shape == (9, 3, 56, 56)
    assert targets.tolist() == [0, 1, 2] * 3


def test_workers_are_sent_images_and_transforms_only(imagenet: Path) -> None:
    module = ImageNet100DataModule(imagenet, batch_size=4, val_size=3, num_workers=1, num_classes=3)
    for loader in (module.train_dataloader(), module.val_dataloader(), module.probe_dataloader()):
        assert b"DataModule" not in pickle.dumps(loader.dataset)


def test_imagenet_class_list_selects(imagenet: Path) -> None:
    listed = imagenet / "classes.txt"
    listed.write_text("n03\nn01\n\n")
    module = ImageNet100DataModule(
        imagenet, batch_size=2, val_size=0.25, num_workers=0, num_classes=2, class_list=listed, augment=False
    )
    assert module.class_names == ["n01", "n03"]
    assert len(everything(module.val_dataloader())[1]) == 2
    with pytest.raises(ValueError, match=r"classes.txt: 2 classes, expected num_classes=100"):
        ImageNet100DataModule(imagenet, class_list=listed).setup("fit")
    listed.write_text("n03 n07")
    with pytest.raises(FileNotFoundError, match="train/n07: no such folder, but class 'n07' needs one"):
        ImageNet100DataModule(imagenet, num_classes=2, class_list=listed).setup("fit")


def test_imagenet_missing_or_larger(imagenet: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"train: 3 classes, expected num_classes=100.*class_list"):
        ImageNet100DataModule(imagenet).setup("fit")
    with pytest.raises(FileNotFoundError, match=r"nowhere\. Expected train/, val/ in .*imagenet100.*image-net.org"):
        ImageNet100DataModule(tmp_path / "nowhere").setup("fit")
    with pytest.raises(ValueError, match="num_workers=-1"):
        ImageNet100DataModule(num_workers=-1)


# -------------------------------------------------------------------------------------- real CIFAR-100


def test_real_cifar100_class_folders() -> None:
    root = Path(os.environ.get("CHANAXES_DATA", Path(tempfile.gettempdir()) / "chanaxes-data"))
    if not (root / "cifar100" / "test").is_dir():
        pytest.skip(f"no CIFAR-100 class folders in {root}; set CHANAXES_DATA to the folder that holds cifar100/")
    classes = list_classes(root / "cifar100" / "test")
    assert len(classes) == CIFAR100DataModule.num_classes
    images = load(list_images(root / "cifar100" / "test", classes[:20]), 32)
    assert torch.bincount(images.labels).tolist() == [100] * 20
    module = CIFAR100DataModule(root)
    pixels = module.evaluation_transform(images.images)
    assert pixels.mean().abs() < 0.2  # a fifth of the classes, so only about normalised
    assert abs(pixels.std() - 1) < 0.1
