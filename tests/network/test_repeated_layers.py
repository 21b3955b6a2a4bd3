"""Layers that run several times in a forward pass, and layers that cannot be read: against NumPy, never an error."""

from collections.abc import Callable

import lightning.pytorch as L
import numpy as np
import pandas as pd
import pytest
import torch
from numpy.testing import assert_allclose
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from chanaxes_pl import AxisTracker, LesionExperiment, compute_axes, find_units, lesion_table, read_run
from chanaxes_pl.core.targets import Target
from chanaxes_pl.network.batches import default_step
from chanaxes_pl.network.hooks import observed
from chanaxes_pl.network.layers import CONVOLUTIONS
from chanaxes_pl.network.probe import Probe
from chanaxes_pl.network.recording import Recorder
from chanaxes_pl.network.sampling import sample_positions
from chanaxes_pl.tables import ALIGNMENT, COLUMNS
from tests.helpers import cases as zoo
from tests.helpers import reference
from tests.helpers.networks import Net
from tests.helpers.training import QUIET, STEPS, images, trainer

pytestmark = [pytest.mark.filterwarnings(text) for text in QUIET]


def pooled(x: Tensor) -> Tensor:
    return x.flatten(2).mean(2)


def build(function: Callable, **layers: nn.Module) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        for layer in layers.values():
            layer.reset_parameters()
    return Net(function, **layers).double()


def recurrent() -> nn.Module:
    """One convolution three times, each time overwritten by what follows."""

    def forward(net, x):
        x = net.stem(x)
        for _ in range(3):
            x = F.relu(net.shared(x), inplace=True)
        return net.head(pooled(x))

    return build(forward, stem=nn.Conv2d(3, 6, 3), shared=nn.Conv2d(6, 6, 3, padding=1), head=nn.Linear(6, zoo.CLASSES))


def siamese() -> nn.Module:
    """Two views through the same layers, one of which widens pointwise."""

    def forward(net, x):
        views = [pooled(F.relu(net.wide(net.stem(view)))) for view in (x, x.flip(3).tanh())]
        return net.head((views[0] - views[1]).abs())

    return build(forward, stem=nn.Conv2d(3, 5, 3), wide=nn.Conv2d(5, 9, 1), head=nn.Linear(9, zoo.CLASSES))


def pyramid() -> nn.Module:
    """A detection head over three levels of unlike size, and a Linear layer over their positions."""

    def forward(net, x):
        levels = [net.stem(x), F.avg_pool2d(net.stem(x), 2), F.avg_pool2d(x[:, :1], 3).expand(-1, 4, -1, -1)]
        found = [net.mix(F.relu(net.tower(level)).movedim(1, -1)) for level in levels]
        return net.head(sum(f.flatten(1, 2).mean(1) for f in found))

    layers = {"stem": nn.Conv2d(3, 4, 1), "tower": nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2)}
    return build(forward, **layers, mix=nn.Linear(6, 7), head=nn.Linear(7, zoo.CLASSES))


NETS = {"recurrent": (recurrent, {"shared": 3}), "siamese": (siamese, {"stem": 2, "wide": 2})}
NETS["pyramid"] = (pyramid, {"stem": 2, "tower": 3, "mix": 3})


def loader(batch: int = zoo.BATCH, n: int = 60) -> DataLoader:
    return zoo.loader_of(zoo.images_2d(n).double(), batch)


def run_with_hooks(net: nn.Module, data: DataLoader):
    """Every layer's runs, batch by batch: ``{name: [[(input, output), …], …]}``; then logits and labels."""
    seen: dict[str, list[list]] = {}
    logits, labels = [], []
    for pictures, classes in data:
        for runs in seen.values():
            runs.append([])
        handles = []
        for name, layer in net.named_modules():
            if isinstance(layer, (*CONVOLUTIONS, nn.Linear)):
                runs = seen.setdefault(name, [[]])
                handles.append(
                    layer.register_forward_hook(
                        lambda _, args, out, runs=runs: runs[-1].append((args[0].clone(), out.clone()))
                    )
                )
        with torch.no_grad():
            logits.append(net.eval()(pictures))
        labels.append(classes)
        for handle in handles:
            handle.remove()
    return seen, torch.cat(logits).numpy(), torch.cat(labels).numpy()


