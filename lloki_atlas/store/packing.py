"""The state of a large catalog as text a third as long: it is in every sixteenth version, and read on opening.

Digests of receipts stand in the order of the objects' names, so a name is not said twice; the rest is zlib's. Small
catalogs keep plain JSON, which people can read.
"""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

from lloki_atlas.config import canonical_json

# of a state; fewer are not worth it
PACKED_SLICES = 64
# a record that claims more than this is no record
_MAX_BYTES = 2**31


def pack_state(content: Mapping[str, Any], names: Sequence[str]) -> str:
    """Pack the JSON form of a state whose objects have no other names than these.

    Parameters
    ----------
    content
        With `objects`, name to digest.
    names
        "kind/key" of all objects that the state points to, ascending.
    """
    digests = [content["objects"].get(name) for name in names]
    return base64.b85encode(zlib.compress(canonical_json({**content, "objects": digests}), 6)).decode("ascii")


def unpack_state(text: str) -> dict[str, Any]:
    """Undo `pack_state` but for the names: `objects` is the list of digests.

    Raises
    ------
    ValueError
        If the text is none that `pack_state` made.
    """
    decoder = zlib.decompressobj()
    try:
        data = decoder.decompress(base64.b85decode(text), _MAX_BYTES)
    except zlib.error as error:
        raise ValueError(str(error)) from error
    if decoder.unconsumed_tail or not decoder.eof:
        raise ValueError("a state that is cut short or too long")
    content = json.loads(data)
    if not isinstance(content, dict):
        raise ValueError("a state that is no table")
    return content
