"""Simulated atlases: what the engine runs on when there is no data at hand."""

from lloki_atlas.simulation.atlas import simulate

__all__ = ["simulate"]
