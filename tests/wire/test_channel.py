from __future__ import annotations

import array
import fcntl
import os
import resource
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from ckptd.errors import DaemonUnavailableError, ProtocolError
from ckptd.wire import frames
from ckptd.wire.channel import Channel
from ckptd.wire.messages import Arena, Ask, FromDaemon, FromTrainer, Report, Settled

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
