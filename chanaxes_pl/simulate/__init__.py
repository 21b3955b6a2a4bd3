"""Gaussian linear channels under gradient flow: are both informations coupled at the start, and what parts them?"""

from chanaxes_pl.simulate.flows import FLOWS, half_times, initial_coupling, simulate
from chanaxes_pl.simulate.problem import Problem

__all__ = ["FLOWS", "Problem", "half_times", "initial_coupling", "simulate"]
