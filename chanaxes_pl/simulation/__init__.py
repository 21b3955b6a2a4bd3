"""Gaussian linear channels under gradient flow: how long input capture and task information stay coupled."""

from chanaxes_pl.simulation.flows import FLOWS, half_times, initial_coupling, simulate
from chanaxes_pl.simulation.problem import Problem

__all__ = ["FLOWS", "Problem", "half_times", "initial_coupling", "simulate"]
