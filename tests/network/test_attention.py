"""Projections packed inside attentions: each a layer of its own, against NumPy on the weights as they lie there."""

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import VisionTransformer

from chanaxes_pl import LesionExperiment, compute_axes, find_units, layer_structure, lesion_table
from chanaxes_pl.network.layers import Projection, channel_count, select_layers, widens_pointwise
from chanaxes_pl.tables import ALIGNMENT, COLUMNS
from chanaxes_pl.units.plain import plain
from tests.helpers import cases as zoo
from tests.helpers import reference

D, HEADS = 8, 2


def seeded(make) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(2)
        model = make()
        for parameter in model.parameters():  # torchvision's head is born as zeros, biases too
            nn.init.normal_(parameter, 0.0, 0.3)
    return model.double().eval()


def vit() -> nn.Module:
    return VisionTransformer(6, 2, 2, HEADS, D, 12, num_classes=zoo.CLASSES)


class Fused(nn.Module):
    """Attention as timm writes it."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(D, 3 * D, bias=bias), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).reshape(len(x), -1, 3, HEADS, D // HEADS).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Tokens(nn.Module):
    """Patches of an image, an attention over them, and logits."""

    def __init__(self, attention: nn.Module, call) -> None:
        super().__init__()
        self.embed, self.attention, self.head = nn.Linear(3, D), attention, nn.Linear(D, zoo.CLASSES)
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.call(self.attention, self.embed(x.flatten(2).mT)).mean(1))


def fused(bias: bool = True) -> nn.Module:
    return Tokens(Fused(bias), lambda attention, x: attention(x))


def packed(**options) -> nn.Module:
    def call(attention, x):
        x = x if attention.batch_first else x.transpose(0, 1)
        kinds = [x[..., : attention.embed_dim], x[..., : attention.kdim], x[..., : attention.vdim]]
        same = all(kind.shape == x.shape for kind in kinds)
        gave = attention(x, x, value=x)[0] if same else attention(x, kinds[1], value=kinds[2], need_weights=False)[0]
        return gave if attention.batch_first else gave.transpose(0, 1)

    return Tokens(nn.MultiheadAttention(D, HEADS, **options), call)


PACKED = {
    "packed": {"batch_first": True},
    "sequence first": {"batch_first": False},
    "no bias": {"batch_first": True, "bias": False},
    "other widths": {"batch_first": True, "kdim": 5, "vdim": 3},
    "no fast path": {"batch_first": True},
}


def loader():
    return zoo.loader_of(zoo.images_2d().double())


def seen_by(model: nn.Module, watched: dict[str, nn.Module]):
    """Inputs and outputs of modules over the probe, logits and labels; by hooks of this test's own."""
    args: dict[str, list] = {name: [] for name in watched}
    gave: dict[str, list] = {name: [] for name in watched}

    def keep(name):
        def hook(_, inputs, kwargs, output):
            args[name].append([*inputs, *(kwargs[k] for k in ("value",) if k in kwargs)])
            gave[name].append(output[0] if isinstance(output, tuple) else output)

        return hook

    handles = [module.register_forward_hook(keep(name), with_kwargs=True) for name, module in watched.items()]
    with torch.no_grad():
        logits = torch.cat([model(images) for images, _ in loader()]).numpy()
    for handle in handles:
        handle.remove()
    return args, gave, logits, np.concatenate([labels.numpy() for _, labels in loader()])


def projected(attention: nn.MultiheadAttention, given: list[list[Tensor]], gave: list[Tensor]) -> dict[str, np.ndarray]:
    """``{part: [N, P, C]}`` from an attention's arguments, by its own weights row by row."""
    first = (lambda x: x) if attention.batch_first else (lambda x: x.transpose(0, 1))
    bias = np.zeros(3 * D) if attention.in_proj_bias is None else attention.in_proj_bias.detach().numpy()
    found = {}
    for place, part in enumerate("qkv"):
        if attention.in_proj_weight is None:
            weight = getattr(attention, f"{part}_proj_weight").detach().numpy()
        else:
            weight = attention.in_proj_weight.detach().numpy()[place * D : (place + 1) * D]
        x = np.concatenate([first(batch[place]).numpy() for batch in given])
        found[part] = np.stack([x @ w + b for w, b in zip(weight, bias[place * D : (place + 1) * D], strict=True)], -1)
    return found | {"out": np.concatenate([first(batch).numpy() for batch in gave])}


