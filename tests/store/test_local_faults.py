"""What a local store does when the file system fails (D10, L1 to L8, P2)."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ckptd import failpoints
from ckptd.errors import (
    ConfigError,
    ObjectExistsError,
    ObjectNotFoundError,
    StoreAccessDeniedError,
    StoreError,
    StoreFullError,
    StoreUnavailableError,
)
from ckptd.store import direct
from ckptd.store.local import LocalStore
from ckptd.store.temps import Temp
from tests.contracts.store_contract import CHUNK, COMMIT, RANK

REPO = Path(__file__).parent.parent.parent
LARGE = (1 << 20) + 5
VARIANTS = ({}, {"is_direct": False}, {"is_unnamed": False})


@pytest.fixture(params=VARIANTS, ids=lambda v: ",".join(v) or "default")
def store(request: pytest.FixtureRequest, tmp_path: Path) -> LocalStore:
    store = LocalStore(str(tmp_path / "root"), **request.param)
    store.put_new("ckptd.json", b"{}")
    return store


def files(store: LocalStore) -> list[str]:
    """Return every file below the root, temporary ones too."""
    root = Path(store.url)
    return sorted(str(p.relative_to(root)) for p in root.rglob("*") if not p.is_dir())


def failing(code: int, *, on: int = 1) -> Callable[..., None]:
    """Return a call that fails the `on`th time."""
    left = [on]

    def fail(*_: object, **__: object) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise OSError(code, os.strerror(code))

    return fail


WRITERS: dict[str, Callable[[LocalStore, bytes], None]] = {
    "put": lambda store, data: store.put(RANK, data),
    "put_new": lambda store, data: store.put_new(RANK, data),
    "deferred": lambda store, data: store.put_new(RANK, data, is_deferred=True),
}


@pytest.fixture(params=WRITERS)
def write(request: pytest.FixtureRequest) -> Callable[[LocalStore, bytes], None]:
    return WRITERS[request.param]


@pytest.mark.parametrize(
    ("code", "kind", "is_retryable"),
    [
        (errno.ENOSPC, StoreFullError, False),
        (errno.EDQUOT, StoreFullError, False),
        (errno.EFBIG, StoreFullError, False),
        (errno.EACCES, StoreAccessDeniedError, False),
        (errno.EPERM, StoreAccessDeniedError, False),
        (errno.EROFS, StoreAccessDeniedError, False),
        (errno.EIO, StoreUnavailableError, True),
        (errno.ESTALE, StoreUnavailableError, True),
        (errno.ETIMEDOUT, StoreUnavailableError, True),
        (errno.EMFILE, StoreUnavailableError, True),
        (errno.ENAMETOOLONG, StoreError, False),
    ],
)
@pytest.mark.parametrize("call", ["pwrite", "open", "fsync"])
def test_l1_each_error_has_its_meaning_and_leaves_nothing(
    store: LocalStore,
    monkeypatch: pytest.MonkeyPatch,
    call: str,
    code: int,
    kind: type[StoreError],
    is_retryable: bool,
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(os, call, failing(code))
        with pytest.raises(kind) as caught:
            store.put_new(RANK, bytes(LARGE))
    assert type(caught.value) is kind
    assert caught.value.key == RANK
    assert caught.value.retryable is is_retryable
    assert store.url in str(caught.value)
    assert files(store) == ["ckptd.json"]
    store.put_new(RANK, b"again")
    assert store.get(RANK, max_bytes=9) == b"again"


@pytest.mark.parametrize("size", [0, 5, LARGE])
def test_d10_after_an_error_of_fsync_nothing_is_left_and_that_file_is_never_flushed_again(
    store: LocalStore,
    write: Callable[[LocalStore, bytes], None],
    monkeypatch: pytest.MonkeyPatch,
    size: int,
) -> None:
    fsync = os.fsync
    flushed: list[int] = []

    def fail_first(fd: int) -> None:
        flushed.append(os.fstat(fd).st_ino)
        if len(flushed) == 1:
            raise OSError(errno.EIO, "injected")
        fsync(fd)

    monkeypatch.setattr(os, "fsync", fail_first)
    with pytest.raises(StoreUnavailableError):
        write(store, bytes(size))
    assert len(flushed) == 1
    assert files(store) == ["ckptd.json"]
    write(store, bytes(size))
    assert len(store.get(RANK, max_bytes=size)) == size


def test_d10_after_an_error_of_close_nothing_is_left(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    close = Temp.close

    def lose(temp: Temp) -> None:
        close(temp)
        raise OSError(errno.EDQUOT, "injected")

    monkeypatch.setattr(Temp, "close", lose)
    with pytest.raises(StoreFullError):
        store.put_new(RANK, b"x")
    assert files(store) == ["ckptd.json"]


def test_d10_a_name_that_could_not_be_flushed_is_taken_away(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", failing(errno.EIO, on=2))
    with pytest.raises(StoreUnavailableError):
        store.put_new(RANK, b"x")
    assert files(store) == ["ckptd.json"]


def test_d10_a_failed_sync_takes_away_what_it_was_to_keep_and_nothing_else(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.put_new("chunks/00/1", b"", is_deferred=True)
    store.sync()
    for number in range(2, 6):
        store.put_new(f"chunks/0{number}/{number}", b"", is_deferred=True)
    with pytest.raises(ObjectExistsError):
        store.put_new("chunks/00/1", b"", is_deferred=True)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", failing(errno.EIO, on=3))
        with pytest.raises(StoreUnavailableError):
            store.sync()
    assert files(store) == ["chunks/00/1", "ckptd.json"]
    store.sync()


@pytest.mark.parametrize("most", [1 << 18, (1 << 18) + 5000, 12288 + 1])
def test_l2_short_writes_go_on_where_they_ended(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    pwrite = os.pwrite

    def short(fd: int, data: memoryview, offset: int) -> int:
        # The kernel refuses odd direct writes; one that ends early may still report an odd count.
        pwrite(fd, data, offset)
        return min(most, len(data))

    monkeypatch.setattr(os, "pwrite", short)
    data = os.urandom(LARGE)
    was_direct = store._is_direct
    store.put_new(CHUNK, data)
    assert store.get(CHUNK, max_bytes=LARGE) == data
    assert store._is_direct == was_direct  # an odd count that was gone on from would be refused


def test_l2_a_write_without_progress_fails(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "pwrite", lambda *_: 0)
    for size in (5, LARGE):
        with pytest.raises(StoreUnavailableError):
            store.put_new(CHUNK, bytes(size))
    assert files(store) == ["ckptd.json"]


@pytest.mark.skipif(not direct.HAS_DIRECT, reason="no O_DIRECT here")
def test_o_direct_is_used_where_it_works_and_given_up_where_it_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[bool] = []

    def refuse(fd: int, data: memoryview) -> None:
        tried.append(True)
        direct._write_bounced(fd, memoryview(b"\xff" * (2 << 20)), 0)
        raise OSError(errno.EINVAL, "injected")

    monkeypatch.setattr(direct, "_write_blocks", refuse)
    store = LocalStore(str(tmp_path / "root"))
    data = os.urandom(LARGE)
    store.put_new("chunks/00/0", data[:-7])
    store.put_new("chunks/00/1", data)
    assert tried == [True]
    assert store.get("chunks/00/0", max_bytes=LARGE) == data[:-7]
    assert store.get("chunks/00/1", max_bytes=LARGE) == data


def test_l7_a_link_that_reports_an_error_though_it_was_made_counts_as_made(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = os.link
    for number, code in enumerate((errno.EEXIST, errno.EIO, errno.ETIMEDOUT)):

        def lie(src: str, dst: str, code: int = code, **kwargs: int) -> None:
            link(src, dst, **kwargs)
            raise OSError(code, "injected")

        monkeypatch.setattr(os, "link", lie)
        store.put_new(f"attempts/{number:04d}", b"mine")
    assert [e.bytes for e in store.list("attempts/")] == [4, 4, 4]
    assert not [name for name in files(store) if name.startswith("tmp")]


def test_l7_a_rename_that_reports_an_error_though_it_was_made_counts_as_made(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = os.rename

    def lie(src: str, dst: str, **kwargs: int) -> None:
        rename(src, dst, **kwargs)
        raise FileNotFoundError(errno.ENOENT, "injected")

    monkeypatch.setattr(os, "rename", lie)
    store.put(COMMIT, b"tombstone")
    assert store.get(COMMIT, max_bytes=9) == b"tombstone"


def test_l8_a_root_that_spans_file_systems_is_a_configuration_error(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "link", failing(errno.EXDEV))
    with pytest.raises(ConfigError, match="several file systems"):
        store.put_new(COMMIT, b"x")
    assert files(store) == ["ckptd.json"]


def test_a_file_that_shrinks_while_it_is_read_is_an_error(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.put_new(RANK, bytes(100))
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, out, at: preadv(fd, out, at) if at < 50 else 0)
    assert store.read_into(RANK, 0, memoryview(bytearray(10))) == 100
    with pytest.raises(StoreError, match="shorter"):
        store.read_into(RANK, 60, memoryview(bytearray(10)))


def test_a_vanished_root_is_unavailable_and_never_empty(store: LocalStore) -> None:
    store.put_new(RANK, b"x")
    root = Path(store.url)
    root.rename(root.with_name("away"))
    root.mkdir()
    _expect_unavailable(store)
    root.rmdir()
    _expect_unavailable(store)
    subprocess.run(["rm", "-r", str(root.with_name("away"))], check=True)
    with pytest.raises(StoreUnavailableError):
        store.put_new(CHUNK, b"x")
    assert not root.exists()


def _expect_unavailable(store: LocalStore) -> None:
    for call in (
        lambda: store.get(CHUNK, max_bytes=1),
        lambda: store.read_into(CHUNK, 0, memoryview(bytearray(1))),
        lambda: list(store.list("")),
        lambda: list(store.list("ranks/")),
        lambda: list(store.list("checkpoints/")),
        lambda: store.delete(CHUNK),
    ):
        with pytest.raises(StoreUnavailableError):
            call()


def test_a_root_that_never_was_has_no_objects_and_no_listing(tmp_path: Path) -> None:
    store = LocalStore(str(tmp_path / "none"))
    with pytest.raises(ObjectNotFoundError):
        store.get(RANK, max_bytes=1)
    with pytest.raises(StoreUnavailableError):
        list(store.list(""))
    with pytest.raises(StoreUnavailableError):
        store.delete(RANK)
    assert not (tmp_path / "none").exists()


def test_a_closed_store_refuses(store: LocalStore) -> None:
    store.close()
    with pytest.raises(StoreUnavailableError, match="closed"):
        store.put_new(RANK, b"x")
    with pytest.raises(StoreUnavailableError, match="closed"):
        store.get(RANK, max_bytes=1)


def test_objects_deleted_during_a_listing_are_left_out(store: LocalStore) -> None:
    for number in range(3):
        store.put_new(f"ranks/00000000100{number}-0007/00000", b"x")
    listing = store.list("ranks/")
    first = next(listing)
    store.delete("ranks/000000001001-0007/00000")
    assert [first.key, *(e.key for e in listing)] == [
        "ranks/000000001000-0007/00000",
        "ranks/000000001002-0007/00000",
    ]


@contextmanager
def nobody(*closed: Path) -> Iterator[None]:
    """Be a user who may not write below `closed`, or not read them either."""
    modes = [(path, path.stat().st_mode) for path in closed]
    for path in closed:
        path.chmod(0)
    was_root = os.geteuid() == 0
    if was_root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if was_root:
            os.seteuid(0)
        for path, mode in modes:
            path.chmod(mode)


def test_l5_what_may_not_be_read_is_denied_and_never_missing_or_empty(store: LocalStore) -> None:
    store.put_new(CHUNK, b"x")
    store.put_new(RANK, b"x")
    root = Path(store.url)
    with nobody(root / "chunks", root / RANK):
        for call in (
            lambda: store.get(CHUNK, max_bytes=1),
            lambda: store.get(RANK, max_bytes=1),
            lambda: list(store.list("")),
            lambda: list(store.list("chunks/3f/")),
            lambda: store.put_new(CHUNK, b"x", is_deferred=True),
            lambda: store.put(CHUNK, b"x"),
            lambda: store.delete(CHUNK),
        ):
            with pytest.raises(StoreAccessDeniedError, match="give this user access"):
                call()
    assert store.get(CHUNK, max_bytes=1) == b"x"


def test_p2_no_descriptor_is_left_behind(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def churn() -> None:
        for name in ("store.write", "store.link"):
            for write in WRITERS.values():
                failpoints.arm(f"{name}=raise")
                with pytest.raises(StoreUnavailableError):
                    write(store, bytes(LARGE))
        store.put_new(RANK, b"x", is_deferred=True)
        failpoints.arm("store.sync=raise")
        with pytest.raises(StoreUnavailableError):
            store.sync()
        store.put(RANK, b"x")
        for _ in range(2):
            with pytest.raises(ObjectExistsError):
                store.put_new(RANK, b"y")
        with pytest.raises(StoreError):
            store.get(RANK, max_bytes=0)
        with pytest.raises(ObjectNotFoundError):
            store.get("ranks/1/2", max_bytes=0)
        next(store.list(""))
        store.now_s()
        store.delete(RANK)

    churn()
    before = len(os.listdir("/dev/fd"))
    for _ in range(5):
        churn()
    assert len(os.listdir("/dev/fd")) == before
    assert files(store) == ["ckptd.json"]


# --- real faults, in processes of their own ----------------------------------------------------

PRELUDE = """
import os, resource, sys
from ckptd import errors, failpoints
from ckptd.store.local import LocalStore
root, variant = sys.argv[1], eval(sys.argv[2])
store = LocalStore(root, **variant)
RANK, CHUNK = "ranks/000000001000-0007/00003", "chunks/3f/3f00"
def files():
    return sorted(os.path.join(d, f) for d, _, fs in os.walk(root) for f in fs)
