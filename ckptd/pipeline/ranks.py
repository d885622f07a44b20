"""Reading many rank manifests: what they have in common is decoded and checked once.

Ranks of a job hold tensors of the same names, and write the same pieces step after step: of a
record of 2,000 tensors only a few hundred bytes are new. A commit of 1,024 ranks reads 1,024 such
records.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from functools import partial
from typing import Any, NamedTuple

import msgspec
import xxhash

from ckptd.codec.records import MAX_RECORD_BYTES, decode_own, decode_record, is_tame, unpack_record
from ckptd.errors import CorruptError
from ckptd.model.columns import Columns
from ckptd.model.manifest import Chunk, Outcome, RankManifest, Tree, check_table
from ckptd.model.pieces import PieceCheck
from ckptd.model.tensor import Tensor
from ckptd.units import MIB

MEMORY_BYTES = 224 * MIB
_VALUES_DEPTH = 90


class _Skeleton(
    msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="record", tag="rank"
):
    """A `RankManifest` whose large parts are left as they stand; the order of fields is the same."""

    format: int
    step: int
    attempt: int
    rank: int
    world_size: int
    sequence: int
    plan: str | None
    layout: str
    previous: str | None
    parent: str | None
    captured_at: float
    metrics: dict[str, float | None]
    tensors: msgspec.Raw
    aliases: msgspec.Raw
    chunks: tuple[Chunk, ...]
    pieces: msgspec.Raw
    fingerprints: bytes
    values: msgspec.Raw


class _Table(NamedTuple):
    tensors: tuple[Tensor, ...]
    aliases: dict[str, str]
    check: PieceCheck


class RankReader:
    """Decodes rank manifests, and remembers parts of them within `memory_bytes`. For any thread.

    Equal parts of different records are one object: whoever compares them may ask for identity
    first. Nobody may change them.
    """

    def __init__(self, memory_bytes: int = MEMORY_BYTES) -> None:
        self._known: OrderedDict[bytes, tuple[Any, int]] = OrderedDict()
        self._room_bytes = memory_bytes
        self._lock = threading.Lock()  # guards the two above

    def decode(self, data: bytes, *, key: str) -> RankManifest | Outcome:
        """Decode a stored record; see `decode_record`, which says no more and no less.

        Raises:
            CorruptError, UnsupportedFormatError: it is no such record.
        """
        record = self._decode(data)
        if record is None:  # an outcome, another writer's form, or something wrong
            found: RankManifest | Outcome = decode_record(data, RankManifest | Outcome, key=key)
            return found
        return record

    def _decode(self, data: bytes) -> RankManifest | None:
        try:
            plain = unpack_record(data, MAX_RECORD_BYTES)
        except CorruptError:
            return None
        found = decode_own(plain, _Skeleton)
        if found is None:
            return None
        digest = xxhash.xxh3_128_digest
        name = digest(bytes(found.tensors) + b"\0" + bytes(found.aliases))
        table = self._remember(b"t" + name, lambda: _table(found), len(found.tensors))
        spans = [(chunk.dtype, chunk.raw_bytes) for chunk in found.chunks]
        name = digest(name + msgspec.msgpack.encode(spans) + digest(found.pieces))
        pieces = table and self._remember(
            b"p" + name, lambda: _pieces(found, table, spans), len(found.pieces)
        )
        values = self._values(found)
        if table is None or pieces is None or values is None:
            return None
        facts = {name: getattr(found, name) for name in _Skeleton.__struct_fields__}
        facts |= {"tensors": table.tensors, "aliases": table.aliases}
        record = RankManifest(**{**facts, "pieces": pieces, "values": values})
        try:
            record.check_head()
        except ValueError:
            return None
        return record

    def _values(self, found: _Skeleton) -> dict[str, Tree] | None:
        """Return the values; those of one name mostly equal other ranks', all together rarely do."""
        parts: dict[str, msgspec.Raw] | None
        parts = decode_own(bytes(found.values), dict[str, msgspec.Raw])
        if parts is None:
            return None
        values: dict[str, Tree] = {}
        for name, part in parts.items():
            plain = bytes(part)
            value = self._remember(
                b"v" + xxhash.xxh3_128_digest(plain), partial(_value, plain), len(plain)
            )  # fmt: skip
            if value is None:
                return None
            values[name] = value[0]
        return values

    def _remember(self, name: bytes, make: Any, size: int) -> Any:
        """Return what is known under a name, or make it; what cannot be made is not remembered."""
        with self._lock:
            if name in self._known:
                self._known.move_to_end(name)
                return self._known[name][0]
        made = make()
        if made is not None:
            with self._lock:
                if name not in self._known:
                    self._known[name] = made, size
                    self._room_bytes -= size
                made = self._known[name][0]
                while self._room_bytes < 0 and len(self._known) > 1:
                    self._room_bytes += self._known.popitem(last=False)[1][1]
        return made


def _table(found: _Skeleton) -> _Table | None:
    tensors: tuple[Tensor, ...] | None = decode_own(bytes(found.tensors), tuple[Tensor, ...])
    aliases: dict[str, str] | None = decode_own(bytes(found.aliases), dict[str, str])
    if tensors is None or aliases is None:
        return None
    try:
        check_table(tensors, aliases)
    except ValueError:
        return None
    return _Table(tensors, aliases, PieceCheck(tensors))


def _pieces(found: _Skeleton, table: _Table, spans: list[tuple[str, int]]) -> Columns | None:
    pieces: Columns | None = decode_own(bytes(found.pieces), Columns)
    return pieces if pieces is not None and table.check.are_in_order(pieces, spans) else None


def _value(plain: bytes) -> tuple[Tree] | None:
    """Return the value in a tuple, since null is one too."""
    found: tuple[Tree] | None = decode_own(b"[" + plain + b"]", tuple[Tree])
    return found if found is not None and is_tame(found[0], _VALUES_DEPTH) else None
