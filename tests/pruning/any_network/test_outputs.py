"""Several outputs, outputs of other shapes, and contexts around pruning: what is cut, and that it is the same."""

import copy

import pandas as pd
import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import TensorDataset

from chanaxes_pl import LesionExperiment, compute_axes, find_units, lesion_table, load_slim, prune, sensitivity


class TwoHeads(nn.Module):
    """Gives classes and boxes, in some order or mapping."""

    def __init__(self, form=lambda classes, boxes: (classes, boxes)) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 12, 3), nn.ReLU(), nn.Conv2d(12, 10, 3), nn.ReLU())
        self.classes = nn.Sequential(nn.Linear(10, 16), nn.ReLU(), nn.Linear(16, 4))
        self.boxes = nn.Sequential(nn.Linear(10, 14), nn.ReLU(), nn.Linear(14, 4))
        self.form = form

    def forward(self, images):
        seen = self.body(images).mean((2, 3))
        return self.form(self.classes(seen), self.boxes(seen))


def pictures(count=48):
    return torch.randn(count, 3, 10, 10, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "form", [lambda c, b: (c, b), lambda c, b: {"boxes": b, "logits": c}], ids=["tuple", "mapping"]
)
def test_what_only_other_outputs_depend_on_stays_whole(form):
    torch.manual_seed(0)
    model = TwoHeads(form)
    slim = prune(model, [pictures()], budget=0.3)
    assert slim.model.boxes[0].out_features == 14
    assert slim.model.classes[0].out_features < 16
    assert slim.model.body[2].out_channels < 10  # which both heads read
    assert find_units(model, pictures()[:1]).fixed["boxes.0"] == "only other outputs than the logits depend on it"


def test_a_step_that_reads_another_output_is_refused():
    torch.manual_seed(0)
    data = TensorDataset(pictures(), torch.randn(48, 4))
    with pytest.raises(
        ValueError, match=r"prune\(step=…\): reads an output of TwoHeads other than its logits, by which channels are"
    ):
        prune(TwoHeads(), data, budget=0.5, step=lambda model, batch: (model(batch[0])[1], batch[1]))
    for first in (lambda output: output[0], lambda output: output[0].softmax(1)):
        slim = prune(TwoHeads(), data, budget=0.5, step=lambda model, batch, f=first: (f(model(batch[0])), batch[1]))
        assert slim.macs / slim.dense_macs == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize("compensate", ["refit", "distill"])
def test_outputs_of_one_number_an_image_without_a_second_dimension(compensate, monkeypatch):
    monkeypatch.setattr("chanaxes_pl.compensation.polish.STEPS", 3)
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 12, 3), nn.ReLU(), nn.Conv2d(12, 8, 8), nn.Flatten(), nn.Linear(8, 1), nn.Flatten(0)
    )
    data = TensorDataset(pictures(), torch.randn(48, generator=torch.Generator().manual_seed(1)))
    slim = prune(model, data, budget=0.5, compensate=compensate)
    assert slim.model(pictures(5)).shape == (5,)
    assert slim.steps["divergence"].iloc[1] < slim.steps["divergence"].iloc[0]


def test_images_of_several_sizes():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 12, 3), nn.ReLU(), nn.Conv2d(12, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 1))
    images = [pictures(16), pictures(16)[:, :, :8], pictures(16)[:, :, :7, :9]]
    slim = prune(model, images, budget=0.5)
    assert slim.macs / slim.dense_macs == pytest.approx(0.5, abs=0.05)
    assert slim.steps["divergence"].iloc[1] < slim.steps["divergence"].iloc[0]


@pytest.mark.parametrize(
    "surroundings", [torch.inference_mode, torch.no_grad, lambda: torch.autocast("cpu", torch.bfloat16)]
)
def test_pruning_is_the_same_whatever_surrounds_it(surroundings):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 12, 3), nn.ReLU(), nn.Conv2d(12, 8, 8), nn.Flatten(), nn.Linear(8, 4))
    alone = prune(model, [pictures()], budget=0.5)
    data = [pictures()]
    with surroundings():
        within = prune(model, data, budget=0.5)
        table = sensitivity(model, data)
    assert torch.equal(within.model(pictures()), alone.model(pictures()))
    assert alone.steps["divergence"].tolist() == within.steps["divergence"].tolist()
    pd.testing.assert_frame_equal(table, alone.sensitivity)


