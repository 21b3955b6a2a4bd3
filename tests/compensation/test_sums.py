"""Which layer completes a residual sum, and what is added to its output."""

from operator import iadd

import pytest
import torch
from torch import Tensor, nn

from chanaxes_pl.compensation.sums import completed_sum
from chanaxes_pl.network.tracing import Trace
from tests.helpers.networks import IMAGES, Net, head, pooled


def normed(channels: int = 8) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(channels)
    with torch.no_grad():
        for values in (norm.weight, norm.running_var):
            values.uniform_(0.5, 2.0)
        norm.bias.normal_()
        norm.running_mean.normal_()
    return norm


def net(forward) -> nn.Module:
    layers = {name: nn.Conv2d(8, 8, 3, padding=1) for name in ("a", "b", "c")}
    return Net(
        lambda net, x: net.head(pooled(forward(net, net.stem(x)))),
        stem=nn.Conv2d(3, 8, 3, stride=4),
        **layers,
        norm=normed(),
        other=normed(),
        drop=nn.Dropout(0.5),
        plain=nn.BatchNorm2d(8, affine=False),
        fresh=nn.BatchNorm2d(8, track_running_stats=False),
        place=nn.Parameter(torch.randn(1, 8, 8, 8)),
        head=head(8),
    ).eval()


# name → the rest of the network after its stem, and per layer what is added to its output, as a function of that
SUMS = {
    "identity": (lambda n, x: x + n.b(n.a(x)), {"a": False, "b": True}),
    "the other way round, in place": (lambda n, x: n.b(n.a(x)).add_(x), {"a": False, "b": True}),
    "augmented": (lambda n, x: iadd(n.b(n.a(x)), x).relu(), {"b": True}),
    "torch.add": (lambda n, x: torch.add(x, n.norm(n.b(x))), {"b": True}),
    "norms and dropout between": (lambda n, x: x + n.drop(n.other(n.norm(n.b(x)))), {"b": True}),
    "norm without factors": (lambda n, x: x + n.plain(n.b(x)), {"b": True}),
    "the last branch completes it": (lambda n, x: n.norm(n.b(x)) + n.other(n.c(x)), {"b": False, "c": True}),
    "a shortcut of no operation, after it": (lambda n, x: n.norm(n.b(x)) + n.drop(x), {"b": True}),
    "a shortcut of no operation, before it": (lambda n, x: (lambda y: y + n.b(y))(n.drop(x)), {"b": True}),
    "three terms": (lambda n, x: x + n.a(x) + n.b(x), {"a": True, "b": True}),
    "read elsewhere too": (lambda n, x: (lambda y: x + y + y.relu().mean())(n.b(x)), {"b": False}),
    "something else between": (lambda n, x: x + n.b(x).relu(), {"b": False}),
    "statistics of the batch": (lambda n, x: x + n.fresh(n.b(x)), {"b": False}),
    "scaled": (lambda n, x: torch.add(x, n.b(x), alpha=2), {"b": False}),
    "a number": (lambda n, x: n.b(x) + 1.0, {"b": False}),
    "a parameter": (lambda n, x: n.b(x) + n.place, {"b": False}),
    "itself": (lambda n, x: (lambda y: y + y)(n.b(x)), {"b": False}),
    "a product": (lambda n, x: x * n.b(x), {"b": False}),
}


@pytest.mark.parametrize("name", SUMS)
@torch.no_grad()
def test_a_layer_completes_a_sum_whose_other_term_is_known_before_it_runs(name):
    forward, expected = SUMS[name]
    model = net(forward)
    trace = Trace.of(model)
    nodes = {module: node for node, module in trace.modules.items()}
    found = {layer: completed_sum(trace, nodes[model.get_submodule(layer)]) for layer in expected}
    assert {layer: total is not None for layer, total in found.items()} == expected
    values = trace.inputs(IMAGES)
    for node, finished in trace.operations:
        for layer, total in found.items():
            assert nodes[model.get_submodule(layer)] is not node or total is None or total.beside in values
        values[node] = trace.compute(node, values)
        for used in finished:
            del values[used]


@pytest.mark.parametrize("norms", [(), ("norm",), ("norm", "other"), ("plain",)])
@torch.no_grad()
def test_what_is_added_is_in_units_of_the_layers_output(norms):
    """Added to the output itself, before any norm, it changes the sum as adding the term itself does."""

    def through(n: nn.Module, y: Tensor) -> Tensor:
        for norm in norms:
            y = getattr(n, norm)(y)
        return y

    model = net(lambda n, x: x + through(n, n.b(x)))
    trace = Trace.of(model)
    values = trace.values(IMAGES, model(IMAGES))
    node = next(node for node, module in trace.modules.items() if module is model.b)
    (added, passed), term = completed_sum(trace, node).of(values), model.stem(IMAGES)
    assert passed is None or passed.all()
    zero = through(model, torch.zeros_like(added))
    torch.testing.assert_close(through(model, added) - zero, term, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_channels_of_which_a_norm_passes_nothing_on_are_told():
    model = net(lambda n, x: x + n.norm(n.b(x)))
    model.norm.weight[3], model.norm.weight[5], model.norm.running_var[1] = 0.0, 1e-6, 0.0  # the last passes most
    trace = Trace.of(model)
    values = trace.values(IMAGES, model(IMAGES))
    node = next(node for node, module in trace.modules.items() if module is model.b)
    added, passed = completed_sum(trace, node).of(values)
    assert (~passed).nonzero()[:, 0].tolist() == [3, 5]
    assert added.isfinite().all()
