from __future__ import annotations

import ctypes
import errno
import faulthandler
import fcntl
import mmap
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from ckptd.errors import ConfigError, ProtocolError
from ckptd.shm import arena as arena_module
from ckptd.shm import kernel
from ckptd.shm.arena import Arena, round_up
from ckptd.shm.slots import SLOT_HEADER_BYTES, WHOLE

SLOT = 64 << 10
ALL_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


@contextmanager
def same_fds() -> Iterator[None]:
    before = len(os.listdir("/proc/self/fd"))
    yield
    assert len(os.listdir("/proc/self/fd")) == before


def adopt_copy(arena: Arena) -> Arena:
    return Arena.adopt(os.dup(arena.fileno()), arena.slots, arena.slot_bytes)


def mapped_arenas() -> int:
    """Count the mappings of arenas of this process."""
    return Path("/proc/self/maps").read_text().count("memfd:ckptd-arena")


def test_what_one_side_writes_the_other_reads() -> None:
    with Arena.create(2, SLOT) as mine, adopt_copy(mine) as theirs:
        written, read = mine.slot(1), theirs.slot(1)
        generation = written.begin(5, 1)
        written.payload[:3] = b"abc"
        assert not read.is_current(generation)
        written.finish()
        assert read.is_current(generation)
        assert read.view[SLOT_HEADER_BYTES : SLOT_HEADER_BYTES + 3].tobytes() == b"abc"
        assert not theirs.slot(0).is_whole
        del written, read


@contextmanager
def child_with(arena: Arena, script: str) -> Iterator[subprocess.Popen[str]]:
    """Run a script that has the arena's descriptor and slot size as arguments; end it after."""
    fd = arena.fileno()
    child = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script), str(fd), str(arena.slot_bytes)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, pass_fds=[fd],
    )  # fmt: skip
    try:
        yield child
    finally:
        child.kill()
        child.communicate()


def answer(child: subprocess.Popen[str]) -> str:
    """Let the child go on, and return the line that it says next."""
    assert child.stdin is not None
    assert child.stdout is not None
    child.stdin.write("\n")
    child.stdin.flush()
    return child.stdout.readline().strip()


def test_a_writer_in_another_process_is_seen() -> None:
    script = """
        import mmap, sys
        from ckptd.shm.slots import Slot
        fd, slot_bytes = map(int, sys.argv[1:])
        slot = Slot(1, memoryview(mmap.mmap(fd, 2 * slot_bytes))[slot_bytes:])
        input()
        generation = slot.begin(42, 7)
        slot.payload[:] = b"\\x5a" * len(slot.payload)
        print(generation, flush=True)
        input()
        slot.finish()
        print("whole", flush=True)
        input()
        slot.begin(43, 8)
        print("moved on", flush=True)
    """
    with Arena.create(2, SLOT) as arena, child_with(arena, script) as child:
        slot = arena.slot(1)
        generation = int(answer(child))
        assert slot.read_header().step == 42
        assert not slot.is_current(generation)
        assert answer(child) == "whole"
        assert slot.payload.tobytes() == b"\x5a" * len(slot.payload)
        assert slot.is_current(generation)
        assert answer(child) == "moved on"
        assert not slot.is_current(generation)
        del slot


def test_p5_a_slot_that_moves_on_during_a_copy_is_noticed() -> None:
    with Arena.create(1, SLOT) as mine, adopt_copy(mine) as theirs:
        writer, reader = mine.slot(0), theirs.slot(0)
        generation = writer.begin(1, 1)
        writer.payload[:] = b"a" * len(writer.payload)
        writer.finish()
        half = len(reader.payload) // 2
        copy = reader.payload[:half].tobytes()
        writer.begin(2, 2)
        writer.payload[:] = b"b" * len(writer.payload)
        assert not reader.is_current(generation)
        writer.finish()
        copy += reader.payload[half:].tobytes()
        assert set(copy) == set(b"ab")
        assert not reader.is_current(generation)
        del writer, reader


