"""Polish: a pruned network learns what the dense one gives, from the same unlabelled images, for a stated time.

Layer-wise compensation makes each layer right on its own. Polish corrects what is left over, all layers at once: it is
knowledge distillation (Hinton, Vinyals and Dean, 2015) with the dense network as the teacher, and the features before
the head as hints (Romero et al., 2015). Norms keep their statistics.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import OneCycleLR

from chanaxes_pl.compensation.layerwise import kept_channels
from chanaxes_pl.core.divergence import Divergence, by_position, divergence_for, divergences
from chanaxes_pl.core.errors import InputError
from chanaxes_pl.core.memory import GIGABYTE, MEMORY
from chanaxes_pl.core.moments import accumulation_device
from chanaxes_pl.core.progress import bar
from chanaxes_pl.network.batches import logits_of
from chanaxes_pl.network.hooks import activation_bytes, hooked, isolated_rng, observed
from chanaxes_pl.units.groups import executed_layers
from chanaxes_pl.units.removal import Group

#: Steps of the optimiser.
STEPS = 600
#: Images of one step.
BATCH = 128
#: Temperature of the logits, and weight decay.
TEMPERATURE, DECAY = 2.0, 1e-4
#: Largest learning rate, and its bound as a share of the root mean square of what is trained.
RATE, SHARE = 1e-3, 1e-2
# Largest shift of an image, as a share of its side.
_SHIFT = 1 / 8
# Of these, AdamW's smallest denominator is 0, or an update is lost in rounding.
_HALF = (torch.float16, torch.bfloat16)


def distillation_loss(
    logits: Tensor,
    wanted: Tensor,
    temperature: float = TEMPERATURE,
    variance: Tensor | None = None,
    divergence: Divergence | None = None,
) -> Tensor:
    """Return how far a network's outputs are from those of its teacher, 0 where they are the same.

    Args:
        logits: ``[B, …]``, the network's outputs.
        wanted: the same of the teacher.
        temperature: T. Divergences of probabilities are T² times those of the outputs divided by T.
        variance: of the teacher's outputs, of which the squared error is a share; default that of ``wanted``. Where it
            is 0, the loss is the squared error itself.
        divergence: what outputs are compared by, see :data:`Divergence`; default ``"kl"`` for ``[B, K ≥ 2, …]``, and
            ``"square"`` otherwise.

    Raises:
        ValueError: if the shapes differ.

    Example:
        >>> distillation_loss(torch.zeros(2, 3), torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 0.0]])).item() > 0
        True
    """
    if logits.shape != wanted.shape:
        raise InputError(
            f"the teacher gives outputs {list(wanted.shape)}, the network {list(logits.shape)}: expected the same shape"
        )
    kind = divergence or divergence_for(wanted, None)
    if kind == "square":
        variance = Spread().add(wanted) if variance is None else variance
        return (logits - wanted).square().mean() / variance.where(variance > 0, 1.0)
    rows = (by_position(outputs.float() if outputs.dtype in _HALF else outputs) for outputs in (logits, wanted))
    found, sought = (each / temperature for each in rows)
    return temperature**2 * divergences(kind, sought, found).mean()


def polish(
    slim: nn.Module,
    dense: nn.Module,
    groups: Iterable[Group],
    kept: Mapping[str, Tensor],
    batches: Iterable[Tensor],
    *,
    divergence: Divergence | None = None,
    steps: int = STEPS,
    memory: float = MEMORY,
    seed: int = 0,
    progress: bool = True,
) -> None:
    """Train a pruned network in place to give what the dense one gives, without labels.

    The recipe is fixed: AdamW with one cycle up to :data:`RATE`, for a parameter of small numbers up to :data:`SHARE`
    of their root mean square; batches of :data:`BATCH` images, flipped and shifted at random; the loss of
    :func:`distillation_loss` plus the squared error of what the last layer reads, as a share of its variance. A step
    takes about as long as a forward pass of the dense network and three of the slim one.

    Args:
        slim: pruned network; its modes and the statistics of its norms stay as they were.
        dense: dense network; it does not change.
        groups: the dense network's groups.
        kept: group name → the units that stayed.
        batches: unlabelled images ``[B, C, …]`` on the networks' device, iterated as often as it takes.
        divergence: what outputs are compared by, as for :func:`distillation_loss`.
        steps: number of steps.
        memory: gigabytes (10⁹ bytes) for activations and their gradients: a step takes its images in as many parts as
            that needs, which changes nothing but that the dense network runs twice: norms do not look at the batch.
        seed: random seed of the order of the images, flips and shifts.
        progress: whether to show a progress bar in a terminal.
    """
    first = next(iter(batches))[:1]
    head = executed_layers(dense, first)[-1]
    inputs = kept_channels(dense, groups, kept)[head][0].to(first.device)
    trained = [parameter for parameter in slim.parameters() if parameter.is_floating_point()]
    flags = [parameter.requires_grad for parameter in trained]
    read: dict[nn.Module, Tensor] = {}

    def note(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        read[layer] = args[0]

    heads = [model.get_submodule(head) for model in (dense, slim)]
    channel = -1 if isinstance(heads[0], nn.Linear) else 1
    generator = torch.Generator().manual_seed(seed)
    noting = hooked([(layer, note) for layer in heads], before=True)
    with observed(dense), observed(slim), noting, isolated_rng(), _wide(slim) as wide:
        torch.manual_seed(seed)
        # what a step keeps of the slim network, and gradients of it
        at_once = int(max(1, memory * GIGABYTE // (2 * activation_bytes(slim, wide(first)))))
        for parameter in trained:
            parameter.requires_grad_(True)

        def goal(part: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            """The images, and what the slim network is to give and its last layer to read."""
            wanted = wide(logits_of(dense(part)))
            return part, wanted, wide(read[heads[0]].index_select(channel, inputs))

        rates = [_rate(parameter) for parameter in trained]
        each = [{"params": [parameter], "lr": rate} for parameter, rate in zip(trained, rates, strict=True)]
        optimizer = torch.optim.AdamW(each, weight_decay=DECAY)
        schedule = OneCycleLR(optimizer, rates, total_steps=steps)
        images = _endless(batches, generator)
        for _ in bar(range(steps), "polish", "step", shown=progress):
            parts = _moved(next(images), generator).split(at_once)
            held = [goal(part) for part in parts] if len(parts) == 1 else []  # there may be room for no more
            logits, features = _variances(held or map(goal, parts))
            for part, wanted, sought in held or map(goal, parts):
                with torch.enable_grad():
                    loss = distillation_loss(
                        logits_of(slim(wide(part))), wanted, variance=logits, divergence=divergence
                    )
                    loss = loss + (read[heads[1]] - sought).square().mean() / features.clamp_min(1e-12)
                    (loss * (len(part) / sum(map(len, parts)))).backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    for parameter, flag in zip(trained, flags, strict=True):
        parameter.requires_grad_(flag)


def _rate(parameter: Tensor) -> float:
    """Largest learning rate of a parameter: AdamW moves every number by about that much a step, however small it is,
    and the wider a layer is the smaller are its weights."""
    size = parameter.detach().double().square().mean().sqrt().item()
    return min(RATE, SHARE * size) if size > 0 else RATE


class Spread:
    """The variance of all numbers that were given so far."""

    def __init__(self) -> None:
        self._count, self._sum, self._squares = 0, 0.0, 0.0

    def add(self, values: Tensor) -> Tensor:
        """Add numbers of any shape, and return the variance of all."""
        exact = values.detach().to(accumulation_device(values.device)).double()
        self._count += values.numel()
        self._sum, self._squares = self._sum + exact.sum(), self._squares + exact.square().sum()
        return ((self._squares - self._sum**2 / self._count) / max(self._count - 1, 1)).clamp_min(0.0).to(values)


def _variances(goals: Iterable[tuple[Tensor, Tensor, Tensor]]) -> list[Tensor]:
    """Return the variance of all numbers that outputs hold, and that of all that last layers read."""
    spreads, found = (Spread(), Spread()), []
    for _, *both in goals:
        found = [spread.add(values) for spread, values in zip(spreads, both, strict=True)]
    return found


@contextmanager
def _wide(model: nn.Module) -> Iterator[Callable[[Tensor], Tensor]]:
    """Let a network of half precision compute in float32 inside the block, in which alone it can learn.

    Gives the function that brings tensors to its precision.
    """
    tensors = [tensor for tensor in [*model.parameters(), *model.buffers()] if tensor.dtype in _HALF]
    dtypes = [tensor.dtype for tensor in tensors]
    for tensor in tensors:
        tensor.data = tensor.data.float()
    try:
        yield Tensor.float if tensors else lambda tensor: tensor
    finally:
        for tensor, dtype in zip(tensors, dtypes, strict=True):
            tensor.data = tensor.data.to(dtype)


def _endless(batches: Iterable[Tensor], generator: torch.Generator) -> Iterator[Tensor]:
    """Give batches of :data:`BATCH` images in random order: of all, or of neighbours if they are streamed or of several
    sizes, as many as there are of one size."""
    listed = isinstance(batches, (list, tuple)) and len({images.shape[1:] for images in batches}) == 1
    held = [image for images in batches for image in images] if listed else []
    while True:
        for pool in [held] if listed else _pools(batches):
            order, size = torch.randperm(len(pool), generator=generator), min(BATCH, len(pool))
            for chosen in order.split(size):
                if len(chosen) == size:
                    yield torch.stack([pool[place] for place in chosen.tolist()])


def _pools(batches: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Give neighbours of one size, as many as there are up to :data:`BATCH`, or all of a batch that has more."""
    pool: list[Tensor] = []
    for images in batches:
        if pool and (pool[0].shape != images.shape[1:] or len(pool) >= BATCH):
            yield pool
            pool = []
        pool = [*pool, *images]
    if pool:
        yield pool


def _moved(images: Tensor, generator: torch.Generator) -> Tensor:
    """Flip half of the images ``[B, C, H, W]``, and shift each by up to an eighth of its sides, with zeros around."""
    if images.ndim != 4:
        return images
    flips = torch.rand(len(images), generator=generator) < 0.5
    images = torch.where(flips.view(-1, 1, 1, 1).to(images.device), images.flip(3), images)
    margins = [math.floor(side * _SHIFT) for side in images.shape[2:]]
    padded = F.pad(images, (margins[1], margins[1], margins[0], margins[0]))
    rows, columns = (
        torch.randint(2 * margin + 1, (len(images),), generator=generator)[:, None] + torch.arange(side)
        for margin, side in zip(margins, images.shape[2:], strict=True)
    )
    at = torch.arange(len(images))
    return padded[at[:, None, None], :, rows[:, :, None], columns[:, None]].movedim(3, 1)
