"""Memory that outlives a daemon: what is put into the manager's store, and what comes back."""

from __future__ import annotations

import os
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from ckptd.daemon import keeping as module
from ckptd.daemon import record as record_module
from ckptd.daemon.holder import Holder, holder_of, watch
from ckptd.daemon.keeping import Keeping, TakenBack
from ckptd.daemon.notify import Given, Notifier
from ckptd.daemon.record import REGION_BYTES, Record, Shape
from ckptd.engine.keeper import Snapshot
from ckptd.errors import ProtocolError
from ckptd.shm.arena import Arena
from ckptd.wire import messages as say
from tests.fakes.engines import handoff, hello, recipe
from tests.fakes.service_manager import ServiceManager

SECRET = "hunter2-0f1e2d3c"


@pytest.fixture
def manager() -> Iterator[ServiceManager]:
    with ServiceManager(f"@ckptd-{uuid.uuid4().hex}") as fresh:
        yield fresh


@pytest.fixture
def arena() -> Iterator[Arena]:
    with Arena.create(2, 8192) as fresh:
        yield fresh


class Life:
    """A daemon's life with one client, which has an arena."""

    def __init__(self, manager: ServiceManager, arena: Arena, pid: int = 0) -> None:
        self.manager = manager
        self.arena = arena
        self.keeping = Keeping(Notifier(manager.address))
        self.announce(1, pid)

    def announce(self, client: int, pid: int = 0) -> None:
        message = say.Arena(1, self.arena.slots, self.arena.slot_bytes)
        self.keeping.keep_arena(client, message, self.arena, pid)

    def save(self, step: int, slot: int = 0, **changes: object) -> Snapshot:
        """Write a snapshot into a slot and hand it off."""
        place = self.arena.slot(slot)
        generation = place.begin(step, step)
        place.finish()
        message = handoff(step, step, slot=slot)
        message = msgspec.structs.replace(message, generation=generation, **changes)
        said = msgspec.structs.replace(hello(), storage_options={"secret": SECRET})
        snapshot = Snapshot(said, message, recipe())
        self.keeping.keep(1, 1, slot, snapshot)
        return snapshot._replace(hello=hello())

    def record(self) -> int:
        """Return the manager's descriptor of the record."""
        self.manager.wait_for(lambda: len(self.manager.names()) == 2)
        (fd,) = self.manager.fds("-record")
        return fd


def take_back(manager: ServiceManager) -> list[TakenBack]:
    """Start anew, with what the manager has; all is closed at once."""
    manager.wait_for(lambda: len(manager.names()) == 2)
    keeping = Keeping(Notifier(manager.address))
    taken = keeping.take_back(manager.passed())
    for back in taken:
        back.arena.close()
        if back.pidfd is not None:
            os.close(back.pidfd)
    return taken


def open_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


# --- there and back ------------------------------------------------------------------------------


def test_what_was_handed_off_comes_back(manager: ServiceManager, arena: Arena) -> None:
    life = Life(manager, arena)
    saved = {slot: life.save(step, slot) for slot, step in ((0, 10), (1, 20))}
    life.record()
    (back,) = take_back(manager)
    assert back.event.client == 1
    assert back.event.message == say.Arena(1, arena.slots, arena.slot_bytes)
    assert back.event.identity == os.fstat(arena.fileno()).st_ino
    assert back.event.snapshots == saved
    assert (back.event.is_dead, back.pidfd) == (False, None)
    assert len(manager.names()) == 2  # the next daemon may be killed too


def test_names_are_such_as_the_manager_takes(manager: ServiceManager, arena: Arena) -> None:
    Life(manager, arena).record()
    inode = os.fstat(arena.fileno()).st_ino
    assert manager.names() == [f"ckptd-{inode}-arena", f"ckptd-{inode}-record"]
    for name in manager.names():
        assert len(name) < 255
        assert name.isascii()
        assert ":" not in name


def test_p2_memory_that_two_clients_announce_is_stored_once_and_leaves_with_the_last(
    manager: ServiceManager, arena: Arena
) -> None:
    life = Life(manager, arena)
    life.save(10)
    life.announce(2)
    life.announce(2)  # again, under the same number
    life.keeping.release(1, 1)
    life.keeping.keep(1, 1, 0, life.save(20))  # of one that has let go: nothing
    Notifier(manager.address).ready()
    manager.wait_said("READY=1")
    assert len(manager.names()) == 2
    assert manager.said.count("FDSTORE=1") == 2
    life.keeping.release(2, 1)
    manager.wait_for(lambda: manager.names() == [])
    life.keeping.release(2, 1)