def outputs(layer: nn.Module, batches: list[list]) -> np.ndarray:
    """``[N, P, C]``, positions of one run after those of the other."""
    rows = []
    for runs in batches:
        flat = [
            out.reshape(len(out), -1, out.shape[-1]) if isinstance(layer, nn.Linear) else out.flatten(2).mT
            for _, out in runs
        ]
        rows.append(np.concatenate([part.numpy() for part in flat], 1))
    return np.concatenate(rows)


def patches(layer: nn.Module, batches: list[list]) -> np.ndarray:
    """``[N, P, groups, F]``, what is read for them."""
    rows = []
    for runs in batches:
        flat = []
        for read, _ in runs:
            if isinstance(layer, nn.Linear):
                flat.append(read.reshape(len(read), -1, 1, read.shape[-1]))
            else:
                columns = F.unfold(read, layer.kernel_size, padding=layer.padding, stride=layer.stride).mT
                flat.append(columns.reshape(*columns.shape[:2], layer.groups, -1))
        rows.append(np.concatenate([part.numpy() for part in flat], 1))
    return np.concatenate(rows)


@pytest.mark.parametrize("positions", [5, "all"])
@pytest.mark.parametrize("name", NETS)
def test_all_runs_give_positions_of_the_same_image(name, positions):
    make, expected_runs = NETS[name]
    net, data = make(), loader()
    seen, logits, labels = run_with_hooks(net, data)
    assert {layer: len(runs[0]) for layer, runs in seen.items() if len(runs[0]) > 1} == expected_runs
    table = compute_axes(net, data, layers="conv+linear", positions=positions).table
    for layer, batches in seen.items():
        found = outputs(net.get_submodule(layer), batches)
        places = None if positions == "all" else sample_positions(np.arange(len(found)), found.shape[1], positions)
        local = found if places is None else np.take_along_axis(found, places.numpy()[:, :, None], 1)
        columns = reference.layer_columns(
            local.reshape(-1, found.shape[2]), found.mean(1), reference.margins(logits, labels)
        )
        rows = table[table["layer"] == layer]
        assert (rows["reason"] == "").all()
        for column, values in columns.items():
            assert_allclose(rows[column], values, 1e-7, 1e-9, err_msg=f"{layer} {column}")


