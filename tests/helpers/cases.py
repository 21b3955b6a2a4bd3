"""Cases that a formula has to survive: small models with a probe each, and what their layers put out."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from chanaxes_pl.core.targets import Target
from chanaxes_pl.network.batches import default_step
from chanaxes_pl.network.hooks import observed
from chanaxes_pl.network.layers import LayerSpec, select_layers
from chanaxes_pl.network.probe import Probe
from chanaxes_pl.network.recording import LayerMoments, Recorder
from chanaxes_pl.tables import COLUMNS, HALVES, SPLIT_HALF, WITH_NULL

CLASSES = 4
BATCH = 16


class Apply(nn.Module):
    """A function without parameters, as a module."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def head(channels: int) -> list[nn.Module]:
    """From a map of any dimensions to logits."""
    return [nn.ReLU(), Apply(lambda x: x.flatten(2).mean(2)), nn.Linear(channels, CLASSES)]


def images_2d(n: int = 60, channels: int = 3, side: int = 6) -> Tensor:
    """Images with smooth and class-dependent parts, so that channels and target correlate."""
    generator = torch.Generator().manual_seed(5)
    base = torch.randn(n, channels, side, side, generator=generator)
    tone = torch.randn(n, channels, 1, 1, generator=generator)
    return base + tone + 0.4 * (labels_of(n) - 1.5)[:, None, None, None]


def labels_of(n: int) -> Tensor:
    return torch.arange(n) * 7 % CLASSES


def plain() -> tuple[nn.Module, Tensor]:
    return nn.Sequential(nn.Conv2d(3, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 9, 3), *head(9)), images_2d()


def mean_1e4() -> tuple[nn.Module, Tensor]:
    layer = nn.Conv2d(3, 8, 3)
    nn.init.constant_(layer.bias, 1e4)
    return nn.Sequential(layer, Apply(lambda x: x - 1e4), *head(8)), images_2d()


def scale_1e6th() -> tuple[nn.Module, Tensor]:
    layer = nn.Conv2d(3, 8, 3)
    layer.weight.data *= 1e-6
    layer.bias.data *= 1e-6
    return nn.Sequential(layer, Apply(lambda x: x * 1e6), *head(8)), images_2d()


def one_channel() -> tuple[nn.Module, Tensor]:
    return nn.Sequential(nn.Conv2d(3, 1, 3), *head(1)), images_2d()


def one_tiny_channel() -> tuple[nn.Module, Tensor]:
    layer = nn.Conv2d(3, 1, 3)
    layer.weight.data *= 1e-8
    layer.bias.data *= 1e-8
    return nn.Sequential(layer, Apply(lambda x: x * 1e8), *head(1)), images_2d()


def dead_channels() -> tuple[nn.Module, Tensor]:
    layer = nn.Conv2d(3, 10, 3)
    layer.weight.data[[1, 4]] = 0.0
    layer.bias.data[4] = 0.1
    layer.bias.data[6] = torch.nan
    layer.bias.data[7] = torch.inf
    return nn.Sequential(layer, Apply(lambda x: x.nan_to_num(0.0, 0.0, 0.0)), *head(10)), images_2d()


def duplicated_channels() -> tuple[nn.Module, Tensor]:
    layer = nn.Conv2d(3, 8, 3)
    layer.weight.data[3], layer.bias.data[3] = layer.weight.data[0], layer.bias.data[0]
    layer.weight.data[5], layer.bias.data[5] = -2 * layer.weight.data[1], 3.0
    return nn.Sequential(layer, *head(8)), images_2d()


def depthwise() -> tuple[nn.Module, Tensor]:
    return nn.Sequential(nn.Conv2d(6, 6, 3, groups=6), nn.BatchNorm2d(6), *head(6)), images_2d(channels=6)


def grouped() -> tuple[nn.Module, Tensor]:
    return nn.Sequential(nn.Conv2d(6, 8, 3, groups=2, stride=2, bias=False), *head(8)), images_2d(channels=6)


def linear() -> tuple[nn.Module, Tensor]:
    return nn.Sequential(nn.Flatten(), nn.Linear(108, 12), nn.ReLU(), nn.Linear(12, CLASSES)), images_2d()


def linear_channels_last() -> tuple[nn.Module, Tensor]:
    mixer = [Apply(lambda x: x.movedim(1, -1)), nn.Linear(3, 11), nn.ReLU(), nn.Linear(11, 7)]
    return nn.Sequential(*mixer, Apply(lambda x: x.mean((1, 2))), nn.Linear(7, CLASSES)), images_2d()


def maps_1x1() -> tuple[nn.Module, Tensor]:
    return nn.Sequential(nn.Conv2d(3, 8, 6), *head(8)), images_2d()


def widening_1x1() -> tuple[nn.Module, Tensor]:
    return (
        nn.Sequential(nn.Conv2d(3, 6, 1), nn.ReLU(), nn.Conv2d(6, 9, 1, bias=False), nn.Conv2d(9, 5, 1), *head(5)),
        images_2d(),
    )


