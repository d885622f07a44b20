"""Where the ranks of a job meet: a few small keys in the TCPStore that the job has already.

No collective and no process group of our own: a collective that one rank enters alone hangs, and a
second group costs descriptors on every rank. Each operation here has a deadline.
"""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch.distributed as dist
import xxhash

from ckptd.errors import ConfigError, MeetingError
from ckptd.trainer.boards import Board, LocalBoard, StoreBoard, TcpBoard
from ckptd.trainer.joining import join

if TYPE_CHECKING:  # torch.distributed exports these names, but not in its types
    from torch._C._distributed_c10d import FileStore, HashStore, PrefixStore, TCPStore
elif dist.is_available():
    from torch.distributed import FileStore, HashStore, PrefixStore, TCPStore


class Meeting:
    """The ranks of one start of a job, and what they tell each other.

    Names and topics are used once; a later value under the same name replaces the earlier one. All
    methods may be called from any thread and raise `MeetingError` when the board does not answer.

    Attributes:
        rank: of this process, in the whole job.
        world_size: the number of ranks.
        local_world_size: the number of ranks on this machine.
    """

    def __init__(
        self,
        board: Board,
        rank: int,
        world_size: int,
        *,
        local_world_size: int = 1,
        prefix: str = "ckptd",
    ) -> None:
        self.rank = rank
        self.world_size = world_size
        self.local_world_size = local_world_size
        self._board = board
        self._prefix = prefix

    @classmethod
    def of_job(cls, url: str, timeout_s: float) -> Meeting:
        """Meet the other ranks of this start of the job, for the root at `url`; wait for them all.

        Every rank makes its meetings for a root in the same order.

        Raises:
            ConfigError: the job has several ranks and no store that they can meet over.
            MeetingError: naming the ranks that did not come in `timeout_s`.
        """
        is_initialized = dist.is_available() and dist.is_initialized()
        if not is_initialized and int(os.environ.get("WORLD_SIZE") or 1) > 1:
            raise ConfigError(
                "WORLD_SIZE is more than 1 and torch.distributed is not initialised: call "
                "torch.distributed.init_process_group before making a Checkpointer"
            )
        rank, world_size = (dist.get_rank(), dist.get_world_size()) if is_initialized else (0, 1)
        local = int(os.environ.get("LOCAL_WORLD_SIZE") or 1) if is_initialized else 1
        if world_size == 1:
            return cls(LocalBoard(), rank, 1, local_world_size=local)
        board, prefix = _board_of_job(), _call_sign(url, world_size)
        try:
            name = join(board, prefix, rank, world_size, timeout_s)
        except BaseException:
            board.close()
            raise
        return cls(board, rank, world_size, local_world_size=local, prefix=f"{prefix}/{name}")

    def publish(self, name: str, value: bytes) -> None:
        """Say `value` as this rank."""
        self._board.set(self._key(name, self.rank), value)

    def read(self, name: str, rank: int) -> bytes | None:
        """Return what `rank` published, None if nothing yet."""
        return self._board.get_many([self._key(name, rank)])[0]

    def read_all(self, name: str) -> list[bytes] | None:
        """Return what all ranks published, by rank; None as long as one has not."""
        keys = self._keys(name)
        if not self._board.has_all(keys):
            return None
        values = self._board.get_many(keys)
        return None if None in values else [value for value in values if value is not None]

    def has_all(self, name: str) -> bool:
        """Tell whether all ranks have published under `name`."""
        return self._board.has_all(self._keys(name))

    def withdraw(self, name: str) -> None:
        """Take back what this rank published, once no rank may read it any more."""
        self._board.delete(self._key(name, self.rank))

    def share(self, name: str, value: bytes) -> None:
        """Put a value that is the same whichever rank says it; sent only if it is not there."""
        key = self._key(name)
        if not self._board.has_all([key]):
            self._board.set(key, value)

    def fetch(self, names: Sequence[str]) -> list[bytes | None]:
        """Return shared values, None for each that is absent."""
        return self._board.get_many([self._key(name) for name in names])

    def forget(self, name: str) -> None:
        """Delete a shared value, once no rank may read it any more."""
        self._board.delete(self._key(name))

    def announce(self, topic: str, payload: bytes) -> None:
        """Tell all ranks; for rank 0."""
        self._board.set(self._key(topic), payload)

    def hear(self, topic: str, timeout_s: float) -> bytes:
        """Return what rank 0 announces, waiting for it.

        Raises:
            MeetingError: rank 0 said nothing in time.
        """
        key = self._key(topic)
        try:
            self._board.wait([key], timeout_s)
        except MeetingError as error:
            if self._board.has_all([key]):
                raise
            raise MeetingError(f"rank 0 did not announce {topic!r} in {timeout_s:g} s") from error
        (payload,) = self._board.get_many([key])
        if payload is None:
            raise MeetingError(f"what rank 0 announced as {topic!r} was deleted")
        return payload

    def gather(self, topic: str, payload: bytes, timeout_s: float) -> list[bytes]:
        """Publish, wait for all ranks to do so, and return all payloads by rank.

        Raises:
            MeetingError: naming the ranks that did not come in time.
        """
        self.publish(topic, payload)
        try:
            self._board.wait(self._keys(topic), timeout_s)
        except MeetingError as error:
            absent = [r for r in range(self.world_size) if self.read(topic, r) is None]
            if not absent:
                raise
            raise MeetingError(
                f"{_ranks(absent)} of {self.world_size} did not reach {topic!r} in {timeout_s:g} s"
            ) from error
        payloads = self.read_all(topic)
        if payloads is None:
            raise MeetingError(f"a rank took back {topic!r} while others read it")
        return payloads

    def close(self) -> None:
        """Release the connection. May be repeated."""
        self._board.close()

    def _key(self, name: str, rank: int | None = None) -> str:
        return f"{self._prefix}/{name}" if rank is None else f"{self._prefix}/{name}/{rank}"

    def _keys(self, name: str) -> list[str]:
        return [self._key(name, rank) for rank in range(self.world_size)]