@pytest.mark.parametrize("name", NETS)
def test_alignment_reads_the_patches_of_all_runs(name):
    net, data = NETS[name][0](), loader()
    seen, logits, labels = run_with_hooks(net, data)
    margin = reference.margins(logits, labels)
    table = compute_axes(net, data, layers="conv+linear", positions="all", alignment=True).table
    for layer, batches in seen.items():
        module, rows = net.get_submodule(layer), table[table["layer"] == layer]
        gave, read = outputs(module, batches), patches(module, batches)
        target = np.repeat(margin, gave.shape[1])
        for channel, row in enumerate(rows.itertuples()):
            x = read[:, :, channel * read.shape[2] // gave.shape[2]].reshape(len(target), -1)
            y = gave[:, :, channel].reshape(-1)
            x, y, t = x - x.mean(0), y - y.mean(), target - target.mean()
            sigma_w, cross, power, shared = x.T @ y / len(y), x.T @ t / len(y), y @ y / len(y), y @ t / len(y)
            left = cross - shared / power * sigma_w
            angle = np.sign(shared) * (sigma_w @ left) / np.linalg.norm(sigma_w) / np.linalg.norm(left)
            norms = [np.linalg.norm(vector) for vector in (sigma_w, cross, left)]
            assert_allclose([getattr(row, c) for c in ALIGNMENT], [angle, power, shared, *norms], 1e-6, 1e-9)


def test_sampled_patches_of_all_runs_keep_the_laws():
    """wᵀΣw is the measured power, and wᵀc the measured covariance with the target, whichever positions are sampled."""
    net, data = pyramid(), loader()
    for layer, moments in zoo.recorded(net, data, positions=3, alignment=True).items():
        weights = net.get_submodule(layer).weight.detach().flatten(1)
        local, joint = moments.local[0].merge(moments.local[1]), moments.joint[0].merge(moments.joint[1])
        assert_allclose((weights * moments.patches.outputs).sum(1), local.variance, 1e-7)
        shared = joint.covariance[: moments.channels, moments.channels]
        assert_allclose((weights * moments.patches.target).sum(1), shared, 1e-6, 1e-8)


@pytest.mark.parametrize("name", NETS)
def test_batch_size_does_not_matter(name):
    net, options = NETS[name][0](), {"layers": "conv+linear", "positions": 5, "alignment": True}
    tables = [compute_axes(net, loader(batch), **options).table for batch in (7, 60)]
    pd.testing.assert_frame_equal(*tables, rtol=1e-6, atol=1e-9)


def test_layers_that_run_once_keep_their_bits_and_are_not_copied(monkeypatch):
    """Beside a layer that runs several times, and without one."""
    net, data = recurrent(), loader()
    alone = compute_axes(net, data, layers=["stem", "head"]).table
    calls = []
    plain = Tensor.clone
    monkeypatch.setattr(
        Tensor, "clone", lambda self, *a, **k: (calls.append(tuple(self.shape)), plain(self, *a, **k))[1]
    )
    table = compute_axes(net, data, layers="conv+linear").table
    assert table[table["layer"] != "shared"].reset_index(drop=True).equals(alone)
    # Of images, copies are given to the network; and its weights are copied.
    maps = [shape for shape in calls if len(shape) == 4 and shape[1] == 6 and shape[0] > 6]
    assert maps == 3 * [(16, 6, 4, 4)] * 3 + 3 * [(12, 6, 4, 4)]  # three runs, four batches; none in the first pass


class Counted(nn.Module):
    """Runs a layer as often as is said, batch by batch."""

    def __init__(self, counts: list[int]) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.shared, self.head = nn.Conv2d(3, 3, 1), nn.Linear(3, zoo.CLASSES)
        self.counts = counts
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        batch = int((zoo.images_2d().double()[:: zoo.BATCH] == x[0]).flatten(1).all(1).nonzero()[0])
        for _ in range(self.counts[batch]):
            x = self.shared(x)
        return self.head(pooled(x))


def test_counts_that_vary_are_right_where_the_first_batch_shows_several():
    net, data = Counted([2, 1, 3, 2]), loader()
    seen, logits, labels = run_with_hooks(net, data)
    table = compute_axes(net, data, layers=["shared"], positions="all").table
    per_batch = [np.concatenate([out.flatten(2).mT.numpy() for _, out in runs], 1) for runs in seen["shared"]]
    local = np.concatenate([batch.reshape(-1, 3) for batch in per_batch])
    means = np.concatenate([batch.mean(1) for batch in per_batch])
    expected = reference.layer_columns(local, means, reference.margins(logits, labels))
    for column, values in expected.items():
        assert_allclose(table[column], values, 1e-7, err_msg=column)


@pytest.mark.parametrize(
    ("counts", "reason"),
    [
        ([1, 1, 2, 1], "it ran once on the first images and several times in a forward pass on later ones"),
        ([1, 0, 1, 1], "the forward pass reached this layer for 44 of 60 images only"),
        ([2, 0, 2, 2], "the forward pass reached this layer for 44 of 60 images only"),
        ([0, 0, 0, 0], "the forward pass did not reach this layer"),
    ],
)
@pytest.mark.parametrize("alignment", [False, True])
def test_counts_that_cannot_be_measured_are_left_out_with_the_reason(counts, reason, alignment):
    table = compute_axes(Counted(counts), loader(), layers=["shared", "head"], alignment=alignment).table
    shared, head = (table[table["layer"] == name] for name in ("shared", "head"))
    assert set(shared["reason"]) == {reason}
    assert shared[list(COLUMNS)].isna().all(axis=None)
    assert np.isfinite(head["input_capture"]).all()


# --- layers that cannot be read -------------------------------------------------------------------------------------


def folding() -> nn.Module:
    """Positions in the first dimension, as windows and proposals have them."""
    fold = zoo.Apply(lambda x: x.movedim(1, -1).flatten(0, 2))
    unfold = zoo.Apply(lambda x: x.unflatten(0, (-1, 36)).mean(1))
    return nn.Sequential(fold, nn.Linear(3, 2), unfold, nn.Linear(2, zoo.CLASSES)).double()


def unlike() -> nn.Module:
    """One layer on all images and then on half of them."""

    def forward(net, x):
        return net.head(pooled(net.shared(x)) + pooled(net.shared(x[: len(x) // 2])).mean(0))

    return build(forward, shared=nn.Conv2d(3, 5, 3), head=nn.Linear(5, zoo.CLASSES))


class Pair(nn.Linear):
    def forward(self, x):
        return super().forward(x), None


class Gated(nn.Linear):
    def forward(self, x):
        return F.glu(super().forward(x))


@pytest.mark.parametrize("alignment", [False, True])
@pytest.mark.parametrize(
    ("make", "layer", "reason"),
    [
        (folding, "1", r"it gave an output of shape (576, 2) for a batch of 16 images: expected [B, …, C] with B = 16"),
        (
            unlike,
            "shared",
            "it gave an output of shape (8, 5, 4, 4) for a batch of 16 images: expected [B, C, *spatial]",
        ),
        (
            lambda: build(lambda net, x: net.head(net.odd(pooled(x))[0]), odd=Pair(3, 5), head=nn.Linear(5, 4)),
            "odd",
            "it gave an output that is a tuple for a batch of 16 images: expected one tensor",
        ),
        (
            lambda: build(lambda net, x: net.head(net.odd(pooled(x))), odd=Gated(3, 6), head=nn.Linear(3, 4)),
            "odd",
            "it gave 3 channels, expected 6",
        ),
    ],
    ids=["folded", "unlike", "tuple", "gated"],
)
def test_a_layer_that_cannot_be_read_is_left_out_with_what_came(make, layer, reason, alignment):
    net = make()
    table = compute_axes(net, loader(), layers="conv+linear", alignment=alignment).table
    odd, others = table[table["layer"] == layer], table[table["layer"] != layer]
    assert odd["reason"].str.startswith(reason).all()
    assert odd[list(COLUMNS)].isna().all(axis=None)
    assert odd["dead"].all()
    names = others["layer"].unique().tolist()
    assert others.reset_index(drop=True).equals(compute_axes(net, loader(), layers=names, alignment=alignment).table)


def test_a_layer_called_by_keyword_is_measured_like_any_other():
    tables = []
    for call in (lambda layer, x: layer(x), lambda layer, x: layer(input=x)):
        net = build(
            lambda net, x, call=call: net.head(pooled(call(net.wide, x))),
            wide=nn.Conv2d(3, 8, 1),
            head=nn.Linear(8, zoo.CLASSES),
        )
        tables.append(compute_axes(net, loader(), layers="conv+linear", alignment=True).table)
    assert tables[0].equals(tables[1])


@pytest.mark.parametrize("fast", [True, False])
def test_a_lesion_changes_every_run(fast):
    net, data = recurrent(), loader()
    experiment = LesionExperiment(layers=["shared"], operations=["mean"], channels=2)
    found = lesion_table(
        net, data, data, experiment, positions="all", fast=fast, units=find_units(net, next(iter(data))[0][:1])
    )
    seen, _, labels = run_with_hooks(net, data)
    means = outputs(net.shared, seen["shared"]).mean((0, 1))
    for row in found.itertuples():
        handle = net.shared.register_forward_hook(
            lambda _, __, out, c=row.channel: out.index_fill(1, torch.tensor([c]), float(means[c]))
        )
        lost = torch.cat([net.eval()(pictures) for pictures, _ in data])
        handle.remove()
        kept = torch.cat([net(pictures) for pictures, _ in data])
        change = [F.cross_entropy(logits, torch.as_tensor(labels)).item() for logits in (lost, kept)]
        assert_allclose(row.mean_loss, change[0] - change[1], 1e-6, 1e-9)


# --- several processes ----------------------------------------------------------------------------------------------


class Uneven(L.LightningModule):
    """A layer that runs twice; and three that odd images do not fit, do not reach, and reach once instead of twice."""

    even = True

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.stem, self.shared, self.rare = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 6, 1)
        self.folded, self.wide, self.head = nn.Linear(6, 5), nn.Conv2d(6, 9, 1), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        even = self.even
        self.folded(pooled(x) if even else x.movedim(1, -1).flatten(0, 1))
        if even:
            x = x + self.rare(x)
            self.wide(x)
        self.wide(x)
        return self.head(pooled(self.shared(F.relu(self.shared(x), inplace=True))))

    def training_step(self, batch, batch_idx):
        """Nothing: the tests before may have run autograd, which does not survive a fork."""

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def marked_step(module, batch):
    """The first pixel of an image tells whether its index is even."""
    module.even = bool(batch[0][0, 0, 0, 0] > 50)
    pictures = batch[0].clone()
    pictures[:, 0, 0, 0] = 0.0
    return module(pictures), batch[1]


@pytest.mark.filterwarnings("ignore:.*counted no optimiser step")
def test_two_processes_leave_out_the_same_layers_and_measure_the_others_alike(tmp_path):
    """The even images go to one process and the odd ones to the other; batches of one process hold all of a kind."""
    pictures, labels = images(40)[:]
    pictures = pictures.clone()
    pictures[:, 0, 0, 0] = torch.where(torch.arange(40) % 2 == 0, 100.0, 0.0)
    tables = {}
    for world, settings in {1: {}, 2: {"devices": 2, "strategy": "ddp_fork"}}.items():
        folder = tmp_path / str(world)
        folder.mkdir()
        probe = DataLoader(TensorDataset(pictures, labels), batch_size=1 if world == 1 else 20)
        tracker = AxisTracker(probe=probe, step=marked_step, layers="*", alignment=True)
        torch.manual_seed(0)
        still = TensorDataset(pictures[:1].expand(32, -1, -1, -1), labels[:1].expand(32))
        fitter = trainer(folder, tracker, max_epochs=1, limit_train_batches=1, **settings)
        fitter.fit(Uneven(), DataLoader(still, batch_size=32 // STEPS))
        tables[world] = read_run(folder / "axis").query("step == 0").drop(columns="run").set_index("layer")
    for layer in ("stem", "shared", "head"):
        assert (tables[2].loc[layer, "reason"] == "").all()
        pd.testing.assert_frame_equal(tables[2].loc[[layer]], tables[1].loc[[layer]], rtol=1e-4, atol=1e-7)
    two = tables[2]["reason"].groupby("layer").unique().map(list)
    assert two["rare"] == ["the forward pass reached this layer for 20 of 40 images only"]
    assert two["folded"][0].startswith("it gave an output of shape (120, 6, 5) for a batch of 20 images: expected")
    assert two["wide"] == ["it could not be measured in the same way in all processes"]
    assert tables[2].loc[["rare", "folded", "wide"], list(COLUMNS)].isna().all(axis=None)


def test_shares_of_a_probe_are_told_apart_by_what_each_process_measured():
    """One process alone says of its own images what it has seen."""
    net = Counted([1, 0, 1, 1])
    recorder = Recorder({"shared": net.shared}, Target(lambda logits, labels: logits[:, 0]))
    with observed(net), recorder.attached():
        for indices, batch in Probe(loader()).batches():
            recorder.record(indices, lambda batch=batch: default_step(net, batch))
    assert recorder.left_out() == {"shared": "the forward pass reached this layer for 44 of 60 images only"}
    assert dict(recorder.moments()) == {"shared": None}
