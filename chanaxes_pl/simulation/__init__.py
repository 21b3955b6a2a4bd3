"""Gaussian linear channels under gradient flow: are both informations coupled at the start, and what parts them?"""

from chanaxes_pl.simulation.flows import FLOWS, half_times, initial_coupling, simulate
from chanaxes_pl.simulation.problem import Problem

__all__ = ["FLOWS", "Problem", "half_times", "initial_coupling", "simulate"]