"""


def python(
    root: Path, variant: object, code: str, *before: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*before, sys.executable, "-c", PRELUDE + code, str(root), repr(variant)],
        env={**os.environ, "PYTHONPATH": str(REPO)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_l2_the_file_size_limit_is_a_full_store(tmp_path: Path, variant: object) -> None:
    done = python(
        tmp_path / "root",
        variant,
        """
store.put_new(RANK, b"small")
resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_001, resource.RLIM_INFINITY))
for is_deferred in (False, True):
    try:
        store.put_new(CHUNK, bytes(3 << 20), is_deferred=is_deferred)
    except errors.StoreFullError as error:
        assert "ulimit" in str(error), error
    else:
        raise SystemExit("stored")
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
assert files() == [root + "/" + RANK], files()
store.put_new(CHUNK, bytes(3 << 20))
""",
    )
    assert done.returncode == 0, done.stderr


def _can_mount() -> bool:
    try:
        command = ["unshare", "-Urm", "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False


needs_mount = pytest.mark.skipif(not _can_mount(), reason="no mount namespaces here")


@needs_mount
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_l1_a_full_disk_leaves_what_was_there_and_recovers(tmp_path: Path, variant: object) -> None:
    (tmp_path / "disk").mkdir()
    code = """
store.put_new(RANK, b"earlier")
for data in (bytes(3 << 20), bytes(1 << 19)):
    for number in range(100):
        try:
            store.put_new(f"chunks/00/{len(data)}-{number}", data, is_deferred=True)
        except errors.StoreFullError:
            break
    else:
        raise SystemExit("endless disk")
