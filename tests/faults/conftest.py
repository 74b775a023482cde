"""The tiny atlas that the tests of this folder share."""

from __future__ import annotations

from support.atlases import built, client, ingested, profile, sources

__all__ = ["built", "client", "ingested", "profile", "sources"]
