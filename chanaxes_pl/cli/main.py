"""The ``chanaxes`` command: finds the verb, and imports only what that verb needs."""

from __future__ import annotations

import json
import sys
from difflib import get_close_matches
from importlib import import_module
from itertools import pairwise, takewhile
from typing import NamedTuple

TRAINER_VERBS = {
    "fit": "train a network and track its axes; every Trainer flag, --config, --print_config",
    "validate": "evaluate a checkpoint on the validation split",
    "test": "evaluate a checkpoint on the test split",
    "lesion": "damage of lesioning and replacing channels of a checkpoint, beside their axes",
    "prune": "accuracy over MACs of a checkpoint under every score, allocation and compensation",
}


class Verb(NamedTuple):
    """A verb that needs no Trainer."""

    target: str  # module:function; the function's parameters are the verb's flags
    summary: str
    many: bool = False  # its first parameter takes all arguments before the first flag, as a list


#: Flags of these verbs that need no value.
SWITCHES = ("--text", "--all_checkpoints")
VERBS = {
    "demo": Verb("chanaxes_pl.cli.demo:demo", "train on photographs, track, lesion, prune and report"),
    "dashboard": Verb(
        "chanaxes_pl.tracking.workspace:dashboard", "a W&B page for tracked runs, as JSON or sent to W&B"
    ),
    "simulate": Verb(
        "chanaxes_pl.cli.simulate:simulation",
        "simulate linear Gaussian channels under gradient flow on both information terms",
    ),
    "report": Verb(
        "chanaxes_pl.cli.report:report", "what a run, or several of one network, have shown: a page, or text", many=True
    ),
}


def main() -> None:
    """Run the verb that ``sys.argv`` names; without one, or with ``--help``, list the verbs.

    Raises:
        SystemExit: with status 2 for a verb or an argument that does not exist, and where the verb raises ValueError
            or OSError, which is printed as one message.
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
        (nearest,) = get_close_matches(verb, _summaries(), n=1, cutoff=0)
        print(f"error: unknown verb {verb!r}; did you mean {nearest!r}?\n\n{_overview()}", file=sys.stderr)
        raise SystemExit(2)


def _switched(arguments: list[str]) -> list[str]:
    """``--text`` and ``--all_checkpoints`` on their own mean true; the parser wants that said."""
    return [
        f"{argument}=true" if argument in SWITCHES and after.startswith("--") else argument
        for argument, after in pairwise([*arguments, "--"])
    ]


def _listed(arguments: list[str]) -> list[str]:
    """The arguments before the first flag as one, which the parser reads as a list."""
    first = list(takewhile(lambda argument: not argument.startswith("-"), arguments))
    return [json.dumps(first), *arguments[len(first) :]] if first else arguments


def _summaries() -> dict[str, str]:
    return TRAINER_VERBS | {name: verb.summary for name, verb in VERBS.items()}


def _overview() -> str:
    lines = [f"  {name:<10}{summary}" for name, summary in _summaries().items()]
    return "\n".join(["usage: chanaxes VERB [flags]", "", *lines, "", "chanaxes VERB --help lists its flags."])