def test_an_arena_that_is_taken_back_leaves_with_its_client(
    manager: ServiceManager, arena: Arena
) -> None:
    life = Life(manager, arena)
    life.save(10)
    life.record()
    again = Keeping(Notifier(manager.address))
    (back,) = again.take_back(manager.passed())
    back.arena.close()
    message = back.event.message
    again.keep_arena(7, message, arena, 0)  # the trainer lives, and comes back with its memory
    again.release(back.event.client, message.arena)
    Notifier(manager.address).ready()
    manager.wait_said("READY=1")
    assert len(manager.names()) == 2
    again.release(7, message.arena)
    manager.wait_for(lambda: manager.names() == [])


def test_p2_a_thousand_arenas_leave_nothing(manager: ServiceManager, arena: Arena) -> None:
    life = Life(manager, arena)
    life.record()
    before = open_fds()
    for client in range(2, 1002):
        with Arena.create(1, 8192) as other:
            life.keeping.keep_arena(client, say.Arena(1, 1, 8192), other, 0)
            life.keeping.release(client, 1)
    manager.wait_for(lambda: len(manager.names()) == 2)
    assert open_fds() == before


def test_a_number_that_comes_again_for_other_memory_lets_go_of_the_first(
    manager: ServiceManager, arena: Arena
) -> None:
    life = Life(manager, arena)
    with Arena.create(1, 8192) as other:
        life.keeping.keep_arena(1, say.Arena(1, 1, 8192), other, 0)
        inode = os.fstat(other.fileno()).st_ino
        manager.wait_for(
            lambda: manager.names() == [f"ckptd-{inode}-{x}" for x in ("arena", "record")]
        )


def test_memory_of_another_shape_holds_nothing_of_before(
    manager: ServiceManager, arena: Arena
) -> None:
    life = Life(manager, arena)
    life.save(10)
    life.keeping.keep_arena(1, say.Arena(1, 1, 16384), arena, 0)
    life.record()
    assert take_back(manager) == []


def test_s7_no_secret_is_written_down(manager: ServiceManager, arena: Arena) -> None:
    life = Life(manager, arena)
    snapshot = life.save(10)
    fd = life.record()
    written = os.pread(fd, 1 << 20, 0) + os.pread(fd, 1 << 20, REGION_BYTES)
    assert snapshot.hello.root.encode() in written
    assert SECRET.encode() not in written
    assert b"secret" not in written
    (back,) = take_back(manager)
    assert back.event.snapshots[0].hello.storage_options == {}


# --- slots that moved on -------------------------------------------------------------------------


def test_a_slot_that_moved_on_is_not_taken_back(manager: ServiceManager, arena: Arena) -> None:
    life = Life(manager, arena)
    life.save(10, 0)
    kept = life.save(20, 1)
    arena.slot(0).begin(30, 3)  # and the trainer was killed in the middle of it
    life.record()
    (back,) = take_back(manager)
    assert back.event.snapshots == {1: kept}


def test_an_arena_in_which_nothing_is_left_leaves_the_store(
    manager: ServiceManager, arena: Arena
) -> None:
    life = Life(manager, arena)
    life.save(10, 0)
    arena.slot(0).begin(30, 3)
    life.record()
    assert take_back(manager) == []
    manager.wait_for(lambda: manager.names() == [])


def test_a_trainer_of_another_protocol_left_nothing_of_use(
    manager: ServiceManager, arena: Arena, monkeypatch: pytest.MonkeyPatch
) -> None:
    life = Life(manager, arena)
    life.save(10)
    life.record()
    monkeypatch.setattr(say, "PROTOCOL", say.PROTOCOL + 1)
    assert take_back(manager) == []


# --- damage --------------------------------------------------------------------------------------


def flip(fd: int, at: int) -> None:
    (byte,) = os.pread(fd, 1, at)
    os.pwrite(fd, bytes([byte ^ 1]), at)


@pytest.mark.parametrize("offset", [0, 7, 8, 15, 16, 31, 32, 100])
def test_a_flipped_byte_costs_the_snapshot_that_it_stands_in_and_no_other(
    manager: ServiceManager, arena: Arena, offset: int
) -> None:
    life = Life(manager, arena)
    life.save(10, 0)
    kept = life.save(20, 1)
    flip(life.record(), REGION_BYTES + offset)
    (back,) = take_back(manager)
    assert back.event.snapshots == {1: kept}


@pytest.mark.parametrize("offset", [0, 7, 8, 15, 16, 31, 32, 33])
def test_a_flipped_byte_in_the_shape_costs_the_arena(
    manager: ServiceManager, arena: Arena, offset: int
) -> None:
    life = Life(manager, arena)
    life.save(10)
    flip(life.record(), offset)
    before = open_fds()
    assert take_back(manager) == []
    assert open_fds() <= before
    manager.wait_for(lambda: manager.names() == [])