def test_no_copy_that_passes_the_check_is_torn() -> None:
    script = """
        import mmap, sys
        from ckptd.shm.slots import Slot
        fd, slot_bytes = map(int, sys.argv[1:])
        slot = Slot(0, memoryview(mmap.mmap(fd, slot_bytes)))
        turn = 0
        while True:
            turn += 1
            fill = bytes([turn % 251]) * len(slot.payload)
            slot.begin(turn, turn)
            slot.payload[:] = fill
            slot.finish()
            sum(range(20_000))  # so that a reader sees it whole at times
    """
    with Arena.create(1, 4 * SLOT) as arena, child_with(arena, script) as child:
        slot = arena.slot(0)
        whole = 0
        while whole < 20:
            assert child.poll() is None
            header = slot.read_header()
            copy = slot.payload.tobytes()
            if header.state == WHOLE and slot.is_current(header.generation):
                whole += 1
                assert copy == bytes([header.step % 251]) * len(copy)
        del slot


def test_p3_every_page_is_reserved_when_it_is_made() -> None:
    with Arena.create(2, SLOT) as arena:
        assert os.fstat(arena.fileno()).st_blocks * 512 == arena.bytes == 2 * SLOT


def test_m1_the_sender_cannot_shrink_grow_or_unseal() -> None:
    with Arena.create(1, SLOT) as arena:
        fd = arena.fileno()
        assert fcntl.fcntl(fd, fcntl.F_GET_SEALS) & ALL_SEALS == ALL_SEALS
        for size in (0, SLOT // 2, SLOT * 2):
            with pytest.raises(PermissionError):
                os.ftruncate(fd, size)
        assert not os.get_inheritable(fd)


# --- hostile descriptors -----------------------------------------------------------------------


def memfd(size: int, seals: int = ALL_SEALS, *, is_sparse: bool = False) -> int:
    fd = os.memfd_create("hostile", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, size)
    if not is_sparse and size:
        os.posix_fallocate(fd, 0, size)
    if seals:
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


def pipe_end() -> int:
    a, b = os.pipe()
    os.close(b)
    return a


def regular_file() -> int:
    fd = os.open("/tmp", os.O_TMPFILE | os.O_RDWR)
    os.ftruncate(fd, 2 * SLOT)
    return fd


def unsealable() -> int:
    fd = os.memfd_create("hostile", os.MFD_CLOEXEC)
    os.ftruncate(fd, 2 * SLOT)
    os.posix_fallocate(fd, 0, 2 * SLOT)
    return fd


HOSTILE: dict[str, Callable[[], int]] = {
    "regular file": regular_file,
    "pipe": pipe_end,
    "device": lambda: os.open(os.devnull, os.O_RDWR),
    "zero device": lambda: os.open("/dev/zero", os.O_RDWR),
    "directory": lambda: os.open("/", os.O_RDONLY),
    "path only": lambda: os.open("/proc/self/exe", os.O_PATH),
    "memfd that cannot be sealed": unsealable,
    "memfd without seals": lambda: memfd(2 * SLOT, 0),
    "seals that can be added to": lambda: memfd(
        2 * SLOT, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
    ),
    "may still shrink": lambda: memfd(2 * SLOT, fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL),
    "may still grow": lambda: memfd(2 * SLOT, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL),
    "no bytes": lambda: memfd(0),
    "too small": lambda: memfd(SLOT),
    "a byte short": lambda: memfd(2 * SLOT - 1),
    "too large": lambda: memfd(3 * SLOT),
    "sparse": lambda: memfd(2 * SLOT, is_sparse=True),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_m3_a_wrong_descriptor_is_refused_and_closed(name: str) -> None:
    with same_fds():
        fd = HOSTILE[name]()
        with pytest.raises(ProtocolError):
            Arena.adopt(fd, 2, SLOT)
        with pytest.raises(OSError, match="Bad file"):
            os.fstat(fd)


@pytest.mark.parametrize(
    ("slots", "slot_bytes"),
    [(0, SLOT), (65, SLOT), (-1, SLOT), (2, 0), (2, SLOT + 1), (2, 4096), (1, -SLOT), (1, 1 << 60)],
)
def test_m3_an_impossible_announcement_is_refused_and_closed(slots: int, slot_bytes: int) -> None:
    with same_fds(), pytest.raises(ProtocolError):
        Arena.adopt(memfd(2 * SLOT), slots, slot_bytes)


def test_m3_a_huge_sparse_memfd_is_refused() -> None:
    size = 1 << 40
    with same_fds(), pytest.raises(ProtocolError, match="reserved"):
        Arena.adopt(memfd(size, is_sparse=True), 1, size)


def test_m3_more_than_is_accepted_here_is_refused() -> None:
    with same_fds():
        with pytest.raises(ProtocolError, match="at most"):
            Arena.adopt(memfd(2 * SLOT), 2, SLOT, max_bytes=2 * SLOT - 1)
        Arena.adopt(memfd(2 * SLOT), 2, SLOT, max_bytes=2 * SLOT).close()


def test_m3_a_closed_descriptor_is_a_protocol_error_of_its_own_kind() -> None:
    fd = memfd(SLOT)
    os.close(fd)
    with pytest.raises((ProtocolError, OSError)):
        Arena.adopt(fd, 1, SLOT)


def test_m3_pages_that_are_not_plain_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "_TMPFS_MAGIC", 0x958458F6)  # as if it came from hugetlbfs
    with same_fds(), pytest.raises(ProtocolError, match="plain pages"):
        Arena.adopt(memfd(SLOT), 1, SLOT)


def test_m2_holes_punched_later_read_as_zeros() -> None:
    with Arena.create(1, SLOT) as mine, adopt_copy(mine) as theirs:
        slot = mine.slot(0)
        slot.payload[:] = b"x" * len(slot.payload)
        libc = ctypes.CDLL(None, use_errno=True)
        libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long]
        assert libc.fallocate(mine.fileno(), 3, 0, SLOT) == 0  # PUNCH_HOLE | KEEP_SIZE
        assert theirs.slot(0).payload.tobytes() == bytes(SLOT - SLOT_HEADER_BYTES)
        del slot


