"""Backbones against torchvision and closed forms; the classifier's schedules, metrics and checkpoints."""

import math
from typing import get_args

import lightning as L
import pytest
import torch
import torchvision
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.flop_counter import FlopCounterMode

from chanaxes_pl.models import BACKBONES, Classifier, build_backbone, cosine_factor
from chanaxes_pl.models.backbones import Backbone
from chanaxes_pl.models.classifier import RECIPE

QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
]


def build_on_meta(*args, **kwargs) -> nn.Module:
    with torch.device("meta"):
        return build_backbone(*args, **kwargs).eval()


def macs(name: str, image_size: int) -> int:
    """One multiply–accumulate is two of the counter's operations."""
    network = build_on_meta(name, 100, image_size=image_size)
    with FlopCounterMode(display=False) as counter:
        network(torch.empty(1, 3, image_size, image_size, device="meta"))
    return counter.get_total_flops() // 2


def last_map(name: str, image_size: int) -> tuple[int, int]:
    """Side and channels of the last map before it is pooled."""
    network = build_on_meta(name, 10, image_size=image_size)
    part = "layer4" if name == "resnet18" else "features"
    shapes = []
    network.get_submodule(part).register_forward_hook(lambda module, args, out: shapes.append(out.shape))
    network(torch.empty(1, 3, image_size, image_size, device="meta"))
    return shapes[0][2], shapes[0][1]


def batches(classes: int = 10, images: int = 32, batch_size: int = 8) -> DataLoader:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(images, 3, 32, 32, generator=generator)
    labels = torch.randint(0, classes, (images,), generator=generator)
    return DataLoader(TensorDataset(pixels, labels), batch_size=batch_size)


class Record(L.Callback):
    """The optimiser, and its learning rate at each step."""

    def __init__(self):
        self.rates = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        (self.optimizer,) = trainer.optimizers
        self.rates.append(self.optimizer.param_groups[0]["lr"])


@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize("image_size", [32, 64, 96])
@pytest.mark.parametrize("width", [0.001, 0.25, 1.0, 1.5])
def test_logits_for_every_stem_and_width(name, image_size, width):
    network = build_on_meta(name, 7, width, image_size)
    assert network(torch.empty(2, 3, image_size, image_size, device="meta")).shape == (2, 7)
    assert all(parameter.numel() > 0 for parameter in network.parameters())


@pytest.mark.parametrize("name", BACKBONES)
def test_full_width_and_large_images_give_torchvisions_network(name):
    torch.manual_seed(0)
    expected = getattr(torchvision.models, name)(num_classes=5).state_dict()
    torch.manual_seed(0)
    state = build_backbone(name, 5, width=1.0, image_size=224).state_dict()
    assert list(state) == list(expected)
    assert all(torch.equal(state[key], expected[key]) for key in expected)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "convnext_tiny"])
@pytest.mark.parametrize(("width", "image_size"), [(0.25, 32), (0.5, 64), (2.0, 224)])
def test_names_are_torchvisions_at_any_width(name, width, image_size):
    with torch.device("meta"):
        expected = getattr(torchvision.models, name)()
    assert list(build_on_meta(name, 10, width, image_size).state_dict()) == list(expected.state_dict())


def test_small_vgg_has_one_linear_after_global_pooling():
    network = build_on_meta("vgg16_bn", 100, image_size=64)
    assert network.avgpool.output_size == 1
    assert [(m.in_features, m.out_features) for m in network.modules() if isinstance(m, nn.Linear)] == [(512, 100)]


@pytest.mark.parametrize(("name", "width"), [("resnet18", 0.5), ("vgg16_bn", 0.5), ("vgg16_bn", 1.0)])
def test_replaced_layers_are_initialised_like_torchvisions(name, width):
    torch.manual_seed(0)
    network = build_backbone(name, 100, width)
    stem = next(m for m in network.modules() if isinstance(m, nn.Conv2d))
    assert stem.weight.std().item() == pytest.approx(math.sqrt(2 / (stem.out_channels * 9)), rel=0.1)
    assert all(not parameter.is_meta for parameter in network.parameters())
    if name == "vgg16_bn":
        assert network.classifier[0].weight.std().item() == pytest.approx(0.01, rel=0.05)
        assert not network.classifier[0].bias.any()


@pytest.mark.parametrize(
    ("name", "image_size", "expected"),
    [
        ("resnet18", 32, 555_468_800),
        ("resnet18", 64, 555_468_800),
        ("vgg16_bn", 32, 313_247_744),
        ("mobilenet_v2", 32, 88_091_648),
        ("mobilenet_v2", 64, 88_091_648),
    ],
)
def test_macs(name, image_size, expected):
    assert macs(name, image_size) == expected


