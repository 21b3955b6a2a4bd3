"""What is removed from a network: the plan, and its form in JSON."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from chanaxes_pl.core.errors import InputError
from chanaxes_pl.network.removal import Group


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What turns a dense network into a pruned one, and what became of it.

    Attributes:
        kept: group name → the units that stay, ascending; groups that stay whole may be left out.
        sizes: group name → U, the number of units before pruning.
        input_shape: ``[C, H, W]`` of one image.
        shapes: of the dense network's parameters and buffers, by name.
        biases: names of the layers that compensation gave a bias.
        backbone: arguments of ``build_backbone`` or ``Classifier``; ``None`` where the dense network came from neither.
        macs: multiply–accumulates of one image after pruning.
        dense_macs: the same before.
        notes: anything that JSON can hold: budget, score, allocation, …
    """

    kept: dict[str, tuple[int, ...]]
    sizes: dict[str, int]
    input_shape: tuple[int, ...]
    shapes: dict[str, tuple[int, ...]]
    biases: tuple[str, ...] = ()
    backbone: dict[str, Any] | None = None
    macs: int
    dense_macs: int
    notes: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        dense: nn.Module,
        groups: Iterable[Group],
        kept: Mapping[str, Tensor],
        *,
        input_shape: Sequence[int],
        macs: int,
        dense_macs: int,
        biases: Iterable[str] = (),
        notes: Mapping[str, Any] | None = None,
    ) -> Plan:
        """The plan by which :func:`remove` prunes a network.

        Args:
            dense: the network before pruning; its ``backbone_arguments`` go into the plan if they still make it.
            groups: of the network.
            kept: group name → ``[r]``, the units that stay.
            input_shape: ``[C, H, W]`` of one image.
            macs: multiply–accumulates of one image after pruning.
            dense_macs: the same before.
            biases: names of the layers that got a bias.
            notes: anything that JSON can hold.
        """
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors_of(dense, "Plan.of").items()}
        return cls(
            kept={name: tuple(sorted(units.tolist())) for name, units in kept.items()},
            sizes={group.name: group.size for group in groups},
            input_shape=tuple(input_shape),
            shapes=shapes,
            biases=tuple(biases),
            backbone=_backbone_of(dense, shapes),
            macs=macs,
            dense_macs=dense_macs,
            notes=dict(notes or {}),
        )

    def to_json(self) -> dict[str, Any]:
        """The plan in lists, dicts, strings and numbers."""
        values = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        values |= {"input_shape": list(self.input_shape), "biases": list(self.biases)}
        values["kept"] = {name: list(units) for name, units in self.kept.items()}
        values["shapes"] = {name: list(shape) for name, shape in self.shapes.items()}
        return values

    @classmethod
    def from_json(cls, values: Any) -> Plan:
        """The plan back from what :meth:`to_json` gave; tuples in ``notes`` have become lists.

        Args:
            values: what ``json`` read.

        Raises:
            ValueError: for an entry that is missing or of another kind, and for units that are out of range,
                repeated, not ascending or none at all.
        """
        if not isinstance(values, dict):
            raise InputError(f"the plan is {short(values)}: expected {{{', '.join(_KINDS)}}}")
        if missing := [name for name in _KINDS if name not in values]:
            raise InputError(f"the plan lacks {', '.join(missing)}; save the network again with save_slim")
        for name, (fits, kind) in _KINDS.items():
            if not fits(values[name]):
                raise InputError(f"{name} is {short(values[name])}: expected {kind}")
        tuples = {name: tuple(values[name]) for name in ("input_shape", "biases")}
        nested = {name: {key: tuple(held) for key, held in values[name].items()} for name in ("kept", "shapes")}
        arguments: dict[str, Any] = {name: values[name] for name in _KINDS} | tuples | nested
        plan = cls(**arguments)
        check_kept(plan)
        return plan


def _ints(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int for item in value)  # True is no number here


def _of_ints(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_ints, value.values()))


def _count(value: Any) -> bool:
    return type(value) is int and value >= 0


#: What every entry of a plan looks like in JSON.
_KINDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "kept": (_of_ints, "{group: [unit, …]}"),
    "sizes": (lambda value: isinstance(value, dict) and all(map(_count, value.values())), "{group: units}"),
    "input_shape": (lambda value: _ints(value) and all(side > 0 for side in value), "[C, H, W]"),
    "shapes": (_of_ints, "{tensor: [size, …]}"),
    "biases": (lambda value: isinstance(value, list) and all(isinstance(x, str) for x in value), "[layer, …]"),
    "backbone": (lambda value: value is None or isinstance(value, dict), "{argument: value} or null"),
    "macs": (_count, "a count"),
    "dense_macs": (_count, "a count"),
    "notes": (lambda value: isinstance(value, dict), "{…}"),
}


def short(value: Any) -> str:
    """What an error quotes of a value."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}…"


def check_kept(plan: Plan) -> None:
    """Refuse a plan that contradicts itself."""
    for name, units in plan.kept.items():
        if name not in plan.sizes:
            raise InputError(f"kept names {name!r}, which is not in sizes; {nearest(name, plan.sizes)}")
        last = plan.sizes[name] - 1
        if not units:
            raise InputError(f"kept[{name!r}] is empty: expected at least one unit of 0 to {last}")
        for unit in units:
            if not 0 <= unit <= last:
                raise InputError(f"kept[{name!r}] holds unit {unit}: expected units from 0 to {last}")
        for before, after in pairwise(units):
            if before >= after:
                raise InputError(f"kept[{name!r}] holds {before} before {after}: expected ascending units, each once")


def nearest(name: str, names: Iterable[str]) -> str:
    """The end of an error about an unknown name."""
    names = list(names)
    near = get_close_matches(name, names, n=2) or names[:3]
    return f"did you mean {' or '.join(map(repr, near))}?" if near else "there is none"


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name, the very objects."""
    tensors = model.state_dict(keep_vars=True)
    if other := [name for name, value in tensors.items() if not isinstance(value, Tensor)]:
        raise InputError(
            f"{type(model).__name__}'s state dict holds {other[0]!r}, which is no tensor; a pruned network "
            "is saved as tensors only: keep such state in attributes that the constructor sets"
        )
    return tensors


def _backbone_of(dense: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any] | None:
    arguments = getattr(dense, "backbone_arguments", None)
    if arguments is None:
        return None
    # A backbone that was pruned before, or got another head, keeps the arguments but cannot be built from them.
    with torch.device("meta"):
        fresh = build_from(arguments)
    same = {name: tuple(tensor.shape) for name, tensor in fresh.state_dict().items()} == shapes
    return dict(arguments) if same else None


def build_from(arguments: dict[str, Any]) -> nn.Module:
    """A backbone or Classifier from the arguments that a plan holds, without a step of the global random numbers."""
    from chanaxes_pl.models import Classifier, build_backbone  # torchvision and Lightning, only for who needs them

    build = Classifier if "backbone" in arguments else build_backbone
    with torch.random.fork_rng(devices=[]):
        return build(**arguments)
