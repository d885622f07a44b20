"""What is in an arena, written down where it outlives the daemon: a second memfd beside the arena.

Region 0 tells the shape of the arena and who writes into it, region ``i + 1`` which snapshot lies in
slot ``i``. A region begins at a multiple of 4 GiB of a file that is mostly holes, so that none is in
the way of another. It holds a magic number, the length and the xxh3-128 of what follows, and that,
as msgpack. A process that is killed while it writes a region leaves one that fails its check: what it
told of is lost, the rest is not.
"""

from __future__ import annotations

import fcntl
import os
import struct
from typing import Any

import msgspec
import xxhash

from ckptd.engine.keeper import Snapshot
from ckptd.errors import ProtocolError
from ckptd.model.ready import make_ready
from ckptd.shm import kernel
from ckptd.units import KIB, MIB, format_bytes

REGION_BYTES = 1 << 32
MAX_BYTES = 64 * MIB  # of a snapshot's description: its values are 48 MiB at most

_HEAD = struct.Struct("<8sQ16s")
_MAGIC = b"ckptdrc1"
_MAX_SHAPE_BYTES = KIB

_encoder = msgspec.msgpack.Encoder()


class Shape(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Slots of an arena, and the process that writes there as in `Holder`."""

    slots: int
    slot_bytes: int
    pid: int = 0
    started: int = 0


make_ready(Shape)


class Record:
    """A record of one arena. One thread uses it. It owns its descriptor until `close`."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    @classmethod
    def create(cls) -> Record:
        """Make an empty one.

        Raises:
            OSError: there is no memory or no descriptor left.
        """
        return cls(kernel.create_memfd("ckptd-record"))

    @classmethod
    def adopt(cls, fd: int) -> Record:
        """Take one that another process made; it owns `fd` from the call on.

        Raises:
            ProtocolError: it is no memfd; the descriptor is closed.
        """
        try:
            fcntl.fcntl(fd, fcntl.F_GET_SEALS)
        except OSError as error:  # EINVAL: a pipe, a socket, a device ...
            os.close(fd)
            raise ProtocolError("the descriptor of a record is no memfd") from error
        return cls(fd)

    def fileno(self) -> int:
        """Return the descriptor, which stays the record's."""
        return self._fd

    def write_shape(self, shape: Shape) -> None:
        """Write region 0.

        Raises:
            OSError: there is no memory left.
        """
        # It fits in a page, and no signal ends a write within one: the former one stands there, or
        # this one.
        self._write(0, _encoder.encode(shape))

    def read_shape(self) -> Shape:
        """Return what region 0 says.

        Raises:
            ProtocolError: it is damaged or was never written.
        """
        shape: Shape | None = self._read(0, Shape, _MAX_SHAPE_BYTES)
        if shape is None:
            raise ProtocolError("an empty record")
        return shape

    def write(self, slot: int, snapshot: Snapshot) -> None:
        """Say which snapshot lies in a slot, without the secrets of whoever took it.

        Raises:
            OSError: there is no memory left.
            ProtocolError: it is too large.
        """
        hello = msgspec.structs.replace(snapshot.hello, storage_options={})
        body = _encoder.encode(snapshot._replace(hello=hello))
        if len(body) > MAX_BYTES:
            raise ProtocolError(  # what stands there is of a slot that has moved on
                f"what describes a snapshot takes {format_bytes(len(body))}; "
                f"at most {format_bytes(MAX_BYTES)} are kept"
            )
        self._write(slot + 1, body)

    def read(self, slot: int) -> Snapshot | None:
        """Return the snapshot that lay in a slot; None if there was none.

        Raises:
            ProtocolError: what stands there is damaged.
        """
        found: Snapshot | None = self._read(slot + 1, Snapshot, MAX_BYTES)
        if found is not None and found.handoff.slot != slot:
            raise ProtocolError(f"a snapshot of slot {found.handoff.slot} in the place of {slot}")
        return found

    def clear(self) -> None:
        """Forget everything.

        Raises:
            OSError: never seen.
        """
        os.ftruncate(self._fd, 0)

    def close(self) -> None:
        """Close the descriptor. To be called once."""
        os.close(self._fd)

    def _write(self, region: int, body: bytes) -> None:
        data = memoryview(_HEAD.pack(_MAGIC, len(body), xxhash.xxh3_128_digest(body)) + body)
        at = region * REGION_BYTES
        while data:
            count = os.pwrite(self._fd, data, at)
            data, at = data[count:], at + count

    def _read(self, region: int, type_: Any, max_bytes: int) -> Any:
        at = region * REGION_BYTES
        try:
            head = os.pread(self._fd, _HEAD.size, at)
            if not any(head):
                return None
            if len(head) < _HEAD.size:
                raise ProtocolError(f"region {region} of a record is cut off")
            magic, length, digest = _HEAD.unpack(head)
            if magic != _MAGIC or length > max_bytes:
                raise ProtocolError(f"region {region} of a record is none of this version's")
            body = os.pread(self._fd, length, at + _HEAD.size) if length else b""
        except OSError as error:
            raise ProtocolError(f"a record cannot be read: {error}") from error
        if len(body) != length or xxhash.xxh3_128_digest(body) != digest:
            raise ProtocolError(f"region {region} of a record is damaged")
        if not body:
            return None
        try:
            return msgspec.msgpack.decode(body, type=type_)
        except (msgspec.MsgspecError, ValueError, OverflowError, RecursionError) as error:
            raise ProtocolError(f"region {region} of a record makes no sense") from error