def test_p3_an_heir_writes_in_the_memory_of_the_dead() -> None:
    with same_fds(), Arena.create(2, SLOT) as former:
        former.slot(0).begin(1, 1)
        former.slot(0).payload[:4] = b"dead"
        former.slot(0).finish()
        fd = os.dup(former.fileno())
        with Arena.adopt(fd, 2, SLOT, is_writable=True) as heir:
            assert heir.fileno() == fd
            assert heir.slot(0).is_whole
            assert heir.slot(0).payload[:4].tobytes() == b"dead"
            generation = heir.slot(1).begin(2, 2)
            heir.slot(1).payload[:] = b"h" * len(heir.slot(1).payload)
            heir.slot(1).finish()
            assert former.slot(1).is_current(generation)
            with adopt_copy(heir) as daemon:
                assert daemon.slot(1).payload[:1].tobytes() == b"h"


def test_m3_memory_to_write_in_is_checked_as_any_other() -> None:
    with same_fds():
        fd = os.memfd_create("unsealed")
        os.ftruncate(fd, 2 * SLOT)
        with pytest.raises(ProtocolError):
            Arena.adopt(fd, 2, SLOT, is_writable=True)
        with Arena.create(2, SLOT) as arena:
            fd = os.dup(arena.fileno())
            with pytest.raises(ProtocolError):
                Arena.adopt(fd, 1, SLOT, is_writable=True)


def test_the_reader_cannot_write() -> None:
    with Arena.create(1, SLOT) as mine, adopt_copy(mine) as theirs:
        with pytest.raises(TypeError):
            theirs.slot(0).payload[0] = 1
        with pytest.raises(TypeError):
            theirs.slot(0).begin(1, 1)