def test_a_compiled_network_is_pruned_and_loaded_as_the_one_that_it_wraps(tmp_path):
    def network() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 12, 3), nn.ReLU(), nn.Conv2d(12, 8, 8), nn.Flatten(), nn.Linear(8, 4))

    torch.manual_seed(0)
    slim = prune(torch.compile(network()), [pictures()], budget=0.5, score="l1", allocation="uniform")
    slim.save(tmp_path / "half")
    for empty in (network(), torch.compile(network()), nn.DataParallel(network())):
        assert torch.equal(load_slim(tmp_path / "half", empty)(pictures()), slim.model(pictures()))


def test_averaged_weights_are_pruned_as_the_network_that_they_are_of(tmp_path):
    def network() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 12, 3), nn.ReLU(), nn.Conv2d(12, 8, 8), nn.Flatten(), nn.Linear(8, 4))

    slim = prune(AveragedModel(network().eval()), [pictures()], budget=0.5, score="l1", allocation="uniform")
    slim.save(tmp_path / "half")
    assert torch.equal(load_slim(tmp_path / "half", network())(pictures()), slim.model(pictures()))


class Asserts(nn.Module):
    """Checks what it is given, as many networks do."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        assert isinstance(x, Tensor), "expected a tensor"
        return self.head(self.second(self.first(x).relu()).relu().mean((2, 3)))


def test_a_network_that_asserts_what_it_is_given_is_pruned_and_lesioned():
    data = [(pictures(16), torch.arange(16) % 4)]
    assert prune(Asserts().eval(), data, budget=0.5).macs > 0
    table = lesion_table(Asserts().eval(), data, data, LesionExperiment(channels=2), progress=False)
    assert table["zero_loss"].notna().sum() == 4


class SeparateHeads(nn.Module):
    """Attention whose code knows its number of heads and their width, for queries, keys and values alike."""

    def __init__(self, split) -> None:
        super().__init__()
        self.heads, self.head_dim, self.split = 4, 6, split
        self.stem = nn.Conv2d(3, 24, 4, 4)
        self.q, self.k, self.v, self.o = (nn.Linear(24, 24) for _ in range(4))
        self.head = nn.Linear(24, 5)

    def forward(self, images):
        tokens = self.stem(images).flatten(2).mT
        q, k, v = (self.split(self, layer(tokens)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        return self.head((tokens + self.o(mixed.reshape(*tokens.shape[:2], -1))).mean(1))


@pytest.mark.parametrize(
    "split",
    [
        lambda s, x: x.view(*x.shape[:2], s.heads, s.head_dim),
        lambda s, x: x.view(*x.shape[:2], -1, s.head_dim),
        lambda s, x: x.view(*x.shape[:2], s.heads, -1),
    ],
    ids=["both", "width", "number"],
)
@pytest.mark.parametrize("ways", [{}, {"score": "l1", "allocation": "uniform"}], ids=["default", "even"])
def test_attention_that_knows_its_widths_meets_the_budget(split, ways):
    torch.manual_seed(0)
    slim = prune(SeparateHeads(split), [pictures(32)[:, :, :8, :8]], budget=0.5, **ways)
    assert slim.macs / slim.dense_macs == pytest.approx(0.5, abs=0.06)


def test_what_is_no_network_is_told_so(tmp_path):
    slim = prune(TwoHeads(), [pictures()], budget=0.5, score="l1", allocation="uniform", compensate=False)
    with pytest.raises(TypeError, match=r"(?s)prune\(model=.*\): expected a network, .* such as slim.model of a Slim"):
        prune(slim, [pictures()], budget=0.5)
    with pytest.raises(TypeError, match=r"load_slim\(…, .*\): expected a new dense network, such as TwoHeads\(…\)"):
        load_slim(tmp_path / "half", TwoHeads)
    with pytest.raises(ValueError, match=r"TwoHeads\(images\) gave dict: expected logits, .*; wrap a network"):
        prune(TwoHeads(lambda c, b: {"classes": c, "boxes": b}), [pictures()], budget=0.5)


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore:.*torch.jit:DeprecationWarning")
def test_torchscript_is_no_network():
    plain = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(1), nn.LazyLinear(4))
    images = torch.randn(8, 3, 8, 8)
    plain(images)
    scripted, data = torch.jit.script(plain), [(images, torch.arange(8) % 4)]
    with pytest.raises(TypeError, match=r"prune\(model=RecursiveScriptModule\(…\)\): .*, got TorchScript, which"):
        prune(scripted, data, budget=0.5)
    with pytest.raises(TypeError, match=r"compute_axes\(model=RecursiveScriptModule\(…\)\): .* torch.jit.script or"):
        compute_axes(scripted, data)
    plain[1] = torch.jit.script(nn.ReLU())
    assert len(compute_axes(plain, data).table) == 16
    with pytest.raises(TypeError, match=r"prune\(model=Sequential\(…\)\): .*, got '1', which is TorchScript"):
        prune(plain, data, budget=0.5)


class Squeezed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Conv2d(3, 12, 3), nn.Conv2d(12, 24, 3), nn.Linear(24, 4)

    def forward(self, images):
        seen = self.second(self.first(images).relu()).relu()
        return self.head(nn.functional.adaptive_avg_pool2d(seen, 1).squeeze())


def test_a_squeeze_of_the_batch_is_named():
    text = r"prune: Squeezed gives \(2, 4\) for two images and \(4,\) for one: expected \[1, …\]; a squeeze\(\) without"
    with pytest.raises(ValueError, match=text):
        prune(Squeezed(), [pictures()], budget=0.5)


def test_weights_made_in_inference_mode_are_refused():
    with torch.inference_mode():
        model = TwoHeads()
    with pytest.raises(ValueError, match=r"prune\(model=TwoHeads\(…\)\): its weights were made in inference mode"):
        prune(model, [pictures()], budget=0.5)


def test_weights_keep_their_memory_format():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.Flatten(), nn.Linear(16 * 36, 4))
    model = model.to(memory_format=torch.channels_last)
    slim = prune(model, [pictures()], budget=0.5)
    weights = [slim.model[0].weight, slim.model[2].weight]
    assert all(weight.is_contiguous(memory_format=torch.channels_last) for weight in weights)
    assert not any(weight.is_contiguous() for weight in weights)


def test_a_layer_with_two_names_runs():
    again = nn.Conv2d(8, 8, 3, padding=1)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), again, nn.ReLU(), again, nn.Flatten(), nn.Linear(8 * 64, 4))
    assert "3" not in find_units(model, pictures(1)).fixed


@pytest.mark.parametrize("kind", [nn.Dropout2d, nn.FeatureAlphaDropout])
def test_dropout_of_channels_is_no_obstacle_beside_a_head_of_training(kind):
    class Auxiliary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.drop = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), kind(0.2)
            self.head, self.aside = nn.Linear(8, 4), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.drop(self.a(x).relu())
            y = self.b(x).relu().mean((2, 3))
            return self.head(y) + self.aside(x.mean((2, 3))) if self.training else self.head(y)

    assert list(find_units(Auxiliary().eval(), torch.randn(1, 3, 8, 8)).groups) == ["a", "b"]


def test_a_buffer_that_is_written_to_has_no_gradient_afterwards():
    class Averages(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.last, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8, 4)
            self.register_buffer("mean", torch.zeros(8))

        def forward(self, x: Tensor) -> Tensor:
            h = self.conv(x).relu()
            self.mean.mul_(0.9).add_(h.mean((0, 2, 3)))
            return self.head(self.last(h).mean((2, 3)))

    network = Averages().eval()
    prune(network, [(torch.randn(16, 3, 8, 8), torch.arange(16) % 4)], 0.5, score="l1", allocation="uniform")
    assert not network.mean.requires_grad
    assert torch.equal(copy.deepcopy(network).mean, torch.zeros(8))
