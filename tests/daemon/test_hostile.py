"""Whatever comes through the socket, the daemon serves everyone else and loses no descriptor."""

from __future__ import annotations

import array
import itertools
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress

import msgspec
import pytest

from ckptd.model.columns import Columns
from ckptd.model.tensor import Tensor
from ckptd.shm.arena import Arena
from ckptd.units import MIB
from ckptd.wire import frames
from ckptd.wire import messages as say
from ckptd.wire.address import connect
from tests.fakes.jobs import Daemon, Place, state_of, wait_until
from tests.fakes.trainers import FakeTrainer, assert_all_whole

pytestmark = pytest.mark.system


def hello(root: str, **changes: object) -> say.Hello:
    base = say.Hello(
        protocol=say.PROTOCOL, root=root, storage_options={}, attempt=2, token="x", rank=0,
        world_size=1, compression="auto", commit_timeout_s=60.0,
    )  # fmt: skip
    return msgspec.structs.replace(base, **changes)


class Attacker(ExitStack):
    """A raw connection, closed at the end of the block."""

    def __init__(self, daemon: Daemon, root: str) -> None:
        super().__init__()
        self.root = root
        self.socket = self.enter_context(connect(daemon.socket, deadline_s=10.0))
        self.socket.settimeout(20.0)

    def send(self, data: bytes, fds: list[int] | None = None) -> None:
        """Send bytes, descriptors beside them; a daemon that hung up already is fine."""
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        with suppress(OSError):
            self.socket.sendmsg([data], rights)

    def say(self, message: say.Message, fds: list[int] | None = None) -> None:
        self.send(frames.encode(message), fds)

    def enter(self) -> None:
        """Say hello and wait for the welcome."""
        self.say(hello(self.root))
        assert self.socket.recv(65536)

    def wait_hung_up(self) -> None:
        """Wait until the daemon closes the connection."""
        with suppress(ConnectionResetError):
            while self.socket.recv(65536):
                pass


@contextmanager
def files(*kinds: str) -> Iterator[list[int]]:
    """Give descriptors that are no arena."""
    fds: list[int] = []
    try:
        for kind in kinds:
            if kind == "file":
                fd, path = tempfile.mkstemp()
                os.unlink(path)
                os.ftruncate(fd, 16384)
                fds.append(fd)
            elif kind == "pipe":
                fds += os.pipe()[:1]
            elif kind == "null":
                fds.append(os.open("/dev/null", os.O_RDWR))
            else:
                fd = os.memfd_create("hostile")
                os.ftruncate(fd, 1 << 40 if kind == "sparse" else 16384)
                fds.append(fd)
        yield fds
    finally:
        for fd in fds:
            os.close(fd)


def garbage(client: Attacker) -> None:
    client.send(random.Random(7).randbytes(4000))
    client.wait_hung_up()


def oversize(client: Attacker) -> None:
    client.send((1 << 31).to_bytes(4, "big") + b"x")
    client.wait_hung_up()


def large_before_welcome(client: Attacker) -> None:
    client.send((1 * MIB).to_bytes(4, "big") + bytes(1000))
    client.wait_hung_up()


def empty_frame(client: Attacker) -> None:
    client.send(bytes(4))
    client.wait_hung_up()


def half_a_frame(client: Attacker) -> None:
    client.send(frames.encode(hello(client.root))[:20])


def half_a_large_frame(client: Attacker) -> None:
    client.enter()
    client.send((60 * MIB).to_bytes(4, "big") + bytes(100_000))


def unknown_tag(client: Attacker) -> None:
    body = msgspec.msgpack.encode({"say": "exec", "code": "1"})
    client.send(len(body).to_bytes(4, "big") + body)
    client.wait_hung_up()


def deep_nesting(client: Attacker) -> None:
    body = b"\x91" * 60_000
    client.send(len(body).to_bytes(4, "big") + body)
    client.wait_hung_up()


def words_of_a_daemon(client: Attacker) -> None:
    client.say(say.Finished(1, 1, "committed", "", "", "", ()))
    client.wait_hung_up()