try:
    store.put(RANK, bytes(1 << 20))
except errors.StoreFullError:
    pass
store.sync()
assert store.get(RANK, max_bytes=9) == b"earlier"
assert all(e.bytes in (7, 3 << 20, 1 << 19) for e in store.list("")), list(store.list(""))
assert [f for f in files() if f.startswith(root + "/tmp/")] == []
store.now_s()
store.delete(f"chunks/00/{3 << 20}-0")
store.put_new("chunks/01/1", bytes(1 << 20))
"""
    mount = f'mount -t tmpfs -o size=8m tmpfs {tmp_path}/disk && exec "$@"'
    done = python(tmp_path / "disk/root", variant, code, "unshare", "-Urm", "sh", "-c", mount, "sh")
    assert done.returncode == 0, done.stderr


@needs_mount
def test_l5_a_read_only_root_is_read_and_refuses_writes(tmp_path: Path) -> None:
    root = tmp_path / "root"
    LocalStore(str(root)).put_new(RANK, b"x")
    code = """
assert store.get(RANK, max_bytes=1) == b"x"
assert [e.key for e in store.list("")] == [RANK]
assert store.now_s() > 0
for call in (
    lambda: store.put(RANK, b"y"),
    lambda: store.put_new(CHUNK, b"y"),
    lambda: store.put_new(CHUNK, b"y", is_deferred=True),
    lambda: store.delete(RANK),
    store.check_writable,
):
    try:
        call()
    except errors.StoreAccessDeniedError:
        continue
    raise SystemExit("written")
