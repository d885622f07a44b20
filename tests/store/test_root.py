from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from ckptd.errors import (
    CheckpointNotFoundError,
    CkptdError,
    ConfigError,
    StoreAccessDeniedError,
    StoreUnavailableError,
    UnsupportedFormatError,
)
from ckptd.store.base import Store
from ckptd.store.local import LocalStore
from ckptd.store.memory import MemoryStore
from ckptd.store.root import check_root, create_root
from tests.fakes.stores import FailingStore

Make = Callable[[], Store]


@pytest.fixture(params=["memory", "local", "named"])
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Make:
    """Return what opens the same empty store again and again."""
    memory = MemoryStore()
    makers: dict[str, Make] = {
        "memory": lambda: memory,
        "local": lambda: LocalStore(str(tmp_path / "root")),
        "named": lambda: LocalStore(str(tmp_path / "root"), is_unnamed=False),
    }
    return makers[request.param]


def test_a_root_is_made_once_and_then_found(make: Make) -> None:
    create_root(make())
    assert make().get("ckptd.json", max_bytes=99) == b'{"format":1}'
    create_root(make())
    check_root(make())


def test_racing_creators_all_succeed(make: Make) -> None:
    errors: list[CkptdError] = []
    gate = threading.Barrier(4)

    def create() -> None:
        gate.wait()
        try:
            create_root(make())
            make().put_new(f"attempts/{threading.get_ident() % 10**15}", b"")
        except CkptdError as error:
            errors.append(error)

    workers = [threading.Thread(target=create) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert errors == []


def test_a_reader_makes_no_root(make: Make) -> None:
    with pytest.raises(CheckpointNotFoundError, match="no ckptd root at"):
        check_root(make())
    with pytest.raises(CheckpointNotFoundError):
        check_root(make())


def test_a_folder_that_a_crashed_creator_left_becomes_a_root(tmp_path: Path) -> None:
    (tmp_path / "root/tmp").mkdir(parents=True)
    (tmp_path / "root/tmp/.1-ab").touch()
    (tmp_path / "root/lost+found").mkdir()
    create_root(LocalStore(str(tmp_path / "root")))


@pytest.mark.parametrize("name", ["thesis.tex", ".bashrc", "ranks", "attempts", "Photos"])
def test_a_folder_that_holds_something_else_is_refused_untouched(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    with pytest.raises(ConfigError, match="choose an empty folder") as caught:
        create_root(LocalStore(str(tmp_path)))
    assert name in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_a_store_with_other_objects_is_refused() -> None:
    store = MemoryStore()
    store.put("attempts/0001", b"")
    with pytest.raises(ConfigError, match="not a ckptd root"):
        create_root(store)


@pytest.mark.parametrize("check", [create_root, check_root])
def test_a_newer_format_is_refused_with_advice(make: Make, check: Callable[[Store], None]) -> None:
    make().put("ckptd.json", b'{"format": 2, "zoned": true}')
    with pytest.raises(UnsupportedFormatError, match=r"format 2.*newer ckptd"):
        check(make())


def test_further_fields_of_this_format_are_fine(make: Make) -> None:
    make().put("ckptd.json", b'{"format": 1, "note": "x"}')
    create_root(make())
    check_root(make())


@pytest.mark.parametrize(
    "data",
    [
        b"", b"{}", b"[]", b"null", b'{"format":0}', b'{"format":-1}', b'{"format":"1"}',
        b'{"format":1.5}', b'{"format":true}', b'{"format":1', b"\xff\xfe", b'{"format":1}x',
        b"[" * 10_000, b" " * (1 << 20), b'{"format":' + b"9" * 400 + b"}",
        b'{"format":' + b"9" * 5000 + b"}",
    ],
    ids=lambda d: repr(d[:14]),
)  # fmt: skip
@pytest.mark.parametrize("check", [create_root, check_root])
def test_a_damaged_record_is_a_configuration_error_and_stays(
    data: bytes, check: Callable[[Store], None]
) -> None:
    store = MemoryStore()
    store.put("ckptd.json", data)
    with pytest.raises(ConfigError, match="damaged"):
        check(store)
    assert store.get("ckptd.json", max_bytes=2 << 20) == data


@pytest.mark.parametrize("check", [create_root, check_root])
@pytest.mark.parametrize(
    "error",
    [StoreUnavailableError("ckptd.json", "down"), StoreAccessDeniedError("ckptd.json", "no")],
)
def test_r1_a_store_that_does_not_answer_is_not_a_missing_root(
    check: Callable[[Store], None], error: CkptdError
) -> None:
    inner = MemoryStore()
    with pytest.raises(type(error)):
        check(FailingStore(inner, frozenset({"get"}), error))
    assert list(inner.list("")) == []


def test_l5_a_root_that_takes_no_writes_is_refused_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    create_root(LocalStore(str(tmp_path / "root")))
    store = LocalStore(str(tmp_path / "root"))
    check_root(store)

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("ckptd.store.temps.Temps.make_named", refuse)
    with pytest.raises(StoreAccessDeniedError, match="give this user access"):
        create_root(store)