def handoff_before_hello(client: Attacker) -> None:
    client.say(handoff())
    client.wait_hung_up()


def handoff_of_nothing(client: Attacker) -> None:
    client.enter()
    client.say(handoff())
    client.wait_hung_up()


def two_hellos(client: Attacker) -> None:
    client.enter()
    client.say(hello(client.root))
    client.wait_hung_up()


def other_protocol(client: Attacker) -> None:
    client.say(hello(client.root, protocol=99))
    client.wait_hung_up()


def rank_out_of_range(client: Attacker) -> None:
    client.say(hello(client.root, rank=5))
    client.wait_hung_up()


def another_jobs_attempt(client: Attacker) -> None:
    client.say(hello(client.root, attempt=1))
    client.wait_hung_up()


def no_root(client: Attacker) -> None:
    client.say(hello("/proc"))
    client.wait_hung_up()


def relative_root(client: Attacker) -> None:
    client.say(hello("../../etc"))
    client.wait_hung_up()


def arena_without_memory(client: Attacker) -> None:
    client.enter()
    client.say(say.Arena(1, 2, 8192))
    client.wait_hung_up()


def wrong_memory(kind: str) -> Callable[[Attacker], None]:
    def attack(client: Attacker) -> None:
        client.enter()
        with files(kind) as fds:
            client.say(say.Arena(1, 2, 8192), fds)
            client.wait_hung_up()

    attack.__name__ = f"arena_that_is_a_{kind}"
    return attack


def many_descriptors(client: Attacker) -> None:
    client.enter()
    with files(*["null"] * 200) as fds:
        client.send(frames.encode(say.Arena(1, 2, 8192)), fds)
        client.wait_hung_up()


def descriptors_nobody_announced(client: Attacker) -> None:
    client.enter()
    with files("null") as fds:
        client.say(say.Settle(), fds)
        client.wait_hung_up()


def descriptors_with_half_a_frame(client: Attacker) -> None:
    with files("null", "null") as fds:
        client.send(b"\0\0", fds)


def handoff(**changes: object) -> say.Handoff:
    base = say.Handoff(
        step=10, sequence=1, arena=1, slot=0, generation=1, recipe=1, values=b"{}",
        fingerprints=b"", metrics={}, previous=None, captured_at=0.0,
    )  # fmt: skip
    return msgspec.structs.replace(base, **changes)


def recipe(**changes: object) -> say.Recipe:
    base = say.Recipe(
        recipe=1, plan=None, layout="0" * 32, tensors=(), aliases={}, pieces=Columns(),
        chunks=(say.ChunkPlan("float32", 4096, 4096),),
    )  # fmt: skip
    return msgspec.structs.replace(base, **changes)


_steps = itertools.count(1000)  # a step that failed once is answered from memory


def handoff_of(offer: say.Handoff, step: int) -> say.Handoff:
    return msgspec.structs.replace(offer, step=step, sequence=step)


def with_arena(
    name: str, plan: say.Recipe, offer: say.Handoff, *, is_dropped: bool
) -> Callable[[Attacker], None]:
    """Return an attack by a handoff: the client is dropped, or the save fails."""

    def attack(client: Attacker) -> None:
        client.enter()
        with Arena.create(2, 8192) as arena:
            slot = arena.slot(0)
            slot.begin(10, 1)
            slot.finish()
            client.say(say.Arena(1, 2, 8192), [arena.fileno()])
            client.say(plan)
            client.say(offer if offer.step != 10 else handoff_of(offer, next(_steps)))
            if is_dropped:
                client.wait_hung_up()
            else:
                assert b"failed" in client.socket.recv(65536)
            del slot

    attack.__name__ = name
    return attack


_TENSOR = Tensor("w", "float32", (1024,), "parameter", True, "cpu")
_BEYOND = (say.ChunkPlan("float32", 4096, 1 << 40),)
_COLUMNS = Columns(*[b"\xff" * 8] * 5)

