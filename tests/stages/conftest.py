"""The tiny atlas that the tests of this folder share."""

from __future__ import annotations

from support.adapted import adapted, grown
from support.atlases import built, client, ingested, profile, sources

__all__ = ["adapted", "built", "client", "grown", "ingested", "profile", "sources"]