# --- memory that is not there ------------------------------------------------------------------


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.ENOMEM])
def test_m4_memory_that_cannot_be_reserved_is_a_config_error(
    monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(fd: int, offset: int, length: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    with same_fds(), pytest.raises(ConfigError, match=r"128\.0 KiB.*cannot be reserved"):
        Arena.create(2, SLOT)


def test_m4_a_real_refusal_of_the_kernel_leaves_nothing_behind() -> None:
    script = f"""
        import os, resource
        from ckptd.shm.arena import Arena
        from ckptd.errors import ConfigError
        resource.setrlimit(resource.RLIMIT_FSIZE, ({SLOT}, {SLOT}))
        before = len(os.listdir("/proc/self/fd"))
        try:
            Arena.create(2, {SLOT})
        except ConfigError as error:
            print("cannot be reserved" in str(error), len(os.listdir("/proc/self/fd")) - before)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=True
    )
    assert done.stdout == "True 0\n"


@pytest.mark.parametrize("is_shared", [True, False])
def test_p3_more_than_is_left_is_refused_before_anything_is_taken(
    monkeypatch: pytest.MonkeyPatch, is_shared: bool
) -> None:
    monkeypatch.setattr(arena_module, "available_bytes", lambda: SLOT)
    with same_fds(), pytest.raises(ConfigError, match=r"64\.0 KiB are left"):
        Arena.create(2, SLOT, is_shared=is_shared)
    Arena.create(1, SLOT, is_shared=is_shared).close()


def test_an_impossible_shape_is_a_config_error() -> None:
    for slots, slot_bytes in ((0, SLOT), (1, SLOT + 1), (1, mmap.PAGESIZE)):
        with pytest.raises(ConfigError):
            Arena.create(slots, slot_bytes)


def test_where_the_kernel_has_no_memfd_a_config_error_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(kernel, "IS_LINUX", False)
    with pytest.raises(ConfigError, match="daemon=False"):
        Arena.create(1, SLOT)
    with Arena.create(1, SLOT, is_shared=False) as arena:
        assert arena.prefault()
    with same_fds(), pytest.raises(ProtocolError, match="Linux"):
        Arena.adopt(memfd(SLOT), 1, SLOT)


def test_an_old_kernel_gets_a_memfd_without_the_newer_flag(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = os.memfd_create

    def old(name: str, flags: int) -> int:
        if flags & 8:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(name, flags)

    monkeypatch.setattr(os, "memfd_create", old)
    with Arena.create(1, SLOT) as arena, adopt_copy(arena):
        pass


# --- pages -------------------------------------------------------------------------------------


def resident_bytes(arena: Arena) -> int:
    """Sum what this process has mapped of an arena, from smaps."""
    begin = f"{arena._address:x}-"
    lines = iter(Path("/proc/self/smaps").read_text().splitlines())
    next(line for line in lines if line.startswith(begin))
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Rss:"))


@pytest.mark.parametrize("has_populate", [True, False])
def test_prefault_maps_every_page_and_keeps_what_is_there(
    monkeypatch: pytest.MonkeyPatch, has_populate: bool
) -> None:
    if not has_populate:
        monkeypatch.setattr(kernel, "populate", lambda address, length: False)
    with Arena.create(2, SLOT) as arena:
        arena.slot(1).payload[-1] = 7
        assert resident_bytes(arena) < arena.bytes
        assert arena.prefault()
        assert resident_bytes(arena) == arena.bytes
        assert arena.slot(1).payload[-1] == 7


def test_prefault_can_be_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arena_module, "_POPULATE_BYTES", SLOT)
    asked: list[bool] = []

    def should_stop() -> bool:
        asked.append(True)
        return len(asked) == 3

    with Arena.create(4, SLOT) as arena:
        assert not arena.prefault(should_stop)
        assert resident_bytes(arena) == 2 * SLOT


def test_closing_stops_a_prefault_and_the_memory_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arena_module, "_POPULATE_BYTES", SLOT)
    before = mapped_arenas()
    arena = Arena.create(4, SLOT)

    def close_it() -> bool:
        arena.close()
        return False

    assert not arena.prefault(close_it)
    assert mapped_arenas() == before
    assert not arena.prefault()


def test_a_prefault_without_memory_gives_up(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(address: int, length: int) -> bool:
        raise OSError(errno.ENOMEM, "no memory")

    monkeypatch.setattr(kernel, "populate", refuse)
    with Arena.create(1, SLOT) as arena:
        assert not arena.prefault()


def test_populate_says_what_the_kernel_says() -> None:
    with pytest.raises(OSError, match="memory"):
        kernel.populate(mmap.PAGESIZE, mmap.PAGESIZE)  # nothing is mapped there
    with Arena.create(1, SLOT) as arena:
        assert kernel.populate(arena._address + 1, SLOT) is False  # EINVAL, as before Linux 5.14


def test_trim_makes_the_reader_small_and_keeps_the_contents() -> None:
    with Arena.create(1, SLOT) as mine, adopt_copy(mine) as theirs:
        slot = mine.slot(0)
        generation = slot.begin(1, 1)
        slot.payload[:] = b"x" * len(slot.payload)
        slot.finish()
        copy = theirs.slot(0)
        assert copy.payload.tobytes() == slot.payload.tobytes()
        # The header was not read; the kernel may have mapped it along with its neighbours.
        assert resident_bytes(theirs) >= len(copy.payload)
        theirs.trim()
        assert resident_bytes(theirs) == 0
        assert copy.is_current(generation)
        assert copy.payload.tobytes() == slot.payload.tobytes()
        del slot, copy


def test_trim_does_not_lose_private_memory() -> None:
    with Arena.create(1, SLOT, is_shared=False) as arena:
        arena.slot(0).payload[:1] = b"x"
        arena.trim()
        assert arena.slot(0).payload[:1].tobytes() == b"x"


# --- life --------------------------------------------------------------------------------------


def test_e2_a_forked_child_does_not_inherit_the_mapping() -> None:
    before = mapped_arenas()
    with Arena.create(1, SLOT) as mine, adopt_copy(mine):
        assert mapped_arenas() == before + 2
        child = os.fork()
        if child == 0:
            os._exit(mapped_arenas())
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.parametrize("is_shared", [True, False])
def test_e2_a_forked_child_that_touches_it_dies_alone(is_shared: bool) -> None:
    with Arena.create(1, SLOT, is_shared=is_shared) as arena:
        slot = arena.slot(0)
        child = os.fork()
        if child == 0:
            faulthandler.disable()  # no crash report in the output
            slot.payload[0] = 1
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGSEGV
        slot.payload[0] = 2
        assert slot.payload[0] == 2
        del slot


def test_the_memory_stays_out_of_core_dumps() -> None:
    with Arena.create(1, SLOT) as arena:
        lines = iter(Path("/proc/self/smaps").read_text().splitlines())
        next(line for line in lines if line.startswith(f"{arena._address:x}-"))
        flags = next(line for line in lines if line.startswith("VmFlags:"))
        assert {"dd", "dc"} <= set(flags.split())


def test_closing_frees_everything_and_may_be_repeated() -> None:
    before = mapped_arenas()
    with same_fds():
        arena = Arena.create(2, SLOT)
        copy = adopt_copy(arena)
        for each in (arena, copy):
            each.close()
            each.close()
    assert mapped_arenas() == before
    with pytest.raises(ValueError, match="closed"):
        arena.slot(0)
    with pytest.raises(ValueError, match="descriptor"):
        arena.fileno()
    arena.trim()


def test_views_keep_the_memory_until_the_last_one_goes() -> None:
    before = mapped_arenas()
    with same_fds():
        arena = Arena.create(1, SLOT)
        array = np.frombuffer(arena.slot(0).payload, dtype=np.uint8)
        arena.close()
        array[0] = 5
        assert array[0] == 5
        assert mapped_arenas() == before + 1
        del array
    assert mapped_arenas() == before


def test_the_contents_outlive_their_maker() -> None:
    mine = Arena.create(1, SLOT)
    theirs = adopt_copy(mine)
    slot = mine.slot(0)
    generation = slot.begin(9, 1)
    slot.finish()
    del slot
    mine.close()
    with theirs:
        assert theirs.slot(0).is_current(generation)


def test_private_memory_has_slots_and_no_descriptor() -> None:
    with same_fds(), Arena.create(2, SLOT, is_shared=False) as arena:
        assert not arena.is_shared
        generation = arena.slot(1).begin(1, 1)
        arena.slot(1).finish()
        assert arena.slot(1).is_current(generation)
        with pytest.raises(ValueError, match="descriptor"):
            arena.fileno()


def test_only_slots_that_are_there_are_given() -> None:
    with Arena.create(2, SLOT) as arena:
        for index in (-1, 2):
            with pytest.raises(IndexError):
                arena.slot(index)


def test_slots_do_not_overlap() -> None:
    with Arena.create(3, SLOT) as arena:
        arena.slot(1).view[:] = b"x" * SLOT
        assert arena.slot(0).view.tobytes() == bytes(SLOT)
        assert arena.slot(2).view.tobytes() == bytes(SLOT)


@pytest.mark.parametrize("payload", [0, 1, SLOT - SLOT_HEADER_BYTES, SLOT])
def test_a_slot_is_rounded_up_to_pages_with_its_header(payload: int) -> None:
    rounded = round_up(payload)
    assert rounded % mmap.PAGESIZE == 0
    assert 0 <= rounded - payload - SLOT_HEADER_BYTES < mmap.PAGESIZE
