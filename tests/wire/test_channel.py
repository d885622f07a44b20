from __future__ import annotations

import array
import fcntl
import os
import resource
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import msgspec
import pytest

from ckptd.errors import DaemonUnavailableError, ProtocolError
from ckptd.wire import frames
from ckptd.wire.channel import MAX_QUEUE_BYTES, MAX_QUEUE_FDS, Channel
from ckptd.wire.messages import (
    Arena,
    Ask,
    Ceded,
    FromDaemon,
    FromTrainer,
    Lent,
    Report,
    Settled,
    Stop,
)
from tests.fakes.engines import handoff, recipe

ARENA = Arena(1, 1, 8192)


def open_fds() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


@contextmanager
def same_fds() -> Iterator[None]:
    before = len(open_fds())
    yield
    assert len(open_fds()) == before


@pytest.fixture
def pair() -> Iterator[tuple[Channel, Channel]]:
    """A trainer's channel and a daemon's."""
    a, b = socket.socketpair()
    trainer, daemon = Channel(a, FromDaemon), Channel(b, FromTrainer)
    yield trainer, daemon
    trainer.close()
    daemon.close()


@pytest.fixture
def raw() -> Iterator[tuple[socket.socket, Channel]]:
    """A hostile client's socket and the daemon's channel."""
    a, b = socket.socketpair()
    daemon = Channel(b, FromTrainer)
    yield a, daemon
    a.close()
    daemon.close()


def is_refused(talk: Callable[[], object]) -> bool:
    try:
        talk()
    except DaemonUnavailableError:
        return True
    return False


def send_fds(sock: socket.socket, data: bytes, fds: list[int]) -> None:
    sock.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))])


