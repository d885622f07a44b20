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
from ckptd.model.ready import make_ready
from ckptd.model.tensor import Tensor
from ckptd.units import MIB

MEMORY_BYTES = 224 * MIB
_VALUES_DEPTH = 90
_MOST_NAMES = 4096
_OBJECT_BYTES = 300  # what the smallest remembered thing takes beside its text


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


make_ready(_Skeleton)

_TENSORS = b'"tensors":'
_NO_TENSORS = b'"tensors":[],"aliases":{}'
_TEXTS_BYTES = 32 * MIB


class _Table(NamedTuple):
    name: bytes
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
        self._texts: dict[bytes, _Table] = {}  # as they stand in records, the newest last
        self._lock = threading.Lock()  # guards the three above

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
        plain, table = self._cut(plain)
        found = decode_own(plain, _Skeleton)
        if found is None:
            return None
        table = table or self._table(found)
        if table is None:
            return None
        spans = [(chunk.dtype, chunk.raw_bytes) for chunk in found.chunks]
        digest = xxhash.xxh3_128_digest
        name = digest(table.name + msgspec.msgpack.encode(spans) + digest(found.pieces))
        pieces = self._remember(
            b"p" + name, lambda: _pieces(found, table, spans), len(found.pieces)
        )  # fmt: skip
        values = self._values(found)
        if pieces is None or values is None:
            return None
        facts = {name: getattr(found, name) for name in _Skeleton.__struct_fields__}
        facts |= {"tensors": table.tensors, "aliases": table.aliases}
        record = RankManifest(**{**facts, "pieces": pieces, "values": values})
        try:
            record.check_head()
        except ValueError:
            return None
        return record

    def _cut(self, plain: bytes) -> tuple[bytes, _Table | None]:
        """Cut a known table out of a record: to read past it costs more than all the rest.

        The text is one that a record has had in our own form. So the record is in that form if, and
        only if, it is with empty tables in its place. Before this place no quote stands without a
        backslash in a string, and nothing else may be a list, so it is the one of the record.
        """
        at = plain.find(_TENSORS)
        with self._lock:
            known = list(self._texts.items())
        for text, table in reversed(known):
            if at >= 0 and plain.startswith(text, at):
                return b"".join((plain[:at], _NO_TENSORS, plain[at + len(text) :])), table
        return plain, None

    def _table(self, found: _Skeleton) -> _Table | None:
        tensors, aliases = bytes(found.tensors), bytes(found.aliases)
        text = b"".join((_TENSORS, tensors, b',"aliases":', aliases))
        name = xxhash.xxh3_128_digest(text)
        table: _Table | None = self._remember(
            b"t" + name, partial(_read_table, name, tensors, aliases), len(text)
        )  # fmt: skip
        if table is not None:
            with self._lock:
                self._texts[text] = table
                while sum(map(len, self._texts)) > _TEXTS_BYTES and len(self._texts) > 1:
                    del self._texts[next(iter(self._texts))]
        return table

    def _values(self, found: _Skeleton) -> dict[str, Tree] | None:
        """Return the values; those of one name mostly equal other ranks', all together rarely do."""
        parts: dict[str, msgspec.Raw] | None
        parts = decode_own(bytes(found.values), dict[str, msgspec.Raw])
        if parts is None or len(parts) > _MOST_NAMES:  # the plain decoder counts what it takes
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
                    self._known[name] = made, size + _OBJECT_BYTES
                    self._room_bytes -= size + _OBJECT_BYTES
                made = self._known[name][0]
                while self._room_bytes < 0 and len(self._known) > 1:
                    self._room_bytes += self._known.popitem(last=False)[1][1]
        return made


def _read_table(name: bytes, tensors_text: bytes, aliases_text: bytes) -> _Table | None:
    tensors: tuple[Tensor, ...] | None = decode_own(tensors_text, tuple[Tensor, ...])
    aliases: dict[str, str] | None = decode_own(aliases_text, dict[str, str])
    if tensors is None or aliases is None:
        return None
    try:
        check_table(tensors, aliases)
    except ValueError:
        return None
    return _Table(name, tensors, aliases, PieceCheck(tensors))


def _pieces(found: _Skeleton, table: _Table, spans: list[tuple[str, int]]) -> Columns | None:
    pieces: Columns | None = decode_own(bytes(found.pieces), Columns)
    return pieces if pieces is not None and table.check.are_in_order(pieces, spans) else None


def _value(plain: bytes) -> tuple[Tree] | None:
    """Return the value in a tuple, since null is one too."""
    found: tuple[Tree] | None = decode_own(b"[" + plain + b"]", tuple[Tree])
    return found if found is not None and is_tame(found[0], _VALUES_DEPTH) else None
