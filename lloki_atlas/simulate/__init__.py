"""Simulated atlases: what the engine runs on when there is no data at hand."""

from lloki_atlas.simulate.atlas import simulate

__all__ = ["simulate"]
