"""Links and other odd things planted in a local root (S4, L11)."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from ckptd.errors import ConfigError, ObjectExistsError, StoreAccessDeniedError, StoreError
from ckptd.store.local import LocalStore
from tests.contracts.store_contract import CHUNK, COMMIT, RANK

Call = Callable[[LocalStore], object]

READS: dict[str, Call] = {
    "get": lambda s: s.get(RANK, max_bytes=99),
    "read_into": lambda s: s.read_into(RANK, 0, memoryview(bytearray(1))),
}
WRITES: dict[str, Call] = {
    "put": lambda s: s.put(RANK, b"evil"),
    "put_new": lambda s: s.put_new(RANK, b"evil"),
    "deferred": lambda s: s.put_new(RANK, b"evil", is_deferred=True),
    "delete": lambda s: s.delete(RANK),
}
LISTS: dict[str, Call] = {
    "list": lambda s: list(s.list("ranks/")),
    "list all": lambda s: list(s.list("")),
    "list step": lambda s: list(s.list("ranks/000000001000-0007/")),
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    outside = tmp_path / "outside"
    (outside / "000000001000-0007").mkdir(parents=True)
    (outside / "000000001000-0007" / "00003").write_bytes(b"secret")
    (outside / "00003").write_bytes(b"secret")
    (tmp_path / "root" / "ranks").mkdir(parents=True)
    return tmp_path / "root"


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("name", [*READS, *WRITES, *LISTS])
@pytest.mark.parametrize("depth", [1, 2])
def test_s4_l11_a_linked_folder_is_never_followed(root: Path, name: str, depth: int) -> None:
    outside = root.parent / "outside"
    if depth == 1:
        (root / "ranks").rmdir()
        (root / "ranks").symlink_to(outside)
    else:
        (root / "ranks" / "000000001000-0007").symlink_to(outside)
    before = snapshot(outside)
    with pytest.raises(StoreAccessDeniedError, match="links are never followed"):
        {**READS, **WRITES, **LISTS}[name](LocalStore(str(root)))
    assert snapshot(outside) == before


@pytest.mark.parametrize("name", [*READS, "put_new", "deferred", *LISTS])
def test_s4_l11_a_linked_object_is_never_followed(root: Path, name: str) -> None:
    outside = root.parent / "outside"
    (root / "ranks/000000001000-0007").mkdir()
    (root / RANK).symlink_to(outside / "00003")
    before = snapshot(outside)
    with pytest.raises(StoreAccessDeniedError, match="links are never followed"):
        {**READS, **WRITES, **LISTS}[name](LocalStore(str(root)))
    assert snapshot(outside) == before


@pytest.mark.parametrize("name", ["put", "delete"])
def test_s4_l11_replacing_or_deleting_takes_the_link_and_leaves_its_target(
    root: Path, name: str
) -> None:
    outside = root.parent / "outside"
    (root / "ranks/000000001000-0007").mkdir()
    (root / RANK).symlink_to(outside / "00003")
    before = snapshot(outside)
    WRITES[name](LocalStore(str(root)))
    assert not (root / RANK).is_symlink()
    assert snapshot(outside) == before


def test_s4_l11_a_dangling_link_under_a_key_creates_nothing(root: Path) -> None:
    (root / "checkpoints").mkdir()
    (root / COMMIT).symlink_to(root.parent / "made")
    with pytest.raises(StoreAccessDeniedError):
        LocalStore(str(root)).put_new(COMMIT, b"x")
    assert not (root.parent / "made").exists()


def test_s4_l11_a_linked_temp_folder_is_refused(root: Path) -> None:
    (root / "tmp").symlink_to(root.parent / "outside")
    for store in (LocalStore(str(root)), LocalStore(str(root), is_unnamed=False)):
        with pytest.raises(StoreAccessDeniedError):
            store.put(RANK, b"x")
    assert sorted(os.listdir(root.parent / "outside")) == ["00003", "000000001000-0007"][::-1]


def test_s4_l11_a_root_that_is_a_link_is_refused(root: Path) -> None:
    link = root.with_name("link")
    link.symlink_to(root)
    for call in (READS["get"], WRITES["put_new"], LISTS["list all"]):
        with pytest.raises(StoreAccessDeniedError, match="symbolic link; give the folder"):
            call(LocalStore(str(link)))
    link.unlink()
    link.symlink_to(root.with_name("nowhere"))
    with pytest.raises(StoreAccessDeniedError, match="symbolic link; give the folder"):
        LocalStore(str(link)).put_new(RANK, b"x")


def test_a_root_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.ckpt").write_bytes(b"zip")
    for call in (READS["get"], WRITES["put_new"], LISTS["list all"]):
        with pytest.raises(ConfigError, match="not the folder of a ckptd root"):
            call(LocalStore(str(tmp_path / "x.ckpt")))


def test_a_folder_above_the_root_may_be_a_link(root: Path) -> None:
    (root.parent.parent / "way").symlink_to(root.parent)
    store = LocalStore(str(root.parent.parent / "way" / "root"))
    store.put_new(RANK, b"x")
    assert [e.key for e in store.list("ranks/")] == [RANK]
    (root.parent.parent / "way").unlink()


def test_names_that_are_no_keys_are_left_out_of_listings_and_links_to_them_too(root: Path) -> None:
    store = LocalStore(str(root))
    store.put_new(RANK, b"x")
    for name in (
        "UPPER",
        ".nfs0001",
        "with space",
        "new\nline",
        "caf\u00e9",
        "x~",
        "ranks/.DS_Store",
    ):
        (root / name).touch()
    (root / ".snapshot").mkdir()
    (root / "ranks/000000001000-0007/deeper").mkdir()
    (root / "ranks/000000001000-0007/deeper/still").touch()
    (root / "newest").symlink_to(root / "ranks")
    (root / "README.md").symlink_to("/etc/passwd")
    assert [e.key for e in store.list("")] == [RANK]


def test_a_fifo_or_a_folder_under_a_key_is_an_error_and_hangs_nobody(root: Path) -> None:
    store = LocalStore(str(root))
    (root / "chunks/3f").mkdir(parents=True)
    os.mkfifo(root / CHUNK)
    (root / RANK).mkdir(parents=True)
    for key in (CHUNK, RANK):
        with pytest.raises(StoreError, match="not a file"):
            store.get(key, max_bytes=1)
        with pytest.raises(ObjectExistsError):
            store.put_new(key, b"x")
    with pytest.raises(StoreAccessDeniedError):
        store.put(RANK, b"x")
    assert list(store.list("")) == []