def test_d6_a_kill_in_the_middle_of_writing_costs_that_snapshot_and_no_other(
    manager: ServiceManager, arena: Arena, monkeypatch: pytest.MonkeyPatch
) -> None:
    life = Life(manager, arena)
    life.save(10, 0)
    kept = life.save(20, 1)
    life.record()
    whole = os.pwrite
    for written in (1, 8, 20, 32, 40, 60, 100):

        def write(fd: int, data: memoryview, at: int, most: int = written) -> int:
            whole(fd, data[:most], at)
            raise OSError(4, "killed here")

        monkeypatch.setattr(os, "pwrite", write)
        life.save(30 + written, 0, metrics={"loss": 0.5})
        monkeypatch.undo()
        (back,) = take_back(manager)
        assert back.event.snapshots == {1: kept}
    again = life.save(200, 0)  # the next one is whole again
    (back,) = take_back(manager)
    assert back.event.snapshots == {0: again, 1: kept}


def a_pipe(_manager: ServiceManager) -> dict[str, int]:
    out, into = os.pipe()
    os.close(into)
    return {"record": out}


def a_pipe_as_memory(_manager: ServiceManager) -> dict[str, int]:
    out, into = os.pipe()
    os.close(into)
    return {"arena": out}


def an_empty_record(_manager: ServiceManager) -> dict[str, int]:
    return {"record": os.memfd_create("x", os.MFD_ALLOW_SEALING)}


def a_cut_record(manager: ServiceManager) -> dict[str, int]:
    record = an_empty_record(manager)["record"]
    os.pwrite(record, os.pread(manager.fds("-record")[0], 40, 0), 0)
    return {"record": record}


def a_record_of_huge_slots(_manager: ServiceManager) -> dict[str, int]:
    record = Record.create()
    record.write_shape(Shape(1 << 40, -1))
    return {"record": record.fileno()}


def a_long_record(_manager: ServiceManager) -> dict[str, int]:
    record = Record.create()
    record._write(0, b"x" * 5000)
    return {"record": record.fileno()}


def a_record_that_makes_no_sense(_manager: ServiceManager) -> dict[str, int]:
    record = Record.create()
    record._write(0, msgspec.msgpack.encode({"slots": "many"}))
    return {"record": record.fileno()}


def other_memory(_manager: ServiceManager) -> dict[str, int]:
    with Arena.create(2, 8192) as other:
        other.slot(0).begin(10, 10)
        other.slot(0).finish()  # of the same generation even
        return {"arena": os.dup(other.fileno())}


def smaller_memory(_manager: ServiceManager) -> dict[str, int]:
    with Arena.create(1, 8192) as other:
        return {"arena": os.dup(other.fileno())}


@pytest.mark.parametrize(
    "make",
    [
        a_pipe, a_pipe_as_memory, an_empty_record, a_cut_record, a_record_of_huge_slots,
        a_long_record, a_record_that_makes_no_sense, other_memory, smaller_memory,
    ],
)  # fmt: skip
def test_what_is_no_arena_of_a_daemon_is_refused_and_leaves_the_store(
    manager: ServiceManager, arena: Arena, make: Callable[[ServiceManager], dict[str, int]]
) -> None:
    life = Life(manager, arena)
    life.save(10)
    life.record()
    inode = os.fstat(arena.fileno()).st_ino
    for what, fd in make(manager).items():
        Notifier(manager.address).remove(f"ckptd-{inode}-{what}")
        manager.wait_for(lambda: len(manager.names()) == 1)
        manager.put(f"ckptd-{inode}-{what}", fd)
    before = open_fds()
    assert take_back(manager) == []
    manager.wait_for(lambda: manager.names() == [])
    assert open_fds() <= before


@pytest.mark.parametrize("missing", ["arena", "record"])
def test_half_of_a_pair_is_refused(manager: ServiceManager, arena: Arena, missing: str) -> None:
    life = Life(manager, arena)
    life.save(10)
    life.record()
    given = [each for each in manager.passed() if not each.name.endswith(missing)]
    for each in manager.passed():
        os.close(each.fd)
    assert Keeping(Notifier(manager.address)).take_back(given[:1]) == []
    manager.wait_for(lambda: manager.names() == [])


def test_descriptors_of_others_are_closed_and_left_to_the_manager(manager: ServiceManager) -> None:
    before = open_fds()
    for name in ("stored", "ckptd-x-arena", "ckptd-1-arena-2", "", "ckptd-\u0661-arena"):
        fd = os.open(os.devnull, os.O_RDONLY)
        assert Keeping(Notifier(manager.address)).take_back([Given(name, fd)]) == []
    assert open_fds() == before
    assert manager.said == []


