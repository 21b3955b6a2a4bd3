"""The few numbers of a checkpoint that loggers get."""

from __future__ import annotations

import pandas as pd

from chanaxes_pl.correlations import HEADLINE, NETWORK, PAIRS, headline, reliabilities, task_masses

# Layers that get scalars of their own, at the most; the tables hold all of them.
MAX_LAYERS = 100


def checkpoint_scalars(table: pd.DataFrame, correlations: pd.DataFrame, prefix: str = "axis") -> dict[str, float]:
    """Scalars by key: a fixed number for the network and three or four for each layer.

    Args:
        table: one checkpoint's table of channels.
        correlations: its axis correlations.
        prefix: first part of every key.

    Returns:
        ``<prefix>/rho`` is the headline, ρ(input capture, task information), the mean over layers;
        ``<prefix>/alignment``, where the table has it, the mean of |cos(Σw, g)|. Undefined ones are NaN.
    """
    main = headline(correlations).iloc[0]
    values = {
        "rho": main["rho"],
        "rho_null": main["null"],
        "rho_disattenuated": main["disattenuated"],
        "dead": table["dead"].sum(),
        "at_ceiling": table["at_ceiling"].sum(),
    }
    network = correlations[correlations["layer"] == NETWORK].set_index(["local", "target"]).to_dict("index")
    values |= {f"rho/{local}-{target}": network[local, target]["rho"] for local, target in PAIRS[1:]}
    masses = task_masses(table)[["duplicate", "nonreplaceable"]].sum()
    values |= {f"task_mass/{kind}": mass for kind, mass in masses.items()}
    values |= {f"reliability/{local}": network[local, target]["reliability_local"] for local, target in PAIRS[:-1]}
    values |= {f"reliability/{target}": network[local, target]["reliability_target"] for local, target in PAIRS[:-1]}
    values["reliability/peer_r2"] = reliabilities(table, ["peer_r2"])["reliability"].iloc[-1]
    if "alignment" in table:
        alignment = table["alignment"].abs().groupby(table["layer"], sort=False).mean()
        values["alignment"] = alignment.mean()
        values |= {f"layer/{layer}/alignment": value for layer, value in alignment.iloc[:MAX_LAYERS].items()}
    values |= _per_layer(table, correlations)
    return {f"{prefix}/{key}": float(value) for key, value in values.items()}


def _per_layer(table: pd.DataFrame, correlations: pd.DataFrame) -> dict[str, float]:
    rho = correlations.set_index(["layer", "local", "target"])["rho"]
    dead = table.groupby("layer", sort=False)["dead"].sum()
    values = {}
    for layer in dead.index[:MAX_LAYERS]:
        values[f"layer/{layer}/rho"] = rho[(layer, *HEADLINE)]
        values[f"layer/{layer}/rho_axes"] = rho[(layer, "local_axis", "target_axis")]
        values[f"layer/{layer}/dead"] = dead[layer]
    return values
