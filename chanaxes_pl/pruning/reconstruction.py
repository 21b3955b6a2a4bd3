"""Joint selection: units go one by one, each time the one whose loss its remaining peers make up for best.

Every other score judges a channel beside all of its peers. If two channels are copies of each other, both look
replaceable, although only one of them is. Backward elimination takes account of what has gone before. The loss is
measured where the units are read: for a consumer with weights W over inputs x, after the best change of the weights
that read the remaining units, as a share of the variance of Wx. This is optimal brain surgeon for blocks of weights
(Hassibi and Stork, 1993), which Kurtic, Frantar and Alistarh (ZipLM, 2023) use for structures of transformers.

With H = Cov(x) + λv I, where v is the mean variance of x, removing the inputs B costs tr(W_B (H⁻¹_BB)⁻¹ W_Bᵀ). This is
the least tr((W − W′) H (W − W′)ᵀ) over all W′ that are 0 at B. A sum of costs is therefore what the ridge regression of
``refit`` leaves, given the dense network's inputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from chanaxes_pl.compensation.layerwise import POSITIONS, RIDGE
from chanaxes_pl.core.memory import MEMORY
from chanaxes_pl.core.progress import bar
from chanaxes_pl.network.hooks import observed
from chanaxes_pl.pruning.readers import Sampling, measured
from chanaxes_pl.units.removal import Group

# Columns that removals wait for before H⁻¹ and W are updated.
_PANEL = 256
# Columns of units that are gone are dropped when less than this share of them remains.
_KEPT = 0.75
# Costs rise by at least this share from one unit to the next, so that they order the units without ties.
_RISE = 1e-9
_LEAST = 1e-12


def reconstruction_costs(
    model: nn.Module,
    groups: Iterable[Group],
    batches: Callable[[], Iterator[Any]],
    forward: Callable[[Any], Any],
    *,
    ridge: float = RIDGE["refit"],
    positions: int | Literal["all"] = POSITIONS,
    images: int | None = None,
    memory: float = MEMORY,
    progress: bool = True,
) -> dict[str, Tensor]:
    """Compute the cost at which each unit goes in a backward elimination of its group.

    Costs of a group's consumers add up. Inputs of a consumer that the group does not own, such as those of other
    groups behind a concatenation, help to make up for what is lost, and never go.

    A consumer counts place by place of its kernel or of its flattened map, each place predicted from that place alone,
    if it is a transposed convolution, if it is not affine in its input (see :func:`why_not_affine`), or if its
    inputs are too many for ``memory``.

    Args:
        model: model to score; it does not change.
        groups: groups of the model that a layer reads.
        batches: function that returns an iterator over the probe's batches, from its first image on; called once for
            every pass that ``memory`` takes.
        forward: function that runs the model on a batch.
        ridge: λ, as a share of the mean variance of a consumer's inputs.
        positions: number of local samples per image, or ``"all"``.
        images: number of images in the batches, if it is known. Then no more positions are taken than give a consumer
            10,000 samples, and 3 for each of its inputs.
        memory: gigabytes (10⁹ bytes) to take beside the network.
        progress: whether to show a progress bar in a terminal.

    Returns:
        Group name → ``[U]`` float64, the cost of each unit as a share of the variance of what its consumers make of
        their inputs, summed over consumers. It rises along the order in which units go: a cost that falls, because the
        units removed before have left little to lose, counts as equal to the one before it.

    Raises:
        ValueError: if a consumer's inputs are not finite, or ``memory`` has no room for the
            moments of one group.
    """
    groups = list(groups)
    costs: dict[str, Tensor] = {}
    sampling = Sampling(math.inf if positions == "all" else positions, images)

    def run() -> None:
        with observed(model):
            for batch in batches():
                forward(batch)

    read = measured(model, groups, sampling, memory, 1.0, run)
    for group, found in bar(read, "reconstruction", "group", total=len(groups), shown=progress):
        order, spent = eliminate([Elimination(*reader.inverse(group, ridge), group.size) for reader in found])
        costs[group.name] = _rising(order, spent)
    return costs


def eliminate(systems: Sequence[Elimination]) -> tuple[list[int], list[float]]:
    """Let all units go, each time the one of least cost over all systems, the first of equal ones.

    Returns:
        The units in the order in which they went, and the cost of each.
    """
    order: list[int] = []
    spent: list[float] = []
    for _ in range(systems[0].size):
        costs = torch.stack([system.costs().cpu() for system in systems]).sum(0)
        unit = int(costs.argmin())
        order.append(unit)
        spent.append(float(costs[unit].clamp_min(0.0)))
        for system in systems:
            system.remove(unit)
    return order, spent


class Elimination:
    """What one consumer of a group loses as units go, with its weights always at their best for the units that remain.

    A removal of the columns B takes the panel L = H⁻¹_·B C⁻ᵀ, where C Cᵀ = H⁻¹_BB, off H⁻¹ as L Lᵀ and off W as
    W_B C⁻ᵀ Lᵀ: steps of a Cholesky decomposition whose pivots are chosen as it goes. Only the blocks that the next cost
    needs are kept up to date, H⁻¹_uu and W_uᵀW_u of every unit u. The rest waits until enough panels make one product.

    Args:
        inverse: ``[G, S, S]`` float64, H⁻¹ at the columns of the units, unit by unit, for each of G blocks; it is
            overwritten.
        weight: ``[G, O, S]`` float64, the weights there; they are overwritten.
        size: U, the number of units; each has S / U columns in every block.

    Attributes:
        size: U.

    Example:
        >>> import torch
        >>> system = Elimination(torch.eye(3, dtype=torch.float64)[None], torch.tensor([[[3.0, 1.0, 2.0]]]).double(), 3)
        >>> system.costs().tolist()
        [9.0, 1.0, 4.0]
        >>> eliminate([system])
        ([1, 2, 0], [1.0, 4.0, 9.0])
    """

    def __init__(self, inverse: Tensor, weight: Tensor, size: int) -> None:
        self.size = size
        self._inverse, self._weight = inverse, weight
        self._width = inverse.shape[1] // size
        self._places = {unit: unit for unit in range(size)}  # unit → its place in the matrices
        self._begin()

    def costs(self) -> Tensor:
        """``[U]``, the cost of each unit if it went next; infinity for those that are gone."""
        places = list(self._places.values())
        solved = torch.linalg.solve(self._among[:, places], self._squares[:, places])
        found = solved.diagonal(dim1=2, dim2=3).sum((0, 2))
        costs = found.new_full((self.size,), math.inf)
        costs[list(self._places)] = found
        return costs

    def remove(self, unit: int) -> None:
        """Let a unit go."""
        place = self._places.pop(unit)
        own = slice(place * self._width, (place + 1) * self._width)
        panels, outputs = self._panels[:, :, : self._filled], self._outputs[:, :, : self._filled]
        column = self._inverse[:, own].mT - panels @ panels[:, own].mT
        root = torch.linalg.cholesky(column[:, own])
        panel, output = (
            torch.linalg.solve_triangular(root, part.mT, upper=False).mT
            for part in (column, self._weight[:, :, own] - outputs @ panels[:, own].mT)
        )
        toward = self._weight.mT @ output - panels @ (outputs.mT @ output)
        blocks, _, width = panel.shape
        lost, toward = (part.reshape(blocks, -1, width, width) for part in (panel, toward))
        self._among -= lost @ lost.mT
        cross = (toward - lost @ (output.mT @ output)[:, None] / 2) @ lost.mT
        self._squares -= cross + cross.mT
        stop = self._filled + width
        self._panels[:, :, self._filled : stop], self._outputs[:, :, self._filled : stop] = panel, output
        self._filled = stop
        if stop + width > self._panels.shape[2]:
            self._update()

    def _begin(self) -> None:
        blocks, columns = self._inverse.shape[:2]
        units = torch.arange(columns, device=self._inverse.device).view(-1, self._width)
        self._among = self._inverse[:, units[:, :, None], units[:, None]].contiguous()
        by_unit = self._weight.unflatten(2, (-1, self._width)).transpose(1, 2)
        self._squares = by_unit.mT @ by_unit
        room = max(self._width, _PANEL // self._width * self._width)
        self._panels = self._inverse.new_empty(blocks, columns, room)
        self._outputs = self._inverse.new_empty(blocks, self._weight.shape[1], room)
        self._filled = 0

    def _update(self) -> None:
        """Take the panels that wait off H⁻¹ and W."""
        panels, outputs = self._panels[:, :, : self._filled], self._outputs[:, :, : self._filled]
        self._inverse.baddbmm_(panels, panels.mT, alpha=-1)
        self._weight.baddbmm_(outputs, panels.mT, alpha=-1)
        # To copy what remains takes longer than to update all, so columns that are gone stay for a while.
        if len(self._places) * self._width < _KEPT * self._inverse.shape[1]:
            self._drop()
        self._begin()

    def _drop(self) -> None:
        """Drop the columns of the units that are gone."""
        places = torch.tensor(list(self._places.values()), dtype=torch.long)
        left = (places[:, None] * self._width + torch.arange(self._width)).flatten().to(self._inverse.device)
        self._inverse = self._inverse.index_select(1, left).index_select(2, left)
        self._weight = self._weight.index_select(2, left)
        self._places = {unit: place for place, unit in enumerate(self._places)}


def _rising(order: Sequence[int], costs: Sequence[float]) -> Tensor:
    """Return ``[U]`` costs by unit that rise strictly along the order."""
    found = torch.empty(len(order), dtype=torch.float64)
    last = 0.0
    for unit, cost in zip(order, costs, strict=True):
        found[unit] = last = max(cost, last * (1 + _RISE), _LEAST)
    return found