def test_a_name_that_comes_twice_is_taken_once(manager: ServiceManager, arena: Arena) -> None:
    life = Life(manager, arena)
    life.save(10)
    life.record()
    before = open_fds()
    keeping = Keeping(Notifier(manager.address))
    (back,) = keeping.take_back([*manager.passed(), *manager.passed()])
    back.arena.close()
    keeping.release(back.event.client, back.event.message.arena)
    manager.wait_for(lambda: manager.names() == [])
    assert open_fds() == before - 2  # the manager's


def test_a_manager_that_is_full_costs_only_what_it_does_not_take(arena: Arena) -> None:
    with ServiceManager(f"@ckptd-{uuid.uuid4().hex}", most=2) as manager:
        life = Life(manager, arena)
        saved = life.save(10)
        with Arena.create(1, 8192) as other:
            life.keeping.keep_arena(2, say.Arena(1, 1, 8192), other, 0)
            (back,) = take_back(manager)
            assert back.event.snapshots == {0: saved}


# --- bounds and errors ---------------------------------------------------------------------------


def test_s2_a_region_is_bounded(
    manager: ServiceManager, arena: Arena, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(record_module, "MAX_BYTES", 2000)
    life = Life(manager, arena)
    life.save(10, 0)
    kept = life.save(20, 1)
    life.save(30, 0, values=b" " * 2000)
    written = os.pread(life.record(), 8, REGION_BYTES + 8)  # the length
    assert int.from_bytes(written, "little") <= 2000
    (back,) = take_back(manager)
    assert back.event.snapshots == {1: kept}


def test_s2_a_length_is_judged_before_it_is_read() -> None:
    record = Record.create()
    record._write(1, b"x")
    os.pwrite(record.fileno(), (1 << 60).to_bytes(8, "little"), REGION_BYTES + 8)
    with pytest.raises(ProtocolError, match="none of this version"):
        record.read(0)
    record.close()


def test_a_snapshot_in_the_place_of_another_slot_is_none() -> None:
    record = Record.create()
    record.write(1, Snapshot(hello(), handoff(10, 1, slot=0), recipe()))
    with pytest.raises(ProtocolError, match="slot 0 in the place of 1"):
        record.read(1)
    record.close()


def test_where_there_is_no_memory_a_daemon_goes_on(
    manager: ServiceManager, arena: Arena, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    def fail() -> Record:
        raise OSError(24, "no descriptor is left")

    monkeypatch.setattr(module.Record, "create", fail)
    life = Life(manager, arena)
    life.announce(2)
    life.save(10)
    life.keeping.release(1, 1)
    assert manager.names() == []
    assert len(caplog.records) == 1


# --- who writes there ----------------------------------------------------------------------------


def child() -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)


def end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    assert process.stdin is not None
    process.stdin.close()


def test_the_process_that_writes_is_known_dead_or_alive(
    manager: ServiceManager, arena: Arena
) -> None:
    process = child()
    life = Life(manager, arena, process.pid)
    life.save(10)
    life.record()
    (back,) = take_back(manager)
    assert not back.event.is_dead
    assert back.pidfd is not None
    end(process)
    (back,) = take_back(manager)
    assert (back.event.is_dead, back.pidfd) == (True, None)


def test_an_heir_takes_the_place_of_the_dead_one_that_wrote_before(
    manager: ServiceManager, arena: Arena
) -> None:
    process = child()
    life = Life(manager, arena, process.pid)
    life.save(10)
    end(process)
    life.announce(1, os.getpid())
    life.record()
    (back,) = take_back(manager)
    assert not back.event.is_dead
    assert back.pidfd is not None


def test_a_zombie_is_dead() -> None:
    process = child()
    holder = holder_of(process.pid)
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert watch(holder) == (True, None)
    end(process)


def test_a_number_that_another_process_has_now_is_of_a_dead_one() -> None:
    own = holder_of(os.getpid())
    assert own.started > 0
    assert watch(own._replace(started=own.started - 1)) == (True, None)


@pytest.mark.parametrize("holder", [Holder(0, 0), Holder(0, 5), Holder(-1, 5), Holder(1 << 70, 5)])
def test_who_is_not_known_may_live(holder: Holder) -> None:
    assert watch(holder) == (False, None)


def test_a_process_that_is_gone_has_no_beginning() -> None:
    process = child()
    end(process)
    assert holder_of(process.pid) == Holder(process.pid, 0)
    assert Path(f"/proc/{process.pid}").exists() is False
