"""Creation in a bucket: one winner whatever becomes of the answers, and no trust in a storage without conditions."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import uuid
from concurrent.futures import ThreadPoolExecutor

import obstore
import pytest
from obstore.exceptions import AlreadyExistsError
from support.s3 import INSTALLED, NEEDS, Bucket, s3_server

from lloki_atlas.errors import InputError, StorageError
from lloki_atlas.store import buckets
from lloki_atlas.store.buckets import client, create
from lloki_atlas.store.places import place


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(buckets, "_PAUSE", 0.01)


def probed(bucket):
    """The bucket's address, seen to honour conditions before faults begin."""
    assert create(str(bucket), "a/first", b"1")
    return str(bucket)


def test_an_object_is_created_once(bucket):
    assert create(str(bucket), "a/x", b"mine") is True
    assert create(str(bucket), "a/x", b"theirs") is False
    assert create(str(bucket), "a/x", b"mine") is True  # asked again after an answer was lost
    assert place(f"{bucket}/a/x").read_bytes() == b"mine"


def test_the_probe_leaves_nothing_and_is_made_once(bucket):
    probed(bucket)
    bucket.faults()
    create(str(bucket), "b/x", b"1")
    assert [request[:2] for request in bucket.requests()] == [
        ["PUT", f"/{bucket.name}/b/x"],
        ["GET", f"/{bucket.name}/b/x"],
    ]
    assert sorted(place(str(bucket)).files()) == ["a/first", "b/x"]


def test_a_storage_that_ignores_conditions_is_refused(bucket):
    bucket.faults({"kind": "ignore", "times": 1000})
    with pytest.raises(StorageError, match="use one that honours If-None-Match"):
        create(str(bucket), "versions/00000001.json", b"1")
    assert list(place(str(bucket)).files()) == []


def test_a_won_creation_whose_answer_is_lost_is_won(bucket):
    address = probed(bucket)
    bucket.faults({"kind": "lose", "method": "PUT", "match": "versions"})
    with pytest.raises(AlreadyExistsError):  # what the client alone would say
        obstore.put(client(address), "versions/0", b"mine", mode="create")
    bucket.faults({"kind": "lose", "method": "PUT", "match": "versions"})
    assert create(address, "versions/1", b"mine") is True
    assert place(f"{address}/versions/1").read_bytes() == b"mine"


def test_a_conflict_after_which_nothing_is_stored_is_tried_again(bucket):
    address = probed(bucket)
    bucket.faults({"kind": "conflict", "method": "PUT", "match": "versions", "times": 3})
    assert create(address, "versions/1", b"mine") is True


def test_a_conflict_with_a_winner_is_lost(bucket):
    address = probed(bucket)
    assert create(address, "versions/1", b"theirs")
    bucket.faults({"kind": "conflict", "method": "PUT", "match": "versions", "times": 3})
    assert create(address, "versions/1", b"mine") is False


def test_conflicts_without_end_are_an_error(bucket):
    address = probed(bucket)
    bucket.faults({"kind": "conflict", "method": "PUT", "match": "versions", "times": 1000})
    with pytest.raises(StorageError, match=r"could not be stored.*run again"):
        create(address, "versions/1", b"mine")


@pytest.mark.parametrize("kind", ["drop", "fail", "slow"])
def test_an_answer_that_does_not_come_in_order_changes_nothing(bucket, kind):
    address = probed(bucket)
    bucket.faults({"kind": kind, "method": "PUT", "match": "versions", "times": 2, "seconds": 0.5})
    assert create(address, "versions/1", b"mine") is True
    assert create(address, "versions/1", b"theirs") is False


def test_an_answer_that_never_comes_is_no_loss(bucket, monkeypatch):
    monkeypatch.setenv("LLOKI_ATLAS_STORAGE_TIMEOUT", "0.3")
    address = probed(bucket)
    client.cache_clear()
    bucket.faults({"kind": "slow", "method": "PUT", "match": "versions", "times": 1, "seconds": 3})
    try:
        assert create(address, "versions/1", b"mine") is True
    finally:
        client.cache_clear()


