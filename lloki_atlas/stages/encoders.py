"""Which autoencoder and which tokens encode the slices of a run, and which of them have to be trained first.

An autoencoder is current while its key is that of the atlas's settings and of the embeddings it was made of; else it is
trained anew, on the slices that it was made of. So is a token, which belongs to one autoencoder: it goes when that
goes, and where the new one does not know its platform it is adapted anew.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from lloki_atlas.errors import InputError
from lloki_atlas.stages.adapt_tasks import token_description
from lloki_atlas.stages.lineage import (
    AUTOENCODER,
    TOKEN_ROLE,
    atlas_config,
    expected_objects,
    model_key,
    token_key,
    token_name,
)
from lloki_atlas.stages.train import checkpoint_description
from lloki_atlas.store.catalog import Catalog


@dataclass(frozen=True)
class Token:
    """A token that was adapted, or has to be (`adapt`), to the autoencoder of a run.

    `slices` are those it is adapted on.
    """

    key: str
    slices: tuple[str, ...]
    random_state: int
    adapt: bool


@dataclass(frozen=True)
class Encoders:
    """What encodes a run: the autoencoder, which may have to be trained first (`train`), and tokens by name.

    `slices` are those the autoencoder is trained on, `known` the names of its own tokens.
    """

    key: str
    slices: tuple[str, ...]
    label_key: str | None
    train: bool
    known: frozenset[str]
    tokens: Mapping[str, Token] = field(default_factory=dict)

    def key_of(self, name: str) -> str:
        """Key of the model that encodes cells of a token."""
        return self.tokens[name].key if name in self.tokens else self.key

    def is_ready(self, name: str) -> bool:
        """Whether that model is there already."""
        return not self.train and not (name in self.tokens and self.tokens[name].adapt)

    @property
    def trained_on(self) -> tuple[str, ...]:
        """Slices whose embeddings are read before the models are there."""
        adapted = {name for token in self.tokens.values() if token.adapt for name in token.slices}
        base = self.slices if self.train or adapted else ()
        return tuple(sorted(adapted.union(base)))


def choose_encoders(
    catalog: Catalog,
    names: list[str],
    *,
    train_on: Iterable[str] | None = None,
    label_key: str | None = None,
    adapt_on: Iterable[str] | None = None,
    random_state: int | None = None,
) -> Encoders:
    """Choose what encodes slices.

    Parameters
    ----------
    catalog
        The atlas.
    names
        Slices to encode.
    train_on, label_key
        As for `plan`.
    adapt_on
        Slices whose platforms the autoencoder does not know: tokens are adapted on them.
    random_state
        Seed of these tokens; when None, that of the token that a platform has already, else that of the atlas.

    Raises
    ------
    InputError
        If a slice's platform has no token, or there is no current autoencoder to adapt to.
    """
    base = _choose_autoencoder(catalog, names, train_on, label_key)
    if adapt_on is not None and base.train:
        raise InputError(
            "there is no autoencoder to adapt to that fits the settings and the embeddings of the slices it was "
            "trained on: run the atlas first with `lloki-atlas run`, or train anew with `lloki-atlas train`"
        )
    wanted: dict[str, list[str]] = {}
    for slice_id in [] if adapt_on is None else sorted(set(adapt_on)):
        wanted.setdefault(_name(catalog, slice_id), []).append(slice_id)
    concerned = {_name(catalog, slice_id) for slice_id in names}
    tokens = {}
    for name, key in held_tokens(catalog).items():
        if name not in base.known and name not in wanted:
            token = _held_token(catalog, base, name, key, renew=base.train or name in concerned)
            if token is not None:
                tokens[name] = token
    for name, slices in wanted.items():
        if name in base.known:
            raise InputError(
                f"the autoencoder already has a token for slice '{slices[0]}': there is nothing to adapt, "
                "`lloki-atlas train` makes a new model"
            )
        held = catalog.state.models.get(TOKEN_ROLE + name)
        seed = random_state
        if seed is None and held is not None:
            seed = int(token_description(catalog, held)["settings"]["random_state"])
        tokens[name] = _new_token(catalog, base, name, slices, seed)
    chosen = Encoders(base.key, base.slices, base.label_key, base.train, base.known, tokens)
    _check_known(catalog, names if base.slices else [], chosen)
    return chosen


def held_tokens(catalog: Catalog) -> dict[str, str]:
    """Names of the tokens that a version has, and their keys."""
    models = sorted(catalog.state.models.items())
    return {role.removeprefix(TOKEN_ROLE): key for role, key in models if role.startswith(TOKEN_ROLE)}


def _choose_autoencoder(
    catalog: Catalog, names: list[str], train_on: Iterable[str] | None, label_key: str | None
) -> Encoders:
    current = catalog.state.models.get(AUTOENCODER)
    if current is None or train_on is not None:
        return _new_autoencoder(catalog, names if train_on is None else sorted(set(train_on)), label_key)
    description = checkpoint_description(catalog, current)
    trained, label_key = description["lineage"]["slices"], description["lineage"]["label_key"]
    # a slice that has left the atlas stays what the model was made of
    embeddings = {
        name: _embed_key(catalog, name) if name in catalog.state.slices else key for name, key in trained.items()
    }
    if model_key(atlas_config(catalog), embeddings, label_key) != current:
        return _new_autoencoder(catalog, [name for name in trained if name in catalog.state.slices], label_key)
    return Encoders(current, tuple(trained), label_key, train=False, known=frozenset(description["platforms"]))


def _new_autoencoder(catalog: Catalog, slices: list[str], label_key: str | None) -> Encoders:
    key = model_key(atlas_config(catalog), {name: _embed_key(catalog, name) for name in slices}, label_key)
    return Encoders(key, tuple(slices), label_key, train=True, known=frozenset(_name(catalog, name) for name in slices))


def _held_token(catalog: Catalog, base: Encoders, name: str, key: str, *, renew: bool) -> Token | None:
    """The token that a version has, or a new one from the slices that are left where it is no longer current."""
    description = token_description(catalog, key)
    seed, lineage = int(description["settings"]["random_state"]), description["lineage"]
    left = [slice_id for slice_id in lineage["slices"] if slice_id in catalog.state.slices]
    left = [slice_id for slice_id in left if _name(catalog, slice_id) == name]
    # as with the autoencoder, a slice that has left the atlas stays what the token was made of
    embeddings = {**lineage["slices"], **{slice_id: _embed_key(catalog, slice_id) for slice_id in left}}
    if not renew or token_key(base.key, name, embeddings, lineage["atlas"], seed) == key:
        return Token(key, tuple(lineage["slices"]), seed, adapt=False)
    return _new_token(catalog, base, name, left, seed) if left else None


def _new_token(catalog: Catalog, base: Encoders, name: str, slices: list[str], seed: int | None) -> Token:
    seed = atlas_config(catalog).autoencoder.random_state if seed is None else seed
    embeddings = {slice_id: _embed_key(catalog, slice_id) for slice_id in slices}
    key = token_key(base.key, name, embeddings, atlas_slices(catalog, base), seed)
    return Token(key, tuple(slices), seed, adapt=catalog.state.models.get(TOKEN_ROLE + name) != key)


def atlas_slices(catalog: Catalog, encoders: Encoders) -> list[str]:
    """Slices of the autoencoder that are still in the atlas: new platforms are compared with these."""
    return [name for name in encoders.slices if name in catalog.state.slices]


def _check_known(catalog: Catalog, names: list[str], encoders: Encoders) -> None:
    for slice_id in names:
        name = _name(catalog, slice_id)
        if name in encoders.known or name in encoders.tokens:
            continue
        record = catalog.slice(slice_id)
        new = "panel" if atlas_config(catalog).autoencoder.token_by == "platform" else "slice"
        adapt = f'adapt the atlas to it with `lloki-atlas adapt {catalog.root} --technology "{record.technology}"`, '
        raise InputError(
            f"the encoder has no token for slice '{slice_id}' ({record.technology}, a new {new}): "
            f"{'' if encoders.train else adapt}train it anew with `lloki-atlas train` on slices of every panel, or "
            "stop at the 512-d embedding with until='embed'"
        )


def _name(catalog: Catalog, slice_id: str) -> str:
    return token_name(catalog.slice(slice_id), atlas_config(catalog).autoencoder.token_by)


def _embed_key(catalog: Catalog, slice_id: str) -> str:
    return expected_objects(catalog, catalog.slice(slice_id))["embed"]
