"""The ``chanaxes`` command: find the verb, and import only what that verb needs."""

from __future__ import annotations

import json
import sys
from importlib import import_module
from itertools import pairwise, takewhile
from typing import NamedTuple

from chanaxes_pl.core.errors import nearest

TRAINER_VERBS = {
    "fit": "train a network and track its axes (takes every Trainer flag, --config and --print_config)",
    "validate": "evaluate a checkpoint on the validation split",
    "test": "evaluate a checkpoint on the test split",
    "lesion": "lesion the channels of a checkpoint one by one, and list the damage beside their axes",
    "prune": "prune a checkpoint by every score, allocation and compensation, and measure the accuracy",
}


class Verb(NamedTuple):
    """A verb that needs no Trainer.

    Attributes:
        target: ``module:function``; the function's parameters are the verb's flags.
        summary: line that the list of verbs shows.
        many: whether the first parameter takes all arguments before the first flag, as a list.
    """

    target: str
    summary: str
    many: bool = False


#: Flags of these verbs that need no value.
SWITCHES = ("--text", "--all_checkpoints")
VERBS = {
    "demo": Verb("chanaxes_pl.cli.demo:demo", "train on photographs, track, lesion, prune and report"),
    "dashboard": Verb(
        "chanaxes_pl.tracking.workspace:dashboard", "make a W&B page for tracked runs, as JSON or on W&B"
    ),
    "simulate": Verb(
        "chanaxes_pl.cli.simulate:simulation",
        "simulate linear Gaussian channels under gradient flow on both information terms",
    ),
    "report": Verb(
        "chanaxes_pl.cli.report:report",
        "report on one run, or on several of the same network, as a page or as text",
        many=True,
    ),
}


def main() -> None:
    """Run the verb that ``sys.argv`` names; without a verb, or with ``--help``, list the verbs.

    Raises:
        SystemExit: with status 2 if a verb or an argument does not exist, or if the verb raises ValueError or OSError,
            which is printed as one message.
    """
    try:
        _run()
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error


def _run() -> None:
    verb = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if verb in ("-h", "--help"):
        print(_overview())
    elif verb in TRAINER_VERBS:
        from chanaxes_pl.cli.trainer import TrainerCLI

        TrainerCLI()
    elif verb in VERBS:
        from jsonargparse import auto_cli

        module, function = VERBS[verb].target.split(":")
        arguments = _switched(sys.argv[2:])
        arguments = _listed(arguments) if VERBS[verb].many else arguments
        auto_cli(getattr(import_module(module), function), args=arguments, prog=f"chanaxes {verb}")
    else:
        print(f"error: unknown verb {verb!r}; {nearest(verb, _summaries())}\n\n{_overview()}", file=sys.stderr)
        raise SystemExit(2)


def _switched(arguments: list[str]) -> list[str]:
    """Write a lone ``--text`` or ``--all_checkpoints`` as ``…=true``, which the parser needs, and after all others."""
    others, lone = [], []
    for argument, after in pairwise([*arguments, ""]):
        if argument in SWITCHES and after.lower() not in ("true", "false"):
            lone.append(f"{argument}=true")
        else:
            others.append(argument)
    return others + lone


def _listed(arguments: list[str]) -> list[str]:
    """Join the arguments before the first flag into one, which the parser reads as a list."""
    first = list(takewhile(lambda argument: not argument.startswith("-"), arguments))
    return [json.dumps(first), *arguments[len(first) :]] if first else arguments


def _summaries() -> dict[str, str]:
    return TRAINER_VERBS | {name: verb.summary for name, verb in VERBS.items()}


def _overview() -> str:
    lines = [f"  {name:<10}{summary}" for name, summary in _summaries().items()]
    return "\n".join(["usage: chanaxes VERB [flags]", "", *lines, "", "chanaxes VERB --help lists its flags."])