"""
    mount = f'mount --bind {root} {root} && mount -o remount,bind,ro {root} && exec "$@"'
    done = python(root, {}, code, "unshare", "-Urm", "sh", "-c", mount, "sh")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("call", ["put", "put_new", "put_new_deferred"])
@pytest.mark.parametrize("point", ["store.write", "store.link", "store.sync"])
def test_d6_kill_9_leaves_whole_objects_or_none(
    tmp_path: Path, variant: dict[str, bool], call: str, point: str
) -> None:
    root = tmp_path / "root"
    store = LocalStore(str(root), **variant)
    store.put_new("ckptd.json", b"{}")
    calls: dict[str, Callable[[], None]] = {
        "put": lambda: store.put(CHUNK, bytes(2 << 20)),
        "put_new": lambda: store.put_new(CHUNK, bytes(2 << 20)),
        "put_new_deferred": lambda: store.put_new(CHUNK, bytes(2 << 20), is_deferred=True),
    }
    child = os.fork()
    if child == 0:
        failpoints.arm(f"{point}=kill")
        try:
            calls[call]()
            store.sync()
        finally:
            os._exit(1)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    is_there = point == "store.sync"
    objects = [(e.key, e.bytes) for e in store.list("chunks/")]
    assert objects == ([(CHUNK, 2 << 20)] if is_there else [])
    left = [name for name in files(store) if name.startswith("tmp/")]
    has_name = call == "put" or variant == {"is_unnamed": False}
    assert len(left) == (1 if has_name and not is_there else 0)
    for name in left:  # the next writer sweeps them when they are an hour old
        os.utime(root / name, (0, 0))
    LocalStore(str(root)).put("attempts/0001", b"")
    assert [name for name in files(store) if name.startswith("tmp/")] == []


def test_only_old_temporary_files_of_our_making_are_swept(store: LocalStore) -> None:
    tmp = Path(store.url) / "tmp"
    tmp.mkdir(exist_ok=True)
    for name in (".1-fresh", ".1-old", "somebody's"):
        (tmp / name).touch()
    os.utime(tmp / ".1-old", (0, 0))
    os.utime(tmp / "somebody's", (0, 0))
    LocalStore(store.url).put(RANK, b"x")
    assert sorted(p.name for p in tmp.iterdir()) == [".1-fresh", "somebody's"]