def _board_of_job() -> Board:
    """Find the store that the process group was initialised with.

    This is the one place that uses a name which torch keeps to itself: ``_get_default_store``
    (there since torch 1.7) is the only way to the store of a group that was initialised with an
    explicit store or through the agent of torchrun. Without it the environment must say where.
    """
    try:
        store = dist.distributed_c10d._get_default_store()  # noqa: SLF001 (see above)
    except AttributeError:
        store = None
    while isinstance(store, PrefixStore):
        store = store.underlying_store
    if isinstance(store, TCPStore):
        return TcpBoard(store.host, store.port)
    if isinstance(store, HashStore | FileStore):
        # Both guard each request with a mutex of their own and never block in `check`.
        shared = PrefixStore("ckptd", store)
        return StoreBoard(lambda: shared)
    host, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    if not host or not port or store is not None:
        raise ConfigError(
            f"the ranks cannot meet over a store of type {type(store).__name__}: initialise "
            "torch.distributed with a TCPStore, for example with init_method='env://'"
        )
    return TcpBoard(host, int(port))


_ordinals: dict[str, itertools.count[int]] = {}
_ordinals_lock = threading.Lock()  # guards _ordinals


def _call_sign(url: str, world_size: int) -> str:
    """Return a prefix under which the ranks find each other: the same on all, used by every start.

    The ordinal keeps the meetings of one process apart: a rank may make the next one while others
    have not left the last.
    """
    digest = xxhash.xxh3_64_hexdigest(url.encode())
    with _ordinals_lock:
        ordinal = next(_ordinals.setdefault(f"{digest}-{world_size}", itertools.count(1)))
    return f"ckptd/{digest}-{world_size}-{ordinal}"


def _ranks(ranks: Sequence[int]) -> str:
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(map(str, ranks))
