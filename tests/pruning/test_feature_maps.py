"""HRank and CHIP against their definitions, on the maps that the layers behind them read."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from chanaxes_pl.pruning.feature_maps import MAP_IMAGES, channel_independence, map_ranks, map_scores
from chanaxes_pl.units.groups import find_units
from tests.helpers import cases as zoo
from tests.pruning.test_scores import grouped, residual, scored


def slow_independence(rows: Tensor) -> Tensor:
    """CHIP's definition: nuclear norm less the nuclear norm with each row zeroed in turn."""
    whole = torch.linalg.svdvals(rows).sum()
    masked = [rows * (torch.arange(len(rows)) != i)[:, None] for i in range(len(rows))]
    return torch.stack([whole - torch.linalg.svdvals(rest).sum() for rest in masked])


def awkward_maps(channels: int, height: int, width: int) -> Tensor:
    """Rectified maps of two images with an empty, a faint, a huge and two equal channels."""
    maps = torch.randn(2, channels, height, width, generator=torch.Generator().manual_seed(channels)).relu().double()
    if channels > 4:
        maps[0, 1], maps[0, 2], maps[1, 3] = 0.0, 1e-6 * maps[0, 2], maps[1, 4]
        maps[1, 0] *= 1e6
    return maps


@pytest.mark.parametrize("shape", [(5, 4, 4), (40, 3, 3), (16, 4, 4), (17, 4, 4), (1, 3, 2), (6, 1, 1), (9, 1, 9)])
def test_channel_independence_is_the_loss_of_nuclear_norm(shape):
    maps = awkward_maps(*shape)
    slow = torch.stack([slow_independence(image.flatten(1)) for image in maps])
    scale = torch.stack([torch.linalg.matrix_norm(image.flatten(1), 2) for image in maps])[:, None]
    torch.testing.assert_close(channel_independence(maps) / scale, slow / scale, rtol=1e-9, atol=1e-7)


def test_empty_maps_have_no_independence_and_rank_0():
    maps = torch.zeros(1, 3, 2, 2)
    assert channel_independence(maps).tolist() == map_ranks(maps).tolist() == [[0.0, 0.0, 0.0]]


def test_ranks_of_maps():
    maps = awkward_maps(6, 4, 3)
    expected = [[np.linalg.matrix_rank(channel.numpy()) for channel in image] for image in maps]
    assert map_ranks(maps).tolist() == expected
    assert map_ranks(maps.bfloat16()).shape == (2, 6)


def read_by(model: nn.Module, layer: str, loader: DataLoader, images: int) -> Tensor:
    """A layer's input on the first images."""
    seen: list[Tensor] = []
    handle = model.get_submodule(layer).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].clone()))
    with torch.no_grad():
        model.eval()(torch.cat([batch for batch, _ in loader])[:images])
    handle.remove()
    return seen[0]


def test_hrank_and_chip_look_at_what_the_first_reader_of_the_largest_map_reads():
    case = model, loader, units = residual()
    values = scored(case, "hrank", "chip")
    group = units.groups["stem"]
    assert set(group.producers) == {"stem", "outer", "depthwise"}  # a unit has one value, whichever layer makes it
    assert set(group.consumers) == {"inner", "head"}
    maps = read_by(model, "inner", loader, 40)  # 6 × 6, against 2 × 2 before the head
    assert len(maps) < MAP_IMAGES["hrank"]
    ranks = np.array([[np.linalg.matrix_rank(channel) for channel in image] for image in maps.numpy()]).mean(0)
    chip = torch.stack([slow_independence(image.flatten(1).double()) for image in maps[: MAP_IMAGES["chip"]]]).mean(0)
    for layer in group.producers:
        np.testing.assert_allclose(values["hrank"][layer], ranks, rtol=1e-12)
        torch.testing.assert_close(values["chip"][layer], chip, rtol=1e-6, atol=1e-6)


def test_a_flattened_map_is_put_together_again():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 5, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(45, 4))
    loader = zoo.loader_of(zoo.images_2d(24))
    values = scored((model, loader, find_units(model, zoo.images_2d(2))), "hrank", "chip")
    maps = read_by(model, "3", loader, 24).reshape(24, 5, 3, 3)
    torch.testing.assert_close(values["hrank"]["0"], torch.linalg.matrix_rank(maps).double().mean(0))
    chip = torch.stack([slow_independence(image.flatten(1).double()) for image in maps[:16]]).mean(0)
    torch.testing.assert_close(values["chip"]["0"], chip, rtol=1e-6, atol=1e-6)


def test_a_linear_layer_over_positions_reads_maps_and_over_images_single_numbers():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        mixer = [zoo.Apply(lambda x: x.movedim(1, -1)), nn.Linear(3, 7), nn.ReLU(), nn.Linear(7, 5), nn.ReLU()]
        model = nn.Sequential(*mixer, zoo.Apply(lambda x: x.mean((1, 2))), nn.Linear(5, zoo.CLASSES))
    loader = zoo.loader_of(zoo.images_2d(30))
    values = scored((model, loader, find_units(model, zoo.images_2d(2))), "hrank", "chip")
    maps = read_by(model, "3", loader, 30).movedim(-1, 1)
    torch.testing.assert_close(values["hrank"]["1"], torch.linalg.matrix_rank(maps).double().mean(0))
    numbers = read_by(model, "6", loader, 30)
    torch.testing.assert_close(values["hrank"]["3"], (numbers != 0).double().mean(0))
    chip = torch.stack([slow_independence(image[:, None].double()) for image in numbers[:16]]).mean(0)
    torch.testing.assert_close(values["chip"]["3"], chip, rtol=1e-6, atol=1e-7)


def test_units_of_grouped_convolutions_take_the_mean_over_their_channels():
    case = model, loader, units = grouped()
    group = units.groups["0"]
    assert group.producers["0"].shape == (4, 2)
    values = scored(case, "hrank")["hrank"]["0"]
    ranks = torch.linalg.matrix_rank(read_by(model, "2", loader, 40)).double().mean(0)
    torch.testing.assert_close(values[group.producers["0"]], ranks[group.consumers["2"]].mean(1, True).expand(4, 2))


def test_the_probe_s_first_images_count_whatever_its_batches():
    model, _, units = residual()
    images = zoo.images_2d(40)
    runs = []
    for data in (images, images[:10]):
        for batch in (3, 40):
            pairs = DataLoader(TensorDataset(data, zoo.labels_of(len(data))), batch_size=batch)
            limits = {"hrank": 10, "chip": 7}
            found = map_scores(
                model, units.groups.values(), lambda pairs=pairs: iter(pairs), lambda b: model(b[0]), limits
            )
            runs.append(found["chip"]["stem"])
    for run in runs[1:]:
        torch.testing.assert_close(run, runs[0], rtol=1e-6, atol=1e-7)
