"""What a version of the catalog says, as frozen dataclasses, and its form in JSON."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from difflib import get_close_matches
from typing import Any

from lloki_atlas.config import canonical_json
from lloki_atlas.config import digest as content_digest
from lloki_atlas.errors import FormatError, InputError, NotFoundError
from lloki_atlas.store.packing import PACKED_SLICES, pack_state, unpack_state

# the newest form of a record that is read; a record has the oldest form that can say what it says
RECORD_FORMAT = 2
# a change to it says that there is no reference any more
NO_REFERENCE = ""

# stage of the pipeline -> kind of the folder that the stage's key names
STAGE_KINDS: dict[str, str] = {
    "ingest": "slices",
    "tile": "statistics",
    "reference": "panels",
    "propagate": "graphs",
    "embed": "embeddings",
    "integrate": "embeddings",
}
REFERENCE_KIND = "references"
MODEL_KIND = "models"
# these are `<key>.zarr`, a model is a plain folder `<key>`
ZARR_KINDS = (*dict.fromkeys(STAGE_KINDS.values()), REFERENCE_KIND)
KINDS = (*ZARR_KINDS, MODEL_KIND)

_KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class SliceRecord:
    """One slice in a version.

    `panel` is the digest of its gene list; `objects` maps each finished stage to the key of what it made.
    """

    slice_id: str
    technology: str
    organism: str
    panel: str
    n_cells: int
    n_genes: int
    label_columns: tuple[str, ...] = ()
    objects: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "label_columns", tuple(self.label_columns))
        object.__setattr__(self, "objects", dict(self.objects))
        if not self.slice_id:
            raise InputError("a slice has no id: give it one")
        if self.n_cells < 1 or self.n_genes < 1:
            raise InputError(
                f"slice '{self.slice_id}' has {self.n_cells} cells and {self.n_genes} genes: it needs both"
            )
        for stage, key in self.objects.items():
            if stage not in STAGE_KINDS:
                raise InputError(
                    f"slice '{self.slice_id}' names the stage '{stage}': choose from {', '.join(STAGE_KINDS)}"
                )
            check_key(key)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> SliceRecord:
        """Build from the form on disk; TypeError when a value is of another type."""
        record = cls(**content)
        texts = (record.slice_id, record.technology, record.organism, record.panel, *record.label_columns)
        if not all(isinstance(text, str) for text in texts):
            raise TypeError("a name of a slice is no text")
        if type(record.n_cells) is not int or type(record.n_genes) is not int:
            raise TypeError("a number of a slice is no whole number")
        return record

    def to_json(self) -> dict[str, Any]:
        """Return the form on disk."""
        return {**asdict(self), "label_columns": list(self.label_columns)}

    def references(self) -> set[str]:
        """Return "kind/key" of every object of this slice."""
        return {f"{STAGE_KINDS[stage]}/{key}" for stage, key in self.objects.items()}


@dataclass(frozen=True)
class Change:
    """What one commit changes; what is not named stays.

    `slices` and `models` map a slice id or a role to its new value, None to remove it. `reference` is NO_REFERENCE to
    have none any more. `objects` maps "kind/key" to the digest of its receipt; a commit looks up those left out.
    `oldest` gives up the versions before it.
    """

    config: Mapping[str, Any] | None = None
    reference: str | None = None
    models: Mapping[str, str | None] = field(default_factory=dict)
    slices: Mapping[str, SliceRecord | None] = field(default_factory=dict)
    objects: Mapping[str, str] = field(default_factory=dict)
    oldest: int | None = None

    def __post_init__(self) -> None:
        if self.config is not None:
            # as it will be read back, so that the writer and later readers see equal settings
            object.__setattr__(self, "config", json.loads(canonical_json(self.config)))
        for slice_id, record in self.slices.items():
            if record is not None and record.slice_id != slice_id:
                raise InputError(f"the change names slice '{slice_id}' and holds '{record.slice_id}': use one id")
        for key in (self.reference or None, *self.models.values()):
            if key is not None:
                check_key(key)
        for name in self.objects:
            split_name(name)
        if self.oldest is not None:
            _check_oldest(self.oldest)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Change:
        """Build from the form on disk."""
        return cls(**{**content, "slices": _slices_from_json(content.get("slices", {}))})

    def to_json(self) -> dict[str, Any]:
        """Return the form on disk."""
        content = {
            "config": None if self.config is None else dict(self.config),
            "reference": self.reference,
            "models": dict(self.models),
            "slices": {name: record and record.to_json() for name, record in self.slices.items()},
            "objects": dict(self.objects),
        }
        return content if self.oldest is None else {**content, "oldest": self.oldest}

    def touched(self) -> set[str]:
        """Return what the change sets; two changes conflict when these overlap."""
        names = {f"slice '{name}'" for name in self.slices} | {f"model '{role}'" for role in self.models}
        if self.config is not None:
            names.add("the settings")
        if self.reference is not None:
            names.add("the reference")
        return names

    def references(self) -> set[str]:
        """Return "kind/key" of every object that the change points to or lists."""
        names = {f"{MODEL_KIND}/{key}" for key in self.models.values() if key is not None}
        if self.reference:
            names.add(f"{REFERENCE_KIND}/{self.reference}")
        for record in self.slices.values():
            names |= record.references() if record is not None else set()
        return names | set(self.objects)


@dataclass(frozen=True)
class CatalogState:
    """Everything that a version points to.

    `models` maps a role ("embedder", "autoencoder") to a key; `objects` maps "kind/key" of every object
    reachable from here to the digest of its receipt. Versions before `oldest` have been given up.
    """

    config: Mapping[str, Any] = field(default_factory=dict)
    reference: str | None = None
    models: Mapping[str, str] = field(default_factory=dict)
    slices: Mapping[str, SliceRecord] = field(default_factory=dict)
    objects: Mapping[str, str] = field(default_factory=dict)
    oldest: int = 1

    @classmethod
    def from_json(cls, content: Mapping[str, Any] | str) -> CatalogState:
        """Build from the form on disk; text is that of `pack_state`."""
        digests = None
        if isinstance(content, str):
            content = unpack_state(content)
            content, digests = {**content, "objects": {}}, content["objects"]
        slices = {name: SliceRecord.from_json(record) for name, record in content["slices"].items()}
        state = cls(**{**content, "slices": slices})
        if digests is not None:
            named = zip(sorted(state.references()), digests, strict=True)
            state = replace(state, objects={name: digest for name, digest in named if digest is not None})
        state._as_change()  # checks every name
        if None in state.models.values():
            raise TypeError("a role has no model")
        _check_oldest(state.oldest)
        return state

    def to_json(self) -> dict[str, Any]:
        """Return the form on disk."""
        return self._as_change().to_json()

    def _as_change(self) -> Change:
        """What makes this state of nothing."""
        oldest = self.oldest if self.oldest > 1 else None
        return Change(self.config, self.reference, self.models, self.slices, self.objects, oldest)

    def references(self) -> set[str]:
        """Return "kind/key" of every object that this state points to."""
        return Change(None, self.reference, self.models, self.slices).references()

    def apply(self, *changes: Change) -> CatalogState:
        """Return the state after changes, in their order; objects that nothing points to any more are left out.

        Raises
        ------
        NotFoundError
            If a change removes a slice or a model that is not there.
        """
        if not changes:
            return self
        state, known = self, dict(self.objects)
        for change in changes:
            state = replace(
                state,
                config=state.config if change.config is None else dict(change.config),
                reference=state.reference if change.reference is None else change.reference or None,
                models=_updated(state.models, change.models, "model"),
                slices=_updated(state.slices, change.slices, "slice"),
                oldest=max(state.oldest, change.oldest or 1),
            )
            known |= change.objects
        return replace(state, objects={name: known[name] for name in sorted(state.references()) if name in known})


@dataclass(frozen=True)
class VersionRecord:
    """One version: the change that made it and, now and then, the whole state (a checkpoint).

    `owner` is the writer's token, `time` is UTC in ISO format, `parent` the version before (0 for the first), `oldest`
    the first version that is retained.
    """

    version: int
    parent: int
    owner: str
    time: str
    code_version: str
    message: str
    change: Change
    state: CatalogState | None = None
    oldest: int = 1

    def to_bytes(self) -> bytes:
        """Return the file's content, which carries its own digest."""
        # code that knows only the first form says "update lloki-atlas" of what it would misread, and reads the rest
        is_packed = self.state is not None and len(self.state.slices) >= PACKED_SLICES
        is_first_form = self.oldest == 1 and self.change.oldest is None and self.change.reference != NO_REFERENCE
        is_first_form = is_first_form and not is_packed
        content: dict[str, Any] = {
            "format": 1 if is_first_form else RECORD_FORMAT,
            **{name: getattr(self, name) for name in _PLAIN_FIELDS},
            "change": self.change.to_json(),
        }
        # the digests that this version added stand on their own: a tool can read them without knowing stages
        content["objects"] = content["change"].pop("objects")
        if self.state is not None:
            state = self.state.to_json()
            content["state"] = pack_state(state, sorted(self.state.references())) if is_packed else state
        if self.oldest > 1:
            content["oldest"] = self.oldest
        return canonical_json({**content, "digest": content_digest(content)})

    @classmethod
    def from_json(cls, content: Any, *, where: str) -> VersionRecord:
        """Build from a parsed file.

        Raises
        ------
        FormatError
            If it was written by a newer version, or is not what was written.
        """
        damaged = f"the version record {where} is damaged: restore the file from a copy, or open an earlier version"
        if not isinstance(content, dict) or not isinstance(content.get("format"), int):
            raise FormatError(damaged)
        if content["format"] > RECORD_FORMAT:
            raise FormatError(f"{where} has format {content['format']}: update lloki-atlas to read it")
        rest = {name: value for name, value in content.items() if name != "digest"}
        if content_digest(rest) != content.get("digest"):
            raise FormatError(damaged)
        try:
            change = Change.from_json({**content["change"], "objects": content["objects"]})
            state = CatalogState.from_json(content["state"]) if "state" in content else None
            oldest = _check_oldest(content.get("oldest", 1))
            return cls(**{name: content[name] for name in _PLAIN_FIELDS}, change=change, state=state, oldest=oldest)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise FormatError(damaged) from error


