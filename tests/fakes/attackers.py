"""Clients of a daemon that mean harm: raw connections, and what they do with them."""

from __future__ import annotations

import array
import itertools
import os
import random
import socket
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress

import msgspec

from ckptd.model.columns import Columns
from ckptd.model.tensor import Tensor
from ckptd.shm.arena import Arena
from ckptd.units import MIB
from ckptd.wire import frames
from ckptd.wire import messages as say
from ckptd.wire.address import connect
from tests.fakes.jobs import Daemon


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
                said = b""
                while b"failed" not in said:  # that it was taken comes before that
                    said += (more := client.socket.recv(65536))
                    assert more, said
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