def widening_dead_channels() -> tuple[nn.Module, Tensor]:
    layer = nn.Conv2d(3, 8, 1)
    layer.weight.data[2], layer.bias.data[2] = 0.0, 0.1
    layer.bias.data[5] = torch.nan
    layer.weight.data[6, 1] = torch.inf
    return nn.Sequential(layer, Apply(lambda x: x.nan_to_num(0.0, 0.0, 0.0)), *head(8)), images_2d()


def conv_1d() -> tuple[nn.Module, Tensor]:
    return nn.Sequential(nn.Conv1d(3, 7, 3), nn.ReLU(), nn.Conv1d(7, 8, 1), *head(8)), images_2d().flatten(2)


def conv_3d() -> tuple[nn.Module, Tensor]:
    return nn.Sequential(nn.Conv3d(1, 7, 2), *head(7)), images_2d()[:, None]


def channels_last() -> tuple[nn.Module, Tensor]:
    model, images = plain()
    return model.to(memory_format=torch.channels_last), images.to(memory_format=torch.channels_last)


def more_channels_than_samples() -> tuple[nn.Module, Tensor]:
    return nn.Sequential(nn.Conv2d(3, 64, 6), *head(64)), images_2d(40)


ZOO: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "plain": plain,
    "mean 1e4": mean_1e4,
    "scale 1e-6": scale_1e6th,
    "one channel": one_channel,
    "one tiny channel": one_tiny_channel,
    "dead channels": dead_channels,
    "duplicated channels": duplicated_channels,
    "depthwise": depthwise,
    "grouped": grouped,
    "linear": linear,
    "linear on [B, H, W, C]": linear_channels_last,
    "1×1 maps": maps_1x1,
    "widening 1×1": widening_1x1,
    "dead channels of a widening 1×1": widening_dead_channels,
    "Conv1d": conv_1d,
    "Conv3d": conv_3d,
    "channels_last": channels_last,
    "more channels than samples": more_channels_than_samples,
}


def case(name: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, DataLoader]:
    """A case's model with fixed weights, and its probe."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model, images = ZOO[name]()
    return model.to(dtype), loader_of(images.to(dtype))


def loader_of(images: Tensor, batch: int = BATCH, **options) -> DataLoader:
    return DataLoader(TensorDataset(images, labels_of(len(images))), batch_size=batch, **options)


def captured(model: nn.Module, loader: DataLoader, layers: LayerSpec = "conv+linear"):
    """``{layer: [N, C, P]}`` outputs, ``[N, K]`` logits and ``[N]`` labels, by hooks of the tests' own."""
    seen: dict[str, list[np.ndarray]] = {}

    def keep(name: str, module: nn.Module, output: Tensor) -> None:
        if isinstance(module, nn.Linear):
            output = output[..., None] if output.ndim == 2 else output.movedim(-1, 1)
        seen.setdefault(name, []).append(output.flatten(2).numpy().copy())

    handles = [
        module.register_forward_hook(lambda module, _, output, name=name: keep(name, module, output))
        for name, module in select_layers(model, layers).items()
    ]
    was_training = model.training
    with torch.no_grad():
        results = [(model.eval()(images), labels) for images, labels in loader]
    model.train(was_training)
    for handle in handles:
        handle.remove()
    logits, labels = (torch.cat(parts).numpy() for parts in zip(*results, strict=True))
    return {name: np.concatenate(parts) for name, parts in seen.items()}, logits, labels


def recorded(
    model: nn.Module,
    loader: DataLoader,
    rank: int = 0,
    world: int = 1,
    positions: int | str = 5,
    target: str = "logit_margin",
    halves: bool = True,
    alignment: bool = False,
) -> dict[str, LayerMoments]:
    """What one of ``world`` processes would hold after its share of the probe."""
    layers, function = select_layers(model, "conv+linear"), Target(target)
    recorder = Recorder(layers, function, positions, halves, alignment)
    with observed(model), recorder.attached():
        for indices, batch in Probe(loader).batches(rank, world):
            recorder.record(indices, lambda batch=batch: default_step(model, batch))
    return dict(recorder.moments())


def synthetic_layer(seed: int, channels: int, layer: str = "a", noise: float = 0.0, coupling: float = 0.5):
    """Columns of a table of one layer, with halves that differ from the whole by ``noise``."""
    rng = np.random.default_rng(seed)
    shared = rng.normal(size=channels)
    columns: dict = {"layer": layer, "channel": np.arange(channels)}
    for name in COLUMNS:
        columns[name] = coupling * shared + (1 - coupling) * rng.normal(size=channels)
    columns |= {"dead": np.zeros(channels, bool), "at_ceiling": np.zeros(channels, bool)}
    for name in SPLIT_HALF:
        for half in HALVES:
            columns[f"{name}_{half}"] = columns[name] + noise * rng.normal(size=channels)
    columns |= {f"{name}_null": rng.normal(size=channels) for name in WITH_NULL}
    return columns | {"reason": ""}