def test_a_message_and_a_descriptor_arrive_together(pair: tuple[Channel, Channel]) -> None:
    trainer, daemon = pair
    fd = os.memfd_create("x")
    trainer.send(Ask(), deadline_s=5)
    trainer.send(ARENA, [fd], deadline_s=5)
    got = [*(daemon.read_ready() or []), *(daemon.read_ready() or [])]
    assert got == [Ask(), ARENA]
    taken = daemon.take_fd()
    assert os.fstat(taken).st_ino == os.fstat(fd).st_ino
    assert fcntl.fcntl(taken, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
    os.close(taken)
    os.close(fd)


def test_descriptors_come_in_order_of_sending(pair: tuple[Channel, Channel]) -> None:
    trainer, daemon = pair
    fds = [os.memfd_create(str(i)) for i in range(2)]
    for fd in fds:
        trainer.send(ARENA, [fd], deadline_s=5)
        daemon.read_ready()
    sent = [os.fstat(fd).st_ino for fd in fds]
    assert [os.fstat(fd).st_ino for fd in daemon.taken_fds] == sent
    for fd in fds:
        os.close(fd)


def test_an_announced_descriptor_that_did_not_come_is_a_protocol_error(
    pair: tuple[Channel, Channel],
) -> None:
    trainer, daemon = pair
    trainer.send(ARENA, deadline_s=5)
    assert daemon.read_ready() == [ARENA]
    with pytest.raises(ProtocolError):
        daemon.take_fd()


def test_nothing_to_read_is_not_the_end_and_the_end_is_none(pair: tuple[Channel, Channel]) -> None:
    trainer, daemon = pair
    assert daemon.read_ready() == []
    trainer.close()
    assert daemon.read_ready() is None


def test_the_end_inside_a_frame_is_the_end(raw: tuple[socket.socket, Channel]) -> None:
    client, daemon = raw
    client.send(frames.encode(ARENA)[:7])
    assert daemon.read_ready() == []
    client.close()
    assert daemon.read_ready() is None


def test_a_large_message_goes_through_a_small_buffer(pair: tuple[Channel, Channel]) -> None:
    trainer, daemon = pair
    trainer.accept_large_frames()
    report = Report(os.urandom(3 << 20))
    got: list[object] = []
    reader = threading.Thread(target=lambda: got.extend(trainer.receive(20)))
    reader.start()
    daemon.send(report, deadline_s=20)
    reader.join()
    assert got == [report]


def test_receive_gives_nothing_at_the_deadline_and_raises_at_the_end(
    pair: tuple[Channel, Channel],
) -> None:
    trainer, daemon = pair
    assert trainer.receive(0) == []
    assert trainer.receive(0.001) == []
    daemon.send(Settled(), deadline_s=1)
    daemon.close()
    assert trainer.receive(5) == [Settled()]
    with pytest.raises(DaemonUnavailableError):
        trainer.receive(5)


def test_p1_a_stopped_daemon_blocks_a_send_no_longer_than_its_deadline(
    pair: tuple[Channel, Channel],
) -> None:
    trainer, _ = pair
    with pytest.raises(DaemonUnavailableError, match="took nothing"):
        trainer.send(Report(b"x" * (4 << 20)), deadline_s=0.01)
    with pytest.raises(DaemonUnavailableError, match="earlier message"):
        trainer.send(Ask(), deadline_s=0.01)


def test_p1_a_dead_daemon_is_unavailable_but_its_last_words_are_heard(
    pair: tuple[Channel, Channel],
) -> None:
    trainer, daemon = pair
    daemon.queue(Settled())
    assert daemon.write_ready()
    daemon.close()
    with pytest.raises(DaemonUnavailableError):
        trainer.send(Ask(), deadline_s=5)
    assert trainer.receive(5) == [Settled()]


def test_a_message_that_cannot_be_sent_leaves_the_channel_usable(
    pair: tuple[Channel, Channel],
) -> None:
    trainer, daemon = pair
    with pytest.raises(ProtocolError):
        trainer.send(Arena("\ud800", 1, 1), deadline_s=1)  # type: ignore[arg-type]
    trainer.send(Ask(), deadline_s=1)
    assert daemon.read_ready() == [Ask()]


def test_s6_a_slow_reader_is_dropped_at_the_bound(raw: tuple[socket.socket, Channel]) -> None:
    _, daemon = raw
    report = Report(b"x" * (1 << 20))
    for _ in range(8):
        daemon.queue(report)
        assert daemon.write_ready()
    assert daemon.wants_write
    with pytest.raises(ProtocolError, match="does not read"):
        daemon.queue(report)


def test_a_queue_empties_as_the_peer_reads(pair: tuple[Channel, Channel]) -> None:
    trainer, daemon = pair
    trainer.accept_large_frames()
    daemon.queue(Report(b"x" * (2 << 20)))
    daemon.queue(Settled())
    got: list[object] = []
    while len(got) < 2:
        assert daemon.write_ready()
        got += trainer.read_ready() or []
    assert got[1] == Settled()
    assert not daemon.wants_write


def test_writing_to_a_closed_peer_says_so(pair: tuple[Channel, Channel]) -> None:
    trainer, daemon = pair
    trainer.close()
    daemon.queue(Settled())
    assert daemon.write_ready() is False


# --- queued, with descriptors ------------------------------------------------------------------


def flow(daemon: Channel, trainer: Channel) -> Iterator[tuple[object, int | None]]:
    """Let what is queued through; give each message with the descriptor that it announces."""
    while daemon.wants_write:
        assert daemon.write_ready()
        for message in trainer.read_ready() or []:
            has_fd = isinstance(message, (Lent, Ceded)) and message.slots > 0
            yield message, trainer.take_fd() if has_fd else None


def inode_of(fd: int) -> int:
    return os.fstat(fd).st_ino


def test_queued_descriptors_come_in_order_each_with_its_message(
    pair: tuple[Channel, Channel],
) -> None:
    trainer, daemon = pair
    trainer.accept_large_frames()
    fds = [os.memfd_create(str(i)) for i in range(3)]
    messages = [
        Lent(1, 1, 8192),
        Settled(),
        Ceded(1, 8192),
        Report(b"x" * (1 << 20)),
        Lent(2, 1, 1),
    ]
    with same_fds():
        for message in messages:
            has_fd = isinstance(message, (Lent, Ceded))
            own = fds[
                sum(isinstance(m, (Lent, Ceded)) for m in messages[: messages.index(message)])
            ]
            daemon.queue(message, [own] if has_fd else [])
        got = []
        inodes = []
        for message, fd in flow(daemon, trainer):
            got.append(message)
            if fd is not None:
                inodes.append(inode_of(fd))
                os.close(fd)
    assert got == messages
    assert inodes == [inode_of(fd) for fd in fds], "and those that queued them have them still"
    assert trainer.taken_fds == []
    for fd in fds:
        os.close(fd)


def test_a_queued_descriptor_never_comes_before_its_message_begins(
    pair: tuple[Channel, Channel],
) -> None:
    trainer, daemon = pair
    trainer.accept_large_frames()
    fd = os.memfd_create("x")
    daemon.queue(Report(b"x" * (2 << 20)))
    daemon.queue(Ceded(1, 8192), [fd])
    os.close(fd)
    got: list[object] = []
    while not got:
        assert daemon.write_ready()
        assert trainer.taken_fds == []
        got += trainer.read_ready() or []
    while Ceded(1, 8192) not in got:
        assert daemon.write_ready()
        got += trainer.read_ready() or []
    os.close(trainer.take_fd())


def test_a_queued_descriptor_is_closed_when_it_was_sent(pair: tuple[Channel, Channel]) -> None:
    trainer, daemon = pair
    trainer.accept_large_frames()
    fd = os.memfd_create("x")
    before = len(open_fds())
    daemon.queue(Lent(1, 1, 8192, handoff(1, 1)), [fd])
    assert len(open_fds()) == before + 1, "the caller's may be closed at once"
    assert daemon.write_ready()
    assert len(open_fds()) == before
    os.close(fd)


def test_p2_descriptors_that_were_never_sent_are_closed_with_the_channel(
    raw: tuple[socket.socket, Channel],
) -> None:
    _, daemon = raw
    fd = os.memfd_create("x")
    before = len(open_fds())
    daemon.queue(Report(b"x" * (4 << 20)))
    assert daemon.write_ready()
    for _ in range(3):
        daemon.queue(Ceded(1, 8192), [fd])
    daemon.close()
    assert len(open_fds()) == before - 1, "only the socket"
    assert not daemon.wants_write
    os.close(fd)


def test_s6_a_slow_reader_cannot_use_the_daemons_descriptors_up(
    raw: tuple[socket.socket, Channel],
) -> None:
    _, daemon = raw
    fd = os.memfd_create("x")
    daemon.queue(Report(b"x" * (4 << 20)))
    assert daemon.write_ready()
    for _ in range(MAX_QUEUE_FDS):
        daemon.queue(Ceded(1, 8192), [fd])
    before = len(open_fds())
    with pytest.raises(ProtocolError, match="does not read"):
        daemon.queue(Ceded(1, 8192), [fd])
    assert len(open_fds()) == before
    daemon.queue(Settled())
    os.close(fd)


LARGE = Lent(1, 1, 8192, handoff(1, 1), recipe())


def large(count: int) -> Lent:
    """Return a message with values of so many bytes."""
    return msgspec.structs.replace(LARGE, handoff=msgspec.structs.replace(
        LARGE.handoff, values=b"x" * count
    ))  # fmt: skip


def test_a_message_larger_than_the_queue_passes_if_nothing_waits(
    pair: tuple[Channel, Channel],
) -> None:
    trainer, daemon = pair
    trainer.accept_large_frames()
    fd = os.memfd_create("x")
    message = large(MAX_QUEUE_BYTES + 1)
    daemon.queue(message, [fd])
    daemon.queue(Stop("the node goes"))  # a word behind it is no reason to drop anybody
    (lent, got), (stop, _) = flow(daemon, trainer)
    assert lent == message
    assert got is not None
    assert inode_of(got) == inode_of(fd)
    assert stop == Stop("the node goes")
    os.close(got)
    os.close(fd)


def test_s6_behind_a_large_message_no_more_waits_than_ever(
    pair: tuple[Channel, Channel],
) -> None:
    trainer, daemon = pair
    trainer.accept_large_frames()
    large = Report(b"x" * (MAX_QUEUE_BYTES + 1))
    daemon.queue(large)
    assert daemon.write_ready()
    for _ in range(2):
        with pytest.raises(ProtocolError, match="does not read"):
            daemon.queue(large)
    list(flow(daemon, trainer))
    daemon.queue(Report(b"x" * (1 << 20)))
    with pytest.raises(ProtocolError, match="does not read"):
        daemon.queue(large)
    list(flow(daemon, trainer))
    daemon.queue(large)


def test_a_message_beyond_a_frame_is_refused_and_leaves_the_queue_as_it_was(
    raw: tuple[socket.socket, Channel], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, daemon = raw
    monkeypatch.setattr(frames, "MAX_FRAME_BYTES", 1 << 20)
    with same_fds():
        fd = os.memfd_create("x")
        with pytest.raises(ProtocolError, match="cannot be sent"):
            daemon.queue(large(1 << 20), [fd])
        os.close(fd)
    assert not daemon.wants_write


@pytest.mark.parametrize("count", [3, 253])
def test_m3_too_many_descriptors_at_once_are_all_closed(
    raw: tuple[socket.socket, Channel], count: int
) -> None:
    client, daemon = raw
    with same_fds():
        fd = os.open(os.devnull, os.O_RDONLY)
        send_fds(client, frames.encode(ARENA), [fd] * count)
        os.close(fd)
        with pytest.raises(ProtocolError, match="descriptors"):
            daemon.read_ready()
        assert daemon.taken_fds == []


def test_m3_descriptors_that_nobody_takes_do_not_pile_up(
    raw: tuple[socket.socket, Channel],
) -> None:
    client, daemon = raw
    with same_fds():
        fd = os.open(os.devnull, os.O_RDONLY)
        for _ in range(3):
            send_fds(client, frames.encode(Ask()), [fd])
        os.close(fd)
        assert daemon.read_ready() == [Ask()]
        assert daemon.read_ready() == [Ask()]
        with pytest.raises(ProtocolError):
            daemon.read_ready()


def test_s6_garbage_closes_the_descriptors_that_came_with_it(
    raw: tuple[socket.socket, Channel],
) -> None:
    client, daemon = raw
    with same_fds():
        fd = os.open(os.devnull, os.O_RDONLY)
        send_fds(client, b"\0\0\0\0", [fd])
        os.close(fd)
        with pytest.raises(ProtocolError):
            daemon.read_ready()


def test_l6_descriptors_that_do_not_fit_the_table_are_a_protocol_error(
    raw: tuple[socket.socket, Channel],
) -> None:
    client, daemon = raw
    fd = os.open(os.devnull, os.O_RDONLY)
    send_fds(client, frames.encode(ARENA), [fd, fd])
    os.close(fd)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = os.open(os.devnull, os.O_RDONLY)  # the lowest free number: one fits below the limit
    os.close(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free + 1, hard))
    try:
        with pytest.raises(ProtocolError, match="fit this process"):
            daemon.read_ready()
        assert daemon.taken_fds == []
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_m5_dripping_bytes_does_not_reset_the_age_of_a_frame(
    raw: tuple[socket.socket, Channel],
) -> None:
    client, daemon = raw
    data = frames.encode(ARENA)
    assert daemon.partial_since_s is None
    client.send(data[:3])
    daemon.read_ready()
    began = daemon.partial_since_s
    client.send(data[3:9])
    daemon.read_ready()
    assert began is not None
    assert daemon.partial_since_s == began
    client.send(data[9:] + data[:1])
    assert daemon.read_ready() == [ARENA]
    assert daemon.partial_since_s is not None
    assert daemon.partial_since_s > began
    client.send(data[1:])
    daemon.read_ready()
    assert daemon.partial_since_s is None


def test_close_closes_untaken_descriptors_and_may_be_repeated() -> None:
    with same_fds():
        a, b = socket.socketpair()
        fd = os.open(os.devnull, os.O_RDONLY)
        send_fds(a, frames.encode(ARENA), [fd, fd])
        os.close(fd)
        daemon = Channel(b, FromTrainer)
        daemon.read_ready()
        assert len(daemon.taken_fds) == 2
        daemon.close()
        daemon.close()
        assert daemon.fileno() == -1
        a.close()


def test_p2_descriptors_are_at_their_baseline_after_200_rude_clients() -> None:
    fd = os.memfd_create("x")
    endings: list[Callable[[socket.socket], object]] = [
        lambda s: send_fds(s, frames.encode(ARENA), [fd]),
        lambda s: send_fds(s, frames.encode(ARENA)[:5], [fd, fd]),
        lambda s: send_fds(s, b"\0\0\0\0", [fd] * 7),
        lambda s: s.send(b"\xff" * 9),
        lambda s: None,
    ]
    with same_fds():
        for turn in range(200):
            a, b = socket.socketpair()
            daemon = Channel(b, FromTrainer)
            endings[turn % len(endings)](a)
            a.close()
            try:
                while daemon.read_ready() is not None:
                    pass
            except ProtocolError:
                pass
            daemon.close()
    os.close(fd)


def test_e2_a_forked_child_does_not_talk_on_its_parents_channel(
    pair: tuple[Channel, Channel],
) -> None:
    trainer, daemon = pair
    child = os.fork()
    if child == 0:
        refusals = is_refused(lambda: trainer.send(Ask(), deadline_s=1))
        refusals += is_refused(trainer.read_ready)
        trainer.close()  # closes the child's copy only
        os._exit(refusals)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 2
    assert daemon.read_ready() == []
    trainer.send(Ask(), deadline_s=1)
    assert daemon.read_ready() == [Ask()]


def test_e2_the_socket_is_not_inherited_across_exec(pair: tuple[Channel, Channel]) -> None:
    for channel in pair:
        assert not os.get_inheritable(channel.fileno())
