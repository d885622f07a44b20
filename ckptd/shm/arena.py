"""The memory that a trainer fills and a daemon reads: a sealed memfd, mapped once on either side.

Why a memfd: it is bound by no /dev/shm, has no name that could be left behind or opened by others,
and lives as long as any process holds it. Why seals: a file that could shrink would kill its reader
with SIGBUS, see memfd_create(2) and fcntl(2).
"""

from __future__ import annotations

import fcntl
import mmap
import os
from collections.abc import Callable
from types import TracebackType

from ckptd.errors import ConfigError, ProtocolError
from ckptd.shm import kernel
from ckptd.shm.memory import available_bytes
from ckptd.shm.slots import SLOT_HEADER_BYTES, Slot
from ckptd.units import MIB, format_bytes

MAX_SLOTS = 64

_POPULATE_BYTES = 32 * MIB
_TOUCH_BYTES = 2 * MIB


def round_up(payload_bytes: int) -> int:
    """Return the `slot_bytes` of a slot for `payload_bytes`: header and payload, in whole pages."""
    return -(-(SLOT_HEADER_BYTES + payload_bytes) // mmap.PAGESIZE) * mmap.PAGESIZE


class Arena:
    """`slots` slots of `slot_bytes` bytes each, a header included, in one mapping.

    It owns mapping and descriptor, until `close` or the end of the ``with`` block. Slots and
    `prefault` may be used from any thread. A forked child does not inherit the mapping: touching it
    there is a segmentation fault.

    Attributes:
        slots: the number of slots.
        slot_bytes: the size of one, in whole pages.
        is_shared: whether there is a descriptor that can be handed to another process.
    """

    def __init__(self, mapping: mmap.mmap, fd: int | None, slots: int, slot_bytes: int) -> None:
        """Wrap what `create` or `adopt` made; not for other callers."""
        self.slots = slots
        self.slot_bytes = slot_bytes
        self.is_shared = fd is not None
        self._fd = fd
        self._map: mmap.mmap | None = mapping
        self._address = kernel.address_of(mapping)
        kernel.hide_from_children_and_dumps(self._address, self.bytes)

    @classmethod
    def create(cls, slots: int, slot_bytes: int, *, is_shared: bool = True) -> Arena:
        """Make a new arena whose memory is reserved, so that no later write can fail.

        With `is_shared` False it is plain private memory, for a daemon in this process; that works
        on every system, and reserves nothing.

        Raises:
            ConfigError: if the memory is not there. Nothing is left behind.
        """
        _check_shape(slots, slot_bytes, ConfigError)
        total = slots * slot_bytes
        # The kernel would rather kill a process than refuse shared memory: so look first.
        left = available_bytes()
        if total > left:
            raise ConfigError(_too_little(total, f"{format_bytes(left)} are left"))
        if not is_shared:
            return cls(_map_private(total), None, slots, slot_bytes)
        try:
            fd = kernel.create_memfd("ckptd-arena")
        except OSError as error:
            raise ConfigError(
                f"no shared memory can be made ({error}): use daemon=False"
            ) from error
        try:
            _reserve(fd, total)
            return cls(mmap.mmap(fd, total, mmap.MAP_SHARED), fd, slots, slot_bytes)
        except OSError as error:
            os.close(fd)
            raise ConfigError(_too_little(total, error.strerror or str(error))) from error
        except BaseException:
            os.close(fd)
            raise

    @classmethod
    def adopt(
        cls,
        fd: int,
        slots: int,
        slot_bytes: int,
        *,
        max_bytes: int | None = None,
        is_writable: bool = False,
    ) -> Arena:
        """Map an arena that another process made, for reading only unless that process is dead.

        Owns `fd` from the call on: it is closed if anything is wrong with it. At most `max_bytes`
        are accepted; by default as much as it takes already, since it must be reserved.

        Raises:
            ProtocolError: if it is not a fully reserved memfd of exactly the announced size, sealed
                against shrinking, growing and unsealing.
        """
        try:
            _check_shape(slots, slot_bytes, ProtocolError)
            _check_memfd(fd, slots * slot_bytes, max_bytes)
            access = mmap.PROT_READ | (mmap.PROT_WRITE if is_writable else 0)
            mapping = mmap.mmap(fd, slots * slot_bytes, mmap.MAP_SHARED, access)
            return cls(mapping, fd, slots, slot_bytes)
        except OSError as error:
            os.close(fd)
            raise ProtocolError(f"an arena that cannot be mapped: {error}") from error
        except BaseException:
            os.close(fd)
            raise

    @property
    def bytes(self) -> int:
        """The size of all slots."""
        return self.slots * self.slot_bytes

    @property
    def address(self) -> int:
        """Where the mapping begins in this process; good until `close`."""
        return self._address

    def fileno(self) -> int:
        """Return the descriptor to hand to another process; it stays the arena's.

        Raises:
            ValueError: if the arena is closed or not shared.
        """
        if self._fd is None:
            raise ValueError("this arena has no descriptor")
        return self._fd

    def slot(self, index: int) -> Slot:
        """Return a slot. Its views keep the mapping alive: drop them before `close`.

        Raises:
            IndexError: if there is no such slot.
            ValueError: if the arena is closed.
        """
        if not 0 <= index < self.slots:
            raise IndexError(f"slot {index} of {self.slots}")
        begin = index * self.slot_bytes
        return Slot(index, self._view()[begin : begin + self.slot_bytes])

    def prefault(self, should_stop: Callable[[], bool] = lambda: False) -> bool:
        """Fault every page in, so that no later copy pays for it; False if it was stopped early.

        For a background thread: the interpreter lock is free meanwhile, contents are kept even
        while another thread writes, and `should_stop` is asked every 32 MiB. `close` stops it too.
        """
        try:
            view = self._view()  # also keeps the mapping where it is until this returns
        except ValueError:
            return False
        for begin in range(0, self.bytes, _POPULATE_BYTES):
            if should_stop() or self._map is None:
                return False
            length = min(_POPULATE_BYTES, self.bytes - begin)
            try:
                is_done = kernel.populate(self._address + begin, length)
            except OSError:
                return False
            if not is_done:
                _touch(view[begin : begin + length])
        return True

    def trim(self) -> None:
        """Make this process's memory small again: the contents stay, in the memfd.

        For the reader, between snapshots. Does nothing to private memory, which would lose them.
        """
        try:
            pin = self._view()
        except ValueError:
            return
        with pin:
            if self.is_shared:
                kernel.drop_page_tables(self._address, self.bytes)

    def close(self) -> None:
        """Close the descriptor and unmap. May be repeated.

        Where views of slots still live (an array over one counts), the mapping goes when the last
        of them does: pulling it away under a thread that copies would kill the process.
        """
        mapping, self._map = self._map, None
        if mapping is not None:
            try:
                mapping.close()
            except BufferError:
                del mapping
        fd, self._fd = self._fd, None
        if fd is not None:
            os.close(fd)

    def __enter__(self) -> Arena:  # noqa: PYI034 - Self is not in Python 3.10
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        self.close()

    def _view(self) -> memoryview:
        mapping = self._map
        if mapping is None:
            raise ValueError("the arena is closed")
        return memoryview(mapping)


def _check_shape(slots: int, slot_bytes: int, kind: type[ConfigError | ProtocolError]) -> None:
    if not 1 <= slots <= MAX_SLOTS:
        raise kind(f"an arena of {slots} slots; 1 to {MAX_SLOTS} are possible")
    if slot_bytes < round_up(1) or slot_bytes % mmap.PAGESIZE or slot_bytes > 1 << 48:
        raise kind(f"a slot of {slot_bytes} bytes; it must be whole pages, a header and more")


def _check_memfd(fd: int, total: int, max_bytes: int | None) -> None:
    if not kernel.IS_LINUX:
        raise ProtocolError("arenas of other processes can be adopted on Linux only")
    wanted = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
    try:
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError as error:  # EINVAL: a file, a pipe, a device ...
        raise ProtocolError("the descriptor of an arena is no memfd") from error
    if seals & wanted != wanted:
        raise ProtocolError(f"the memfd of an arena is not sealed: its seals are {seals:#x}")
    # A hole in a huge-page file can be a SIGBUS for its reader; in shared memory it reads as zeros.
    if not kernel.is_tmpfs(fd):
        raise ProtocolError("the memfd of an arena is not made of plain pages")
    found = os.fstat(fd)
    if found.st_size != total:
        raise ProtocolError(f"an arena of {found.st_size} bytes was announced as {total}")
    # Reading a hole allocates its page, at the reader's cost.
    if found.st_blocks * 512 < total:
        raise ProtocolError(
            f"only {found.st_blocks * 512} of an arena's {total} bytes are reserved"
        )
    if max_bytes is not None and total > max_bytes:
        raise ProtocolError(f"an arena of {total} bytes; at most {max_bytes} are accepted here")


def _reserve(fd: int, total: int) -> None:
    os.ftruncate(fd, total)
    os.posix_fallocate(fd, 0, total)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)


def _map_private(total: int) -> mmap.mmap:
    try:
        return mmap.mmap(-1, total, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise ConfigError(_too_little(total, error.strerror or str(error))) from error


def _touch(view: memoryview) -> None:
    """Read a byte of each page. In a shared mapping that makes the page writable too."""
    for begin in range(0, len(view), _TOUCH_BYTES):
        view[begin : begin + _TOUCH_BYTES : mmap.PAGESIZE].tobytes()


def _too_little(total: int, reason: str) -> str:
    return (
        f"{format_bytes(total)} of memory for snapshots cannot be reserved ({reason}): "
        "use fewer slots, save less per rank, or give the job more memory"
    )