def assert_measured(table, layer: str, outputs: np.ndarray, target: np.ndarray) -> None:
    rows = table[table["layer"] == layer]
    assert rows["channel"].tolist() == list(range(outputs.shape[2]))
    expected = reference.layer_columns(outputs.reshape(-1, outputs.shape[2]), outputs.mean(1), target)
    for column, values in expected.items():
        assert_allclose(rows[column], values, 1e-6, 1e-9, err_msg=f"{layer} {column}")
    assert (rows["reason"] == "").all()


def test_a_vision_transformer_is_measured_whole():
    model = seeded(vit)
    prefix = "encoder.layers.encoder_layer_{}"
    table = compute_axes(model, loader(), positions="all").table
    names = ["self_attention.q", "self_attention.k", "self_attention.v", "self_attention.out", "mlp.0", "mlp.3"]
    assert table["layer"].unique().tolist() == [
        "conv_proj",
        *(f"{prefix.format(block)}.{name}" for block in range(2) for name in names),
    ]
    blocks = {f"{prefix.format(b)}.self_attention": None for b in range(2)}
    args, gave, logits, labels = seen_by(model, {name: model.get_submodule(name) for name in blocks})
    margin = reference.margins(logits, labels)
    for name in blocks:
        attention = model.get_submodule(name)
        full = [[batch[0]] * 3 for batch in args[name]]
        for part, outputs in projected(attention, full, gave[name]).items():
            assert_measured(table, f"{name}.{part}", outputs, margin)


@pytest.mark.parametrize("name", PACKED)
def test_every_form_of_multihead_attention(name):
    torch.backends.mha.set_fastpath_enabled(name != "no fast path")
    try:
        model = seeded(lambda: packed(**PACKED[name]))
        table = compute_axes(model, loader(), layers="attention.*", positions="all").table
        args, gave, logits, labels = seen_by(model, {"attention": model.attention})
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    assert table["layer"].unique().tolist() == [f"attention.{part}" for part in ("q", "k", "v", "out")]
    for part, outputs in projected(model.attention, args["attention"], gave["attention"]).items():
        assert_measured(table, f"attention.{part}", outputs, reference.margins(logits, labels))


@pytest.mark.parametrize("bias", [True, False])
def test_a_fused_qkv_is_three_layers(bias):
    model = seeded(lambda: fused(bias))
    table = compute_axes(model, loader(), layers="conv+linear", positions="all").table
    assert table["layer"].unique().tolist() == [
        "embed",
        *(f"attention.qkv.{part}" for part in "qkv"),
        "attention.proj",
        "head",
    ]
    _, gave, logits, labels = seen_by(model, {"qkv": model.attention.qkv})
    whole = np.concatenate([batch.numpy() for batch in gave["qkv"]])
    for place, part in enumerate("qkv"):
        outputs = whole[:, :, place * D : (place + 1) * D]
        assert_measured(table, f"attention.qkv.{part}", outputs, reference.margins(logits, labels))


def aligned(x: np.ndarray, y: np.ndarray, target: np.ndarray) -> np.ndarray:
    """:data:`ALIGNMENT` of one channel, from ``[n, F]``, ``[n]`` and ``[n]``."""
    x, y, t = x - x.mean(0), y - y.mean(), target - target.mean()
    sigma_w, cross, power, shared = x.T @ y / len(y), x.T @ t / len(y), y @ y / len(y), y @ t / len(y)
    left = cross - shared / power * sigma_w
    norms = [np.linalg.norm(vector) for vector in (sigma_w, cross, left)]
    return np.array([np.sign(shared) * (sigma_w @ left) / norms[0] / norms[2], power, shared, *norms])