ATTACKS: list[Callable[[Attacker], None]] = [
    garbage, oversize, large_before_welcome, empty_frame, half_a_frame, half_a_large_frame,
    unknown_tag, deep_nesting, words_of_a_daemon, handoff_before_hello, handoff_of_nothing,
    two_hellos, other_protocol, rank_out_of_range, another_jobs_attempt, no_root, relative_root,
    arena_without_memory, many_descriptors, descriptors_nobody_announced,
    descriptors_with_half_a_frame,
    *map(wrong_memory, ["file", "pipe", "null", "memfd", "sparse"]),
    with_arena("a_slot_that_is_not_there", recipe(), handoff(slot=9), is_dropped=True),
    with_arena("values_that_are_no_json", recipe(), handoff(values=b"{"), is_dropped=True),
    with_arena("values_that_are_deep", recipe(), handoff(values=b"[" * 100_000), is_dropped=True),
    with_arena("a_previous_with_dots", recipe(), handoff(previous="../../x"), is_dropped=True),
    with_arena("a_step_out_of_range", recipe(), handoff(step=1 << 47), is_dropped=True),
    with_arena("a_stale_generation", recipe(), handoff(generation=9), is_dropped=False),
    with_arena("a_chunk_beyond_its_slot", recipe(chunks=_BEYOND), handoff(), is_dropped=False),
    with_arena(
        "a_chunk_of_no_dtype", recipe(chunks=(say.ChunkPlan("object", 4096, 8),)), handoff(),
        is_dropped=False,
    ),
    with_arena("pieces_of_nothing", recipe(pieces=_COLUMNS), handoff(), is_dropped=False),
    with_arena(
        "pieces_out_of_range", recipe(pieces=_COLUMNS, tensors=(_TENSOR,)), handoff(),
        is_dropped=False,
    ),
    with_arena(
        "a_tensor_with_an_odd_name",
        recipe(tensors=(msgspec.structs.replace(_TENSOR, fqn="a\n\x1b[31m"),)), handoff(),
        is_dropped=False,
    ),
]  # fmt: skip


@pytest.fixture
def daemon(place: Place) -> Daemon:
    return place.daemon()


