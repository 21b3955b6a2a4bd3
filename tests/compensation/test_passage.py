"""Which layer completes a residual sum, what is added to its output, and how much of it a function cuts off."""

from operator import iadd

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from chanaxes_pl.compensation.passage import passage
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
    found = {layer: passage(trace, nodes[model.get_submodule(layer)]) for layer in expected}
    assert {layer: found[layer] is not None and found[layer].beside is not None for layer in found} == expected
    values = trace.inputs(IMAGES)
    for node, finished in trace.operations:
        for layer, total in found.items():
            if nodes[model.get_submodule(layer)] is node and total is not None and total.beside is not None:
                assert total.beside in values
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
    (added, counts, flat), term = passage(trace, node).of(values), model.stem(IMAGES)
    assert counts is None or counts.all()
    assert flat is None
    zero = through(model, torch.zeros_like(added))
    torch.testing.assert_close(through(model, added) - zero, term, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_channels_of_which_a_norm_passes_nothing_on_are_told():
    model = net(lambda n, x: x + n.norm(n.b(x)))
    model.norm.weight[3], model.norm.weight[5], model.norm.running_var[1] = 0.0, 1e-6, 0.0  # the last passes most
    trace = Trace.of(model)
    values = trace.values(IMAGES, model(IMAGES))
    node = next(node for node, module in trace.modules.items() if module is model.b)
    added, counts, _ = passage(trace, node).of(values)
    assert (~counts).nonzero()[:, 0].tolist() == [3, 5]
    assert added.isfinite().all()


FUNCTIONS = {  # which is flat in places, and whether it is there at all
    "ReLU": nn.ReLU(),
    "ReLU, in place": nn.ReLU(inplace=True),
    "ReLU6": nn.ReLU6(),
    "Hardtanh": nn.Hardtanh(-0.4, 0.7),
    "Hardswish": nn.Hardswish(),
    "Hardsigmoid": nn.Hardsigmoid(),
    "relu of torch": torch.relu,
    "relu in place": torch.relu_,
    "a method": lambda x: x.relu(),
    "a method in place": lambda x: x.relu_(),
    "functional": F.relu,
    "functional, in place": lambda x: F.relu(x, inplace=True),
    "relu6": F.relu6,
    "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid,
}


@pytest.mark.parametrize("added", ["nothing", "a term"])
@pytest.mark.parametrize("norms", [(), ("norm", "drop"), ("norm", "other")])
@pytest.mark.parametrize("name", FUNCTIONS)
@torch.no_grad()
def test_what_a_function_cuts_off_may_lie_anywhere_beyond(name, norms, added):
    """Moved to anywhere in the flat part the output gives the same, and moved anywhere else it does not."""

    def rest(n: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        for norm in norms:
            y = getattr(n, norm)(y)
        return n.cutoff(x + y if added == "a term" else y)

    model = net(lambda n, x: rest(n, x, n.b(x)))
    model.cutoff = FUNCTIONS[name]
    for index, norm in enumerate((model.norm, model.other)):
        norm.weight[index::3] *= -1  # flat where the output is large
        norm.weight.mul_(3), norm.bias.mul_(3)
    model.stem.weight.mul_(6)
    trace = Trace.of(model)
    values = trace.values(IMAGES, model(IMAGES))
    node = next(node for node, module in trace.modules.items() if module is model.b)
    passed = passage(trace, node).of(values)
    x, y = model.stem(IMAGES), values[node]
    given = rest(model, x, y.clone())
    level = y if passed.beside is None else y + passed.beside
    low, high = (end.view(1, -1, 1, 1) for end in passed.flat)
    for flat, way in ((level <= low, -1), (level >= high, 1)):
        assert flat.any() or not (low if way < 0 else high).isfinite().any()
        moved = rest(model, x, torch.where(flat, y + way * 10 * torch.rand_like(y), y))
        torch.testing.assert_close(moved, given)
    inside = ~(level <= low) & ~(level >= high)
    assert inside.any()
    assert ((rest(model, x, y + 1e-2) - given)[inside] != 0).float().mean() > 0.99


OTHERWISE = {
    "a function that is flat nowhere": lambda n, x: nn.functional.gelu(n.b(x)),
    "read elsewhere too": lambda n, x: (lambda y: y.relu() + y)(n.b(x)),
    "a mean before it": lambda n, x: n.b(x).mean((2, 3), keepdim=True).relu(),
    "a sum of two terms that come later": lambda n, x: (n.b(x) + n.c(x)).relu(),
    "statistics of the batch": lambda n, x: n.fresh(n.b(x)).relu(),
}


@pytest.mark.parametrize("name", OTHERWISE)
@torch.no_grad()
def test_other_functions_cut_nothing_off(name):
    model = net(OTHERWISE[name])
    trace = Trace.of(model)
    node = next(node for node, module in trace.modules.items() if module is model.b)
    assert passage(trace, node) is None


@torch.no_grad()
def test_channels_that_a_norm_does_not_pass_on_have_no_flat_part():
    model = net(lambda n, x: n.norm(n.b(x)).relu())
    model.norm.weight[3], model.norm.weight[5] = 0.0, 1e-6
    trace = Trace.of(model)
    node = next(node for node, module in trace.modules.items() if module is model.b)
    low, high = passage(trace, node).of({}).flat
    assert low.isinf().nonzero()[:, 0].tolist() == [3, 5]
    assert high.isinf().all()