@pytest.mark.parametrize(
    ("name", "image_size", "expected"),
    [
        ("resnet18", 32, (4, 512)),
        ("resnet18", 64, (4, 512)),
        ("resnet18", 224, (7, 512)),
        ("vgg16_bn", 64, (2, 512)),
        ("mobilenet_v2", 32, (4, 1280)),
        ("mobilenet_v2", 64, (4, 1280)),
        ("convnext_tiny", 64, (2, 768)),
    ],
)
def test_last_map(name, image_size, expected):
    assert last_map(name, image_size) == expected


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"name": "resnet81"}, r"unknown backbone 'resnet81'; expected one of resnet18, vgg16_bn, mobilenet"),
        ({"num_classes": 1}, r"num_classes=1: expected at least 2"),
        ({"width": 0.0}, r"width=0.0: expected a positive number"),
        ({"width": math.nan}, r"width=nan"),
        ({"width": math.inf}, r"width=inf"),
        ({"image_size": 0}, r"image_size=0: expected at least 1"),
        ({"name": "vgg16_bn", "image_size": 28}, r"vgg16_bn at image_size=28: .* needs at least 32"),
        ({"name": "convnext_tiny", "image_size": 16}, r"convnext_tiny at image_size=16"),
    ],
)
def test_build_backbone_quotes_what_is_wrong(arguments, match):
    with pytest.raises(ValueError, match=match):
        build_backbone(**{"name": "resnet18", "num_classes": 10, **arguments})


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"backbone": "resnet"}, r"unknown backbone 'resnet'"),
        ({"optimizer": "adam"}, r"unknown optimizer 'adam'; expected 'sgd' or 'adamw'"),
        ({"schedule": "step"}, r"unknown schedule 'step'; expected 'cosine' or 'one_cycle'"),
        ({"warmup_epochs": -1}, r"warmup_epochs=-1 with schedule='cosine'"),
        ({"warmup_epochs": 2, "schedule": "one_cycle"}, r"warmup_epochs=2 with schedule='one_cycle'"),
        ({"width": 0.1, "channels_last": True}, r"channels_last=True: layer2.0.downsample.0 has 6 input"),
    ],
)
def test_classifier_quotes_what_is_wrong(arguments, match):
    with pytest.raises(ValueError, match=match):
        Classifier(**{"backbone": "resnet18", "num_classes": 10, **arguments})


def fit_and_record(tmp_path, loader, max_epochs=3, accumulate=1, **arguments):
    classifier = Classifier("resnet18", 10, width=0.05, lr=0.2, **arguments)
    record = Record()
    trainer = L.Trainer(
        max_epochs=max_epochs,
        accumulate_grad_batches=accumulate,
        callbacks=[record],
        default_root_dir=tmp_path,
        enable_checkpointing=False,
        **QUIET,
    )
    trainer.fit(classifier, loader)
    return record


@pytest.mark.parametrize("warmup_epochs", [0, 0.5, 1])
def test_cosine_follows_the_closed_form(tmp_path, warmup_epochs):
    rates = fit_and_record(tmp_path, batches(), warmup_epochs=warmup_epochs).rates
    warmup, total = int(4 * warmup_epochs), 12
    expected = [0.2 * (t + 1) / warmup for t in range(warmup)] + [
        0.1 * (1 + math.cos(math.pi * t / (total - warmup))) for t in range(total - warmup)
    ]
    assert rates == pytest.approx(expected)


def test_schedule_counts_optimiser_steps_not_batches(tmp_path):
    rates = fit_and_record(tmp_path, batches(), max_epochs=2, accumulate=2, warmup_epochs=1).rates
    assert rates[::2] == pytest.approx([0.1, 0.2, 0.2, 0.1])
    assert rates[1::2] == rates[::2]


def test_one_cycle_rises_then_falls(tmp_path):
    rates = fit_and_record(tmp_path, batches(images=80), max_epochs=2, schedule="one_cycle").rates
    assert len(rates) == 20
    assert rates[0] == pytest.approx(0.2 / 25)
    assert max(rates) == rates[5] == pytest.approx(0.2)  # 30 % of the 20 steps, counted from 0
    assert rates[-1] < 1e-5


def test_an_endless_run_has_no_schedule(tmp_path):
    with pytest.raises(ValueError, match="schedule='cosine' needs the length of the run"):
        fit_and_record(tmp_path, batches(), max_epochs=-1)


def test_cosine_is_bounded_where_the_warm_up_outlasts_the_run():
    assert [cosine_factor(step, total=2, warmup=4) for step in range(3)] == [0.25, 0.5, 0.75]


def test_the_recipe_is_that_of_a_classifier_with_its_defaults():
    hyperparameters = Classifier("resnet18", 10, width=0.05).hparams
    assert {name: hyperparameters[name] for name in RECIPE} == RECIPE


