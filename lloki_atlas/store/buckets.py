"""Object storage through obstore: one client a bucket, and creation that at most one of many writers wins.

Credentials, region and endpoint come from the environment, as each provider's own tools read them (`AWS_…`, `GOOGLE_…`,
`AZURE_…`); nothing of them is stored, logged or sent along with tasks.
"""

from __future__ import annotations

import os
import re
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import lru_cache
from typing import Any

import obstore
from obstore import exceptions
from obstore.store import from_url

from lloki_atlas.errors import InputError, StorageError

SCHEMES = ("s3://", "gs://", "az://")
# a create whose answer says neither "yours" nor "another's" is asked again, after so many seconds more each time
_ATTEMPTS = 6
_PAUSE = 0.2
# buckets that were seen to honour conditions
_PROBED: set[str] = set()


@lru_cache(maxsize=256)
def client(address: str) -> Any:
    """The client of a bucket, `s3://name`, or of what is below `s3://name/folder`, with its own connections.

    Raises
    ------
    InputError
        If the address or the settings in the environment cannot be used.
    """
    options: dict[str, Any] = {
        "client_options": {"timeout": timedelta(seconds=_setting("LLOKI_ATLAS_STORAGE_TIMEOUT", 60))},
        "retry_config": {
            "max_retries": int(_setting("LLOKI_ATLAS_STORAGE_RETRIES", 10)),
            "retry_timeout": timedelta(minutes=3),
        },
    }
    if address.startswith("s3://") and os.environ.get("AWS_ENDPOINT_URL", "").startswith("http://"):
        options["client_options"]["allow_http"] = True
    try:
        return from_url(address, **options)
    except exceptions.BaseError as error:
        raise InputError(f"{address} cannot be used: {_first_line(error)}") from error


@contextmanager
def storage_errors(place: Any) -> Iterator[None]:
    """Turn errors of the client into ours; a missing object stays a FileNotFoundError.

    Raises
    ------
    StorageError
        If the storage cannot be reached, or refuses.
    """
    try:
        yield
    except (exceptions.UnauthenticatedError, exceptions.PermissionDeniedError) as error:
        raise StorageError(f"{place} refuses access: check the credentials in the environment") from error
    except exceptions.NotFoundError as error:
        raise FileNotFoundError(str(place)) from error
    except exceptions.BaseError as error:
        raise StorageError(f"{place} cannot be read or written ({_first_line(error)}): run again") from error


def create(bucket: str, key: str, data: bytes) -> bool:
    """Store an object unless there is one; tell whether what is stored is `data`.

    An answer is no proof: a won one may be lost and asked again, and a conflict (409) may mean that nothing was stored.
    So what is stored decides. Two writers of equal bytes are both told True.

    Raises
    ------
    StorageError
        If the storage does not honour conditions, or cannot be reached.
    """
    where = f"{bucket}/{key}"
    if bucket not in _PROBED:
        _probe(bucket, key.rpartition("/")[0])
        _PROBED.add(bucket)
    problem: Exception | None = None
    for attempt in range(_ATTEMPTS):
        try:
            obstore.put(client(bucket), key, data, mode="create", use_multipart=False)
        except exceptions.AlreadyExistsError:
            pass
        except exceptions.BaseError as error:
            problem = error  # it may be stored all the same
        with storage_errors(where):
            try:
                return bytes(obstore.get(client(bucket), key).bytes()) == data
            except FileNotFoundError:
                time.sleep(_PAUSE * attempt)
    reason = f" ({_first_line(problem)})" if problem is not None else ""
    raise StorageError(f"{where} could not be stored{reason}: run again") from problem


def _probe(bucket: str, folder: str) -> None:
    """Refuse a storage that would let two writers create one object."""
    key = f"{folder}/.probe-{uuid.uuid4().hex}.tmp".lstrip("/")
    with storage_errors(f"{bucket}/{folder}"):
        obstore.put(client(bucket), key, b"one")
        try:
            obstore.put(client(bucket), key, b"two", mode="create", use_multipart=False)
        except exceptions.AlreadyExistsError:
            return
        finally:
            obstore.delete(client(bucket), key)
    raise StorageError(
        f"the storage of {bucket} lets an object be created twice, so commits could be lost there: "
        "use one that honours If-None-Match"
    )


def _setting(name: str, default: float) -> float:
    text = os.environ.get(name) or str(default)
    if not re.fullmatch(r"\d+(\.\d+)?", text):
        raise InputError(f"{name} is {text!r} in the environment: give a number")
    return float(text)


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
