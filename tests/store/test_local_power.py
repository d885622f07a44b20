"""What a power loss leaves of a local root (D3, D7, K6)."""

from __future__ import annotations

from pathlib import Path

import pytest

from ckptd.errors import ObjectExistsError, StoreUnavailableError
from ckptd.store.local import LocalStore
from tests.contracts.store_contract import CHUNK, COMMIT, RANK
from tests.fakes.power import PowerModel

VARIANTS = ({}, {"is_direct": False}, {"is_unnamed": False})


@pytest.fixture(params=VARIANTS, ids=lambda v: ",".join(v) or "default")
def store(request: pytest.FixtureRequest, tmp_path: Path) -> LocalStore:
    return LocalStore(str(tmp_path / "a" / "root"), **request.param)


@pytest.fixture
def power(tmp_path: Path, store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> PowerModel:
    return PowerModel(tmp_path, monkeypatch)


@pytest.mark.parametrize("size", [0, 10, (1 << 20) + 1])
def test_d7_what_put_new_returned_from_is_there(
    store: LocalStore, power: PowerModel, size: int
) -> None:
    for key in (RANK, COMMIT, CHUNK, "ckptd.json", "attempts/0007"):
        store.put_new(key, bytes(size))
        assert power.has(f"a/root/{key}")
    assert not power.torn


@pytest.mark.parametrize("size", [0, 10, (1 << 20) + 1])
def test_d7_what_put_returned_from_is_there(
    store: LocalStore, power: PowerModel, size: int
) -> None:
    for key in (RANK, COMMIT, RANK):
        store.put(key, bytes(size))
        assert power.has(f"a/root/{key}")
    assert not power.torn


def test_d3_deferred_objects_are_whole_at_once_and_durable_after_sync(
    store: LocalStore, power: PowerModel
) -> None:
    keys = [f"chunks/{n:02x}/{n:032x}" for n in (0, 1, 255)] + [CHUNK]
    for key in keys:
        store.put_new(key, bytes(1 << 20), is_deferred=True)
    assert not any(power.has(f"a/root/{key}") for key in keys)
    store.sync()
    assert all(power.has(f"a/root/{key}") for key in keys)
    assert not power.torn


def test_d3_sync_flushes_each_folder_once_whatever_the_number_of_objects(
    store: LocalStore, power: PowerModel
) -> None:
    store.put_new("chunks/00/0", b"", is_deferred=True)
    store.sync()
    for number in range(1, 20):
        store.put_new(f"chunks/00/{number}", b"", is_deferred=True)
    power.log.clear()
    store.sync()
    assert power.log == ["fsync"]


def test_d7_a_folder_that_another_process_made_is_made_durable_too(
    store: LocalStore, power: PowerModel
) -> None:
    LocalStore(store.url).put_new("ranks/000000001000-0007/00001", b"x", is_deferred=True)
    store.put_new(RANK, b"y")
    assert power.has(f"a/root/{RANK}")


@pytest.mark.parametrize("is_deferred", [False, True])
def test_d3_an_object_that_another_process_deferred_becomes_durable_here(
    store: LocalStore, power: PowerModel, is_deferred: bool
) -> None:
    LocalStore(store.url).put_new(CHUNK, b"x", is_deferred=True)
    assert not power.has(f"a/root/{CHUNK}")
    with pytest.raises(ObjectExistsError):
        store.put_new(CHUNK, b"x", is_deferred=is_deferred)
    assert power.has(f"a/root/{CHUNK}") is not is_deferred
    store.sync()
    assert power.has(f"a/root/{CHUNK}")


def test_d7_a_folder_that_was_emptied_and_made_again_is_durable_again(
    store: LocalStore, power: PowerModel
) -> None:
    store.put_new(RANK, b"x")
    store.delete(RANK)
    assert list((Path(store.url) / "ranks").iterdir()) == []
    store.put_new(RANK, b"y")
    assert power.has(f"a/root/{RANK}")


def test_d10_what_a_failed_sync_took_away_can_be_written_anew(
    store: LocalStore, power: PowerModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ckptd import failpoints

    store.put_new("chunks/00/1", b"kept")
    store.put_new(CHUNK, b"lost", is_deferred=True)
    with pytest.raises(ObjectExistsError):
        store.put_new("chunks/00/1", b"kept", is_deferred=True)
    failpoints.arm("store.sync=raise")
    with pytest.raises(StoreUnavailableError):
        store.sync()
    assert [e.key for e in store.list("")] == ["chunks/00/1"]
    store.put_new(CHUNK, b"lost", is_deferred=True)
    store.sync()
    assert power.has(f"a/root/{CHUNK}")