@pytest.mark.parametrize("make", [lambda: packed(batch_first=True), fused])
def test_alignment_of_projections(make):
    model = seeded(make)
    table = compute_axes(model, loader(), layers="attention*", positions="all", alignment=True).table
    source = model.attention if isinstance(model.attention, nn.MultiheadAttention) else model.attention.qkv
    args, _, logits, labels = seen_by(model, {"source": source})
    weight = source.in_proj_weight if isinstance(source, nn.MultiheadAttention) else source.weight
    bias = source.in_proj_bias if isinstance(source, nn.MultiheadAttention) else source.bias
    x = np.concatenate([batch[0].numpy() for batch in args["source"]]).reshape(-1, D)
    target = np.repeat(reference.margins(logits, labels), len(x) // len(labels))
    for place, part in enumerate("qkv"):
        rows = table[table["layer"].str.endswith(f".{part}")]
        for channel, found in enumerate(rows[list(ALIGNMENT)].to_numpy()):
            row = place * D + channel
            y = x @ weight.detach().numpy()[row] + bias.detach().numpy()[row]
            assert_allclose(found, aligned(x, y, target), 1e-6, 1e-9)
    out = table[table["layer"] == "attention.out"]
    assert out[list(ALIGNMENT)].isna().all(axis=None)
    assert out[list(COLUMNS)].notna().all(axis=None)
    assert (out["reason"] == "no alignment: what this layer reads does not leave the attention").all()


def test_which_names_and_globs_there_are():
    model = seeded(lambda: packed(batch_first=True))
    every = ["attention.q", "attention.k", "attention.v", "attention.out"]
    assert list(select_layers(model, "attention")) == list(select_layers(model, "attention.*")) == every
    assert list(select_layers(model, "*.[qk]")) == every[:2]
    assert list(select_layers(model, lambda name, module: isinstance(module, Projection))) == every
    assert list(select_layers(model, "conv+linear", whole=True)) == ["embed", "attention.out_proj", "head"]
    assert list(select_layers(seeded(fused), "*qkv")) == [f"attention.qkv.{part}" for part in "qkv"]
    with pytest.raises(
        ValueError, match=r"layers='attention.out_proj': no tracked module; .*did you mean 'attention.out'"
    ):
        select_layers(model, "attention.out_proj")


def test_a_projection_has_the_weights_that_lie_in_the_attention():
    model = seeded(lambda: packed(**PACKED["other widths"]))
    sizes = [(layer.in_features, channel_count(layer)) for layer in select_layers(model, "attention").values()]
    assert sizes == [(D, D), (5, D), (3, D), (D, D)]
    for name, layer in select_layers(model, "attention").items():
        assert layer.weight.shape == (layer.out_features, layer.in_features)
        assert layer.bias.shape == (D,)
        assert not layer.weight.requires_grad
        assert not widens_pointwise(layer), name
    assert not any("attention" in name for name, _ in layer.named_parameters())
    qkv = nn.ModuleDict({"qkv": nn.Linear(D, 3 * D)})
    rows = [layer.weight for layer in select_layers(qkv, "qkv").values()]
    assert torch.equal(torch.cat(rows), qkv["qkv"].weight)
    assert rows[0].data_ptr() == qkv["qkv"].weight.data_ptr()


def test_other_layers_of_such_names_stay_what_they_are():
    class Own(nn.MultiheadAttention):
        def forward(self, query, key, value):
            return query, None

    model = nn.ModuleDict({"qkv": nn.Linear(4, 8), "own": Own(4, 2), "b": nn.ModuleDict({"qkv": nn.Conv1d(4, 12, 1)})})
    assert list(select_layers(model, "conv+linear")) == ["qkv", "own.out_proj", "b.qkv"]


@pytest.mark.parametrize("batch_first", [True, False])
def test_a_transformer_encoder_whose_first_dimension_is_the_sequence_leaves_out_its_mlp_alone(batch_first):
    def call(encoder, x):
        return encoder(x) if batch_first else encoder(x.transpose(0, 1)).transpose(0, 1)

    layer = nn.TransformerEncoderLayer(D, HEADS, 12, batch_first=batch_first)
    model = seeded(lambda: Tokens(nn.TransformerEncoder(layer, 1, enable_nested_tensor=False), call))
    table = compute_axes(model, loader()).table
    reasons = table.groupby("layer")["reason"].first()
    mlp = reasons[reasons.index.str.contains("linear")]
    assert len(mlp) == 2
    assert (mlp == "").all() if batch_first else mlp.str.contains(r"shape \(36, 16, \d+\) for a batch of 16").all()
    assert (reasons.drop(mlp.index) == "").all()
    assert len(reasons) == 1 + 4 + 2


@pytest.mark.parametrize("make", [vit, fused])
def test_lesions_and_structure_take_whole_modules(make):
    model, data = seeded(make), loader()
    experiment = LesionExperiment(operations=["mean"], channels=1, layers="conv+linear")
    units = find_units(model, next(iter(data))[0][:3])
    lesions = lesion_table(model, data, data, experiment, units=units)
    structure = layer_structure(model, data, layers="conv+linear", nulls=2)
    names = {name for name, module in plain(model).named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))}
    assert set(lesions["layer"]) == set(structure["layer"]) == names