@pytest.mark.parametrize("kind", ["drop", "fail"])
def test_reads_and_listings_are_tried_again(bucket, kind):
    file = place(f"{bucket}/a/x")
    file.write_bytes(b"content")
    for ask in (file.read_bytes, lambda: list(file.parent.iterdir()), file.stat, lambda: list(file.parent.files())):
        bucket.faults({"kind": kind, "times": 1})
        assert ask()


def test_a_server_that_is_gone_is_said_to_be(monkeypatch):
    for name, value in {"AWS_ENDPOINT_URL": "http://127.0.0.1:9", "AWS_ACCESS_KEY_ID": "k", "AWS_REGION": "r"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "very-secret")
    monkeypatch.setenv("LLOKI_ATLAS_STORAGE_RETRIES", "0")
    gone = place(f"s3://gone-{uuid.uuid4().hex}/a")
    for ask in (gone.read_bytes, gone.is_dir, lambda: gone.write_bytes(b""), lambda: gone.create(b"")):
        with pytest.raises(StorageError, match="run again") as caught:
            ask()
        assert "very-secret" not in "".join(str(part) for part in (caught.value, caught.value.__cause__))


def test_a_bucket_that_does_not_exist_is_said_to_be(bucket):
    missing = place(f"s3://none-{uuid.uuid4().hex}/a")
    with pytest.raises((StorageError, FileNotFoundError)):
        missing.write_bytes(b"")


def race(address, key, start, results):
    """Try to create 12 objects; which of them this process made."""
    start.wait()
    results.put([n for n in range(12) if create(address, f"{key}/key-{n}", f"{os.getpid()}".encode())])


def raced(bucket, key="race"):
    """How many winners each object had, of four processes."""
    context = multiprocessing.get_context("spawn")
    start, results = context.Barrier(4), context.Queue()
    workers = [context.Process(target=race, args=(str(bucket), key, start, results)) for _ in range(4)]
    for worker in workers:
        worker.start()
    won = [n for _ in workers for n in results.get(timeout=120)]
    for worker in workers:
        worker.join()
    return [won.count(n) for n in range(12)]


def test_four_processes_at_one_key_have_one_winner(bucket):
    assert raced(bucket) == [1] * 12


def test_racing_processes_whose_answers_are_lost_have_one_winner(bucket):
    bucket.faults(
        {"kind": "lose", "method": "PUT", "match": "key-", "times": 15},
        {"kind": "conflict", "method": "PUT", "match": "key-", "times": 15},
    )
    assert raced(bucket) == [1] * 12


@pytest.mark.slow
def test_the_rig_can_show_two_winners(monkeypatch):
    """A server that looks first and stores later lets two creators win: the races above could fail."""
    if not INSTALLED:
        pytest.skip(NEEDS)
    with s3_server("--racy") as endpoint:
        made = Bucket(endpoint)
        for name, value in made.environment.items():
            monkeypatch.setenv(name, value)
        store = client(str(made))

        def answer(key):
            try:
                obstore.put(store, f"k{key}", b"x", mode="create")
            except AlreadyExistsError:
                return 0
            return 1

        with ThreadPoolExecutor(8) as pool:
            winners = [sum(pool.map(answer, [key] * 8)) for key in range(300)]
    assert max(winners) > 1


def test_importing_the_store_contacts_nobody():
    code = "import lloki_atlas.store.catalog, sys; print('boto3' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"


def test_a_local_file_that_may_not_be_read_is_no_matter_of_credentials():
    with pytest.raises(PermissionError) as caught, buckets.storage_errors("folder"):
        raise PermissionError(13, "Permission denied", "folder/file")
    assert not isinstance(caught.value, StorageError)


@pytest.mark.parametrize("name", ["LLOKI_ATLAS_STORAGE_TIMEOUT", "LLOKI_ATLAS_STORAGE_RETRIES"])
@pytest.mark.parametrize("value", ["soon", "-1", "1e3x"])
def test_a_setting_that_is_no_number_is_refused(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=f"{name} is '{value}' in the environment: give a number"):
        client(f"s3://other-{uuid.uuid4().hex}")