def test_every_backbone_can_be_chosen():
    assert list(get_args(Backbone)) == list(BACKBONES)


def test_optimizers_take_their_arguments(tmp_path):
    sgd = fit_and_record(tmp_path, batches(), momentum=0.8, nesterov=True, weight_decay=0.01).optimizer
    assert isinstance(sgd, torch.optim.SGD)
    assert {key: sgd.defaults[key] for key in ("lr", "momentum", "nesterov", "weight_decay")} == {
        "lr": 0.2,
        "momentum": 0.8,
        "nesterov": True,
        "weight_decay": 0.01,
    }
    adamw = fit_and_record(tmp_path, batches(), optimizer="adamw", weight_decay=0.05).optimizer
    assert isinstance(adamw, torch.optim.AdamW)
    assert adamw.defaults["weight_decay"] == 0.05


@pytest.mark.parametrize(("classes", "names"), [(10, {"loss", "top1", "top5"}), (5, {"loss", "top1"})])
def test_evaluation_matches_counting(tmp_path, classes, names):
    classifier = Classifier("resnet18", classes, width=0.1)
    loader = batches(classes, images=40, batch_size=16)
    trainer = L.Trainer(default_root_dir=tmp_path, enable_checkpointing=False, **QUIET)
    (logged,) = trainer.test(classifier, loader, verbose=False)
    images, labels = loader.dataset.tensors
    with torch.no_grad():
        logits = classifier.eval()(images)
    ranked = logits.argsort(dim=1, descending=True)
    expected = {
        "test/loss": nn.functional.cross_entropy(logits, labels).item(),
        "test/top1": (ranked[:, 0] == labels).float().mean().item(),
        "test/top5": (ranked[:, :5] == labels[:, None]).any(dim=1).float().mean().item(),
    }
    assert logged == pytest.approx({f"test/{name}": expected[f"test/{name}"] for name in names}, rel=1e-5)


def test_top5_survives_a_first_batch_in_which_it_equals_top1():
    accuracy = Classifier("resnet18", 10, width=0.05).val_accuracy
    logits = 10 * torch.eye(10) - torch.arange(10)  # class i first in row i, then 0, 1, 2, …
    accuracy.update(logits, torch.arange(10))  # all right, so both states are equal
    accuracy.update(logits, torch.zeros(10, dtype=torch.long))
    assert accuracy.compute() == {"val/top1": pytest.approx(11 / 20), "val/top5": 1}


def test_channels_last_gives_the_same_logits():
    torch.manual_seed(0)
    plain = Classifier("resnet18", 10, width=0.25).eval()
    torch.manual_seed(0)
    fast = Classifier("resnet18", 10, width=0.25, channels_last=True).eval()
    assert fast.network.conv1.weight.is_contiguous(memory_format=torch.channels_last)
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(fast(images), plain(images))


@pytest.mark.parametrize("schedule", ["cosine", "one_cycle"])
def test_resumed_run_equals_unbroken_run(tmp_path, schedule):
    def trainer(**arguments):
        return L.Trainer(max_epochs=2, default_root_dir=tmp_path, **QUIET, **arguments)

    def classifier():
        torch.manual_seed(0)
        return Classifier("resnet18", 10, width=0.125, schedule=schedule, channels_last=True)

    class SaveFirstEpoch(L.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            if trainer.current_epoch == 0:
                trainer.save_checkpoint(tmp_path / "first.ckpt")

    unbroken = classifier()
    trainer(callbacks=[SaveFirstEpoch()], enable_checkpointing=False).fit(unbroken, batches())
    resumed = Classifier.load_from_checkpoint(tmp_path / "first.ckpt", weights_only=True)
    assert resumed.hparams == unbroken.hparams
    trainer(enable_checkpointing=False).fit(resumed, batches(), ckpt_path=tmp_path / "first.ckpt", weights_only=True)
    for key, value in unbroken.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[key], value, rtol=0, atol=0, msg=key)


def test_a_run_of_one_cycle_is_not_prolonged(tmp_path):
    def fit(epochs, **path):
        trainer = L.Trainer(max_epochs=epochs, default_root_dir=tmp_path, enable_checkpointing=False, **QUIET)
        trainer.fit(Classifier("resnet18", 10, width=0.05, schedule="one_cycle"), batches(), **path, weights_only=True)
        return trainer

    fit(1).save_checkpoint(tmp_path / "done.ckpt")
    steps = len(batches())
    with pytest.raises(ValueError, match=f"begun for {steps} steps of one cycle and is now to take {2 * steps}: expec"):
        fit(2, ckpt_path=tmp_path / "done.ckpt")
