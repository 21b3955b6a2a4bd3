"""Prune, save, load, export and track some hundred networks of torchvision and timm, with random weights.

    make zoo                                        # measure what is missing from the table, and print the summary
    python -m tests.benchmarks.zoo run [NETWORK …]  # some of the networks; --again measures them anew
    python -m tests.benchmarks.zoo summary

The table is notebooks/results/zoo.csv, one row a network, written as soon as the network is done. A row is measured
again when the package's code or the versions of the libraries have changed since. Each network runs in a process of
its own, with limits on its processor time and memory, and torch-pruning's own pruner on it in another.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd

import chanaxes_pl
from chanaxes_pl.core.files import replacing
from tests.benchmarks.zoo.networks import NETWORKS, Network

TABLE = Path("notebooks/results/zoo.csv")
YES = "yes"
COLUMNS = (
    *("network", "family", "source", "pixels", "parameters", "macs", "layers", "prunable", "groups", "units"),
    *("share_prunable", "least", "fixed", "main_reason", "outcome", "budget", "reached", "find_s", "prune_s"),
    *("memory_mb", "masked", "reloaded", "trains", "exported", "axes", "axes_s", "tracked", "left_out"),
    *("library", "library_reached", "library_s", "library_memory_mb"),
    *("fixed_reasons", "left_out_reasons", "code", "versions"),
)
_OF_LIBRARY = ("library", "library_reached", "library_s", "library_memory_mb")
#: In the summary: what is too slow (seconds), too large (MB), and prunable in too small a share of the MACs.
SLOW, LARGE, FEW = 60, 3000, 0.6


def versions() -> str:
    """Return the libraries that a result depends on."""
    return " ".join(f"{name}-{version(name)}" for name in ("torch", "torchvision", "timm", "torch-pruning"))


def code() -> str:
    """Return a short hash of the package's source."""
    digest = hashlib.sha256()
    for path in sorted(Path(chanaxes_pl.__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:10]


def read(table: Path) -> dict[str, dict[str, Any]]:
    """Return the rows of a table by network; none if there is no table yet."""
    if not table.is_file():
        return {}
    rows = pd.read_csv(table, dtype=str, keep_default_na=False).to_dict("records")
    return {row["network"]: row for row in rows}


def write(table: Path, rows: Mapping[str, Mapping[str, Any]]) -> None:
    """Write the rows in the order of the networks."""
    ordered = [rows[name] for name in NETWORKS if name in rows]
    with replacing(table) as draft:
        pd.DataFrame(ordered, columns=list(COLUMNS)).to_csv(draft, index=False)


def row_of(network: Network, old: Mapping[str, Any], limit: int, now: Mapping[str, str]) -> dict[str, Any]:
    """Measure one network; torch-pruning's columns are taken over while the libraries are the same."""
    row: dict[str, Any] = {
        "network": network.id,
        "family": network.family,
        "source": network.source,
        "pixels": network.pixels,
        **now,
        **_columns(network, limit, []),
    }
    known = old.get("versions") == now["versions"] and old.get("library")
    return row | ({name: old[name] for name in _OF_LIBRARY} if known else _columns(network, limit, ["--library"]))


def _columns(network: Network, limit: int, options: list[str]) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.benchmarks.zoo.measure", network.id, "--limit", str(limit), *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:  # processor time is limited by the process itself; this is for one that waits
        told, errors = process.communicate(timeout=10 * limit)
    except subprocess.TimeoutExpired:
        process.kill()
        told, errors = process.communicate()
    columns: dict[str, Any] = {}
    for line in told.splitlines():
        columns |= json.loads(line) if line.startswith("{") else {}
    step = columns.pop("step", "start")
    if process.returncode:
        slow = process.returncode < 0
        last = " ".join(errors.strip().splitlines()[-1:])
        why = f"no end within {limit} s of processor time" if slow else f"process ended: {last}"
        # The steps up to pruning share a column.
        column = step if step in COLUMNS else "outcome"
        columns[column] = f"failed in {step}: {why}"
    return columns


def run(names: list[str], again: bool, limit: int, jobs: int, table: Path) -> None:
    """Measure the networks that the table lacks, or holds from other code."""
    rows, now = read(table), {"code": code(), "versions": versions()}
    stale = [name for name in names if again or any(rows.get(name, {}).get(key) != now[key] for key in now)]
    print(f"{len(stale)} of {len(names)} networks to measure; code {now['code']}, {now['versions']}", flush=True)
    with ThreadPoolExecutor(jobs) as pool:
        waiting = {pool.submit(row_of, NETWORKS[name], rows.get(name, {}), limit, now): name for name in stale}
        for done, future in enumerate(as_completed(waiting), 1):
            name, row = waiting[future], future.result()
            rows[name] = row
            write(table, rows)
            shown = {key: row.get(key, "") for key in ("outcome", "reached", "prune_s", "axes", "library")}
            print(f"[{done}/{len(stale)}] {name}: {shown}", flush=True)


def summary(table: Path) -> str:
    """Return the summary of a table, and the networks that fall short."""
    frame = pd.read_csv(table).fillna({"outcome": "", "main_reason": ""})
    count, pruned = len(frame), frame[frame.outcome == YES]
    half = pruned[pruned.budget == 0.5]
    met = half[half.reached.sub(0.5).abs() < 0.02]
    library = frame[(frame.library == YES) & (frame.library_reached <= 0.55)]
    lines = [
        f"Of {count} networks of {frame.family.nunique()} families, `prune` works on {len(pruned)}, on {len(met)} of "
        f"them down to half the MACs (torch-pruning's own pruner: {len(library)}); "
        + ", ".join(f"{int((pruned[name] == YES).sum())} {what}" for name, what in _CHECKS.items())
        + f"; `compute_axes` measures {int(pd.to_numeric(frame.tracked).sum())} of "
        f"{int(pd.to_numeric(frame.tracked).sum() + pd.to_numeric(frame.left_out).sum())} layers. Median: "
        f"{pruned.find_s.median():.1f} s to find units, {pruned.prune_s.median():.1f} s and "
        f"{pruned.memory_mb.median() / 1000:.1f} GB to prune.",
        "",
    ]
    for title, part, shown in (
        ("not pruned", frame[frame.outcome != YES], "outcome"),
        *((f"not {what}", pruned[pruned[name] != YES], name) for name, what in _CHECKS.items()),
        (f"over {SLOW} s", pruned[pruned.prune_s + pruned.find_s > SLOW], "prune_s"),
        (f"over {LARGE} MB", frame[pd.to_numeric(frame.memory_mb) > LARGE], "memory_mb"),
        ("axes not measured", frame[frame["axes"] != YES], "axes"),
        ("layers left out of the axes", frame[pd.to_numeric(frame.left_out) > 0], "left_out_reasons"),
        (f"under {FEW:.0%} of MACs prunable", frame[frame.share_prunable < FEW], "main_reason"),
    ):
        lines += [f"{title}: {len(part)}"]
        for _, row in part.iterrows():
            share = f"{row.share_prunable:.0%} prunable, " if pd.notna(row.share_prunable) else ""
            lines += [f"  {row.network}: {share}{row[shown]}"]
    return "\n".join(lines)


_CHECKS = {
    "masked": "slim ≡ masked",
    "reloaded": "saved ≡ loaded",
    "trains": "trainable",
    "exported": "exported",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=("run", "summary"))
    parser.add_argument("networks", nargs="*", metavar="NETWORK", help="default: all")
    parser.add_argument("--again", action="store_true", help="measure networks that are in the table, too")
    parser.add_argument("--limit", type=int, default=180, help="seconds of processor time a network")
    parser.add_argument("--jobs", type=int, default=1, help="networks at a time")
    parser.add_argument("--table", type=Path, default=TABLE)
    args = parser.parse_args()
    if unknown := set(args.networks) - NETWORKS.keys():
        parser.error(f"no network {', '.join(sorted(unknown))}; there are {', '.join(NETWORKS)}")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if args.verb == "run":
        run(args.networks or list(NETWORKS), args.again, args.limit, args.jobs, args.table)
    print(summary(args.table))


if __name__ == "__main__":
    main()