_PLAIN_FIELDS = ("version", "parent", "owner", "time", "code_version", "message")


def check_key(key: str) -> None:
    """Refuse a key that is no plain file name."""
    if not isinstance(key, str) or not _KEY.fullmatch(key):
        raise InputError(f"{key!r} is not a key: use letters, digits, '.', '_' and '-'")


def split_name(name: str) -> tuple[str, str]:
    """Split "kind/key" and check both."""
    kind, _, key = name.partition("/")
    if kind not in KINDS:
        raise InputError(f"'{name}' names no kind of object: write kind/key with one of {', '.join(KINDS)}")
    check_key(key)
    return kind, key


def nearest_names(name: str, known: Iterable[str]) -> str:
    """Say which of the known names are closest to one that does not exist."""
    names = sorted(known)
    near = get_close_matches(name, names, n=3) or names[:5]
    return f"the nearest are {', '.join(near)}" if near else "there are none yet"


def _check_oldest(number: Any) -> int:
    if type(number) is not int or number < 1:
        raise InputError(f"{number!r} is no version to begin with: use a whole number from 1 on")
    return number


def _slices_from_json(content: Mapping[str, Any]) -> dict[str, SliceRecord | None]:
    return {name: None if record is None else SliceRecord.from_json(record) for name, record in content.items()}


def _updated(values: Mapping[str, Any], changes: Mapping[str, Any], what: str) -> dict[str, Any]:
    result = dict(values)
    for name, value in changes.items():
        if value is not None:
            result[name] = value
        elif name in result:
            del result[name]
        else:
            raise NotFoundError(f"there is no {what} '{name}' to remove: {nearest_names(name, values)}")
    return result