def test_s6_p2_hostile_clients_neither_stop_the_daemon_nor_leave_a_descriptor(
    place: Place, daemon: Daemon
) -> None:
    with FakeTrainer(daemon.socket, place.root) as good, ExitStack() as lazy:
        good.connect().save(10, 1)
        assert good.outcome(10).state == "committed"
        fds, resident = daemon.fd_count(), daemon.resident_bytes()
        for turn in range(200):
            attack = ATTACKS[turn % len(ATTACKS)]
            with Attacker(daemon, place.root) as client:
                try:
                    attack(client)
                except (TimeoutError, AssertionError) as error:
                    raise AssertionError(f"{attack.__name__} was not refused") from error
                if attack in (half_a_frame, half_a_large_frame):
                    lazy.enter_context(client.socket.dup())  # stays, and owes the rest
            if turn % 20 == 19:
                step = 10 * (turn // 20) + 20
                good.save(step, step // 10)
                assert good.outcome(step).state == "committed"
        lazy.close()
        wait_until(lambda: daemon.fd_count() == fds, "descriptors are closed", 20.0)
        assert daemon.resident_bytes() < resident + 40 * MIB
        assert daemon.is_running
        assert "Traceback" not in daemon.text
    store = place.store()
    assert assert_all_whole(store) == list(range(10, 120, 10))
    store.close()


def test_m5_a_client_that_drips_does_not_keep_others_waiting(place: Place, daemon: Daemon) -> None:
    with FakeTrainer(daemon.socket, place.root) as good, ExitStack() as slow:
        for _ in range(20):
            client = slow.enter_context(Attacker(daemon, place.root))
            client.send(frames.encode(hello(place.root))[:9])
        good.connect().save(10, 1)
        assert good.outcome(10).state == "committed"


def test_s6_a_client_that_never_reads_is_dropped_and_others_are_served(
    place: Place, daemon: Daemon
) -> None:
    with FakeTrainer(daemon.socket, place.root) as good, Attacker(daemon, place.root) as deaf:
        deaf.enter()
        with suppress(OSError):  # dropped
            while True:
                deaf.socket.sendall(frames.encode(say.Ask()) * 1000)
        good.connect().save(10, 1)
        assert good.outcome(10).state == "committed"


def is_at_end(client: Attacker) -> bool:
    """Tell whether the daemon has closed this connection."""
    try:
        return client.socket.recv(1) == b""
    except BlockingIOError:
        return False


def test_l6_clients_beyond_the_descriptor_limit_are_turned_away_and_come_back_later(
    place: Place,
) -> None:
    daemon = place.daemon()
    limit = daemon.fd_count() + 12
    subprocess.run(
        ["prlimit", f"--pid={daemon.pid}", f"--nofile={limit}:{limit}"], check=True
    )  # fmt: skip
    with ExitStack() as crowd:
        clients = [crowd.enter_context(Attacker(daemon, place.root)) for _ in range(40)]
        for client in clients:
            client.socket.setblocking(False)
        wait_until(lambda: any(map(is_at_end, clients)), "somebody is turned away")
        assert not all(map(is_at_end, clients)), "there is room for some"
        assert "too slow" not in daemon.text, "they were closed at once, not for their silence"
    with FakeTrainer(daemon.socket, place.root) as good:
        wait_until(lambda: daemon.fd_count() < limit - 8, "the crowd is gone")
        good.connect().save(10, 1)
        assert good.outcome(10).state == "committed"


@pytest.mark.skipif(os.geteuid() != 0, reason="needs a second user")
def test_s5_another_users_process_is_shut_out_before_a_byte_is_read(
    place: Place, daemon: Daemon
) -> None:
    code = """
import os, socket, sys
os.setgroups([]); os.setgid(65534); os.setuid(65534)
sock = socket.socket(socket.AF_UNIX)
try:
    sock.connect(sys.argv[1])
except PermissionError:
    print("shut"); sys.exit()
sock.settimeout(20)
try:
    sock.sendall(b"\\0\\0\\0\\x01x")
    print("closed" if not sock.recv(10) else "served")
except OSError:
    print("closed")
"""

    def visit() -> str:
        done = subprocess.run(
            [sys.executable, "-c", code, daemon.socket], capture_output=True, text=True,
            timeout=60, check=True, env=place.env(),
        )  # fmt: skip
        return done.stdout.strip()

    assert visit() == "shut"  # the directory
    os.chmod(place.base, 0o755)
    os.chmod(place.runtime, 0o755)
    os.chmod(daemon.socket, 0o777)
    assert visit() == "closed"  # the uid
    os.chmod(place.runtime, 0o700)
    assert "Traceback" not in daemon.text


def test_k8_a_trainer_that_aborts_while_it_hands_off_changes_nothing(
    place: Place, daemon: Daemon
) -> None:
    code = """
import os, sys
sys.path.insert(0, sys.argv[1])
from ckptd.wire import frames
from tests.fakes.trainers import FakeTrainer
trainer = FakeTrainer(sys.argv[2], sys.argv[3])
trainer.connect()
trainer.fill(10, 1)
whole = frames.encode(trainer.handoffs[10])
trainer._channel._socket.send(whole[: len(whole) // 2])
os.abort()
"""
    process = subprocess.run(
        [sys.executable, "-c", code, place.env()["PYTHONPATH"], daemon.socket, place.root],
        env=place.env(), cwd="/", check=False, timeout=60, preexec_fn=_no_core,
    )  # fmt: skip
    assert process.returncode == -signal.SIGABRT
    with FakeTrainer(daemon.socket, place.root, attempt=2) as next_one:
        next_one.connect().save(20, 1)
        assert next_one.outcome(20).state == "committed"
    store = place.store()
    assert assert_all_whole(store) == [20]
    store.close()
    assert state_of(daemon.pid) != "Z"


def _no_core() -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
