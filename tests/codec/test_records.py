"""Records: what is written reads back, and any other bytes are one error."""

from __future__ import annotations

import io
import json
import pickle
import struct
import subprocess
import sys
import tracemalloc
import zipfile

import msgspec
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptd.codec import records
from ckptd.codec.records import MAX_DEPTH, decode_record, encode_record
from ckptd.errors import CorruptError, UnsupportedFormatError
from ckptd.model.box import Box
from ckptd.model.columns import Columns, Piece
from ckptd.model.manifest import (
    AttemptRecord,
    Chunk,
    Manifest,
    Outcome,
    RankEntry,
    RankManifest,
    RootRecord,
)
from ckptd.model.tensor import Tensor
from ckptd.units import KIB, MIB

KEY = "ranks/000000001000-0007/00003"
HASH = "0123456789abcdef" * 2
ANY_RANK = RankManifest | Outcome


def rank_manifest(tensors: int = 3, **changes) -> RankManifest:
    table = tuple(
        Tensor(f"model.layers.{i}.weight", "float32", (4, 8), "parameter", True, "cuda:0")
        for i in range(tensors)
    )
    record = RankManifest(
        format=1, step=1000, attempt=7, rank=3, world_size=8, sequence=2, plan=HASH, layout=HASH,
        previous="000000000900-0007", parent=None, captured_at=1.5e9, metrics={"loss": 1.25},
        tensors=table, aliases={"model.head.weight": "model.layers.0.weight"},
        chunks=(Chunk(HASH, "000000001000-0007", "float32", 128 * max(1, tensors), 90),),
        pieces=Columns.pack(Piece(i, 0, 128 * i, 128, Box((0, 0), (4, 8))) for i in range(tensors)),
        fingerprints=bytes(8 * tensors), values={"epoch": 3, "text": "é\u2028\U0001f600"},
    )  # fmt: skip
    return msgspec.structs.replace(record, **changes)


def manifest(**changes) -> Manifest:
    part = rank_manifest()
    record = Manifest(
        format=1, step=1000, attempt=7, world_size=2, sequence=2, previous=None, captured_at=1.5e9,
        metrics={}, raw_bytes=384, stored_bytes=100, tensors=part.tensors, aliases={},
        differing=("epoch",), ranks=(RankEntry(0, 10, HASH), RankEntry(1, 11, HASH)),
    )  # fmt: skip
    return msgspec.structs.replace(record, **changes)


OUTCOME = Outcome(1, 1000, 7, 3, 8, 2, "failed", "no space left")
VALID = msgspec.json.encode(rank_manifest())


def edited(**changes) -> bytes:
    """A rank manifest with some fields in a form that msgspec would not write."""
    fields = json.loads(VALID)
    fields.update(changes)
    return json.dumps(fields).encode()


def spliced(field: str, text: str) -> bytes:
    """A rank manifest with the JSON `text` in place of a number."""
    marked = edited(**{field: 987654321})
    return marked.replace(b"987654321", text.encode("utf-8", "surrogatepass"))


def frame(plain: bytes, **options) -> bytes:
    return zstandard.ZstdCompressor(level=1, **options).compress(plain)


# --- round trips -------------------------------------------------------------------------------


def test_each_record_reads_back():
    for record in (
        rank_manifest(), manifest(), OUTCOME, RootRecord(1), AttemptRecord("t", 8, "h", "u", 1),
    ):  # fmt: skip
        assert decode_record(encode_record(record), type(record), key=KEY) == record


def test_a_union_is_told_apart_by_its_tag():
    for record in (rank_manifest(), OUTCOME):
        assert decode_record(encode_record(record), ANY_RANK, key=KEY) == record
    with pytest.raises(CorruptError):
        decode_record(encode_record(manifest()), ANY_RANK, key=KEY)


def test_short_records_are_json_and_long_ones_one_checked_frame():
    assert encode_record(OUTCOME).startswith(b"{")
    record = rank_manifest(tensors=3000)
    stored = encode_record(record)
    header = zstandard.get_frame_parameters(stored)
    assert header.content_size == len(msgspec.json.encode(record)) > 64 * KIB
    assert header.has_checksum
    assert decode_record(stored, RankManifest, key=KEY) == record
    assert decode_record(frame(VALID), ANY_RANK, key=KEY) == rank_manifest()


def test_brackets_in_strings_are_not_nesting():
    text = '[{"\\' * 5000
    record = rank_manifest(values={"text": text, text: [text, text]})
    assert decode_record(encode_record(record), RankManifest, key=KEY) == record


def test_what_could_not_be_read_back_is_refused_when_it_is_written():
    deep: object = 0
    for _ in range(MAX_DEPTH):
        deep = [deep]
    for record in (
        rank_manifest(captured_at=float("nan")),  # JSON has only null
        rank_manifest(captured_at=float("inf")),
        rank_manifest(values={"deep": deep}),
        rank_manifest(values={"big": 1 << 80}),
        rank_manifest(rank=8),
        rank_manifest(format=2),
        manifest(ranks=()),
    ):
        with pytest.raises(ValueError, match="could not be read back"):
            encode_record(record)


# --- the gate ----------------------------------------------------------------------------------


HOSTILE_JSON = {
    "empty": b"",
    "not json": b"hello",
    "null": b"null",
    "a list": b"[]",
    "a number": b"1",
    "bom": b"\xef\xbb\xbf" + VALID,
    "utf-16": VALID.decode().encode("utf-16"),
    "nul behind": VALID + b"\0",
    "junk behind": VALID + b"x",
    "two records": VALID + VALID,
    "truncated": VALID[:-1],
    "invalid utf-8": VALID.replace(b"loss", b"lo\xffs"),
    "utf-8 surrogate": VALID.replace(b"loss", b"\xed\xa0\x80"),
    "overlong utf-8": VALID.replace(b"loss", b"\xc0\xaf"),
    "lone surrogate": VALID.replace(b"loss", b"\\ud800"),
    "lone low surrogate": VALID.replace(b'"epoch":3', b'"epoch":"\\udc00"'),
    "control character": VALID.replace(b"loss", b"lo\nss"),
    "comment": b"/**/" + VALID,
    "single quotes": VALID.replace(b'"', b"'"),
    "trailing comma": VALID[:-1] + b",}",
    "duplicate key": VALID[:-1] + b',"rank":3}',
    "escaped duplicate key": VALID[:-1] + b',"r\\u0061nk":3}',
    "inner duplicate key": VALID.replace(b'"loss":1.25', b'"loss":1.25,"loss":2'),
    "duplicate in free values": VALID.replace(b'"epoch":3', b'"epoch":{"a":1,"a":2}'),
    "unknown field": VALID[:-1] + b',"extra":1}',
    "missing field": VALID.replace(b'"rank":3,', b""),
    "wrong tag": VALID.replace(b'"record":"rank"', b'"record":"ranks"'),
    "NaN": spliced("captured_at", "NaN"),
    "Infinity": spliced("captured_at", "Infinity"),
    "minus Infinity": spliced("captured_at", "-Infinity"),
    "NaN in free values": VALID.replace(b'"epoch":3', b'"epoch":NaN'),
    "1e999": spliced("captured_at", "1e999"),
    "1e999 in free values": VALID.replace(b'"epoch":3', b'"epoch":-1e999'),
    "null float": spliced("captured_at", "null"),
    "float for int": spliced("step", "1000.0"),
    "exponent for int": spliced("step", "1e3"),
    "bool for int": spliced("rank", "true"),
    "string for int": spliced("step", '"1000"'),
    "negative": spliced("step", "-1"),
    "leading zero": spliced("step", "01000"),
    "plus sign": spliced("step", "+1000"),
    "hex": spliced("step", "0x10"),
    "2**63": spliced("step", str(1 << 63)),
    "2**64": spliced("step", str(1 << 64)),
    "21 digits": spliced("step", "1" * 21),
    "4000 digits": spliced("step", "9" * 4000),
    "100000 digits": spliced("sequence", "9" * 100_000),
    "big int in free values": VALID.replace(b'"epoch":3', b'"epoch":' + b"9" * 30),
    "rank out of world": edited(rank=8),
    "rank below zero": edited(rank=-1),
    "bad base64": edited(fingerprints="****"),
    "fingerprints do not fit": edited(fingerprints="AAAA"),
    "traversal in step": edited(previous="../../../etc/passwd"),
    "absolute step": edited(parent="/etc/passwd"),
    "newline after step": edited(previous="000000000900-0007\n"),
    "unicode digits": edited(previous="\u0660" * 12 + "-0007"),
    "bad digest": edited(layout="../" + HASH[3:]),
    "chunk named by path": edited(chunks=[["../../x", "000000001000-0007", "float32", 384, 90]]),
    "chunk born nowhere": edited(chunks=[[HASH, "../x", "float32", 384, 90]]),
    "chunk of negative length": edited(chunks=[[HASH, "000000001000-0007", "float32", -4, 90]]),
    "chunk of a terabyte": edited(chunks=[[HASH, "000000001000-0007", "float32", 1 << 40, 90]]),
    "chunk of bool length": edited(chunks=[[HASH, "000000001000-0007", "float32", True, 90]]),
    "no chunks": edited(chunks=[]),
    "unknown dtype": edited(tensors=[["w", "object", [4, 8], "parameter", True, "cpu"]]),
    "nul in name": edited(tensors=[["w\0", "float32", [4, 8], "parameter", True, "cpu"]]),
    "huge shape": edited(tensors=[["w", "float32", [1 << 62, 1 << 62], "buffer", True, "cpu"]]),
    "negative shape": edited(tensors=[["w", "float32", [-4, 8], "buffer", True, "cpu"]]),
    "65 dims": edited(tensors=[["w", "float32", [1] * 65, "buffer", True, "cpu"]]),
    "a tensor twice": edited(tensors=[["w", "float32", [4, 8], "buffer", True, "cpu"]] * 3),
    "ragged columns": edited(pieces={"tensor": "AAAA"}),
    "columns of nothing": edited(tensors=[]),
    "alias of nothing": edited(aliases={"a": "b"}),
    "deep list": b"[" * 100_000,
    "deep and closed": b"[" * 100_000 + b"]" * 100_000,
    "deep object": b'{"a":' * 100_000,
    "deep free value": VALID.replace(b'"epoch":3', b'"epoch":' + b"[" * 200 + b"]" * 200),
    "deep after strings": VALID.replace(
        b'"epoch":3', b'"a":"\\"]]]]]]]]","epoch":' + b"[" * 200 + b"]" * 200
    ),
    "unclosed string of quotes": b'{"a":"' + b'\\"' * 50_000,
    "too many values": b"[" + b"[]," * (1 << 23) + b"0]",
    "pickle": pickle.dumps({"format": 1}),
    "old pickle": pickle.dumps({"format": 1}, protocol=0),
    "skippable frame": b"\x50\x2a\x4d\x18\4\0\0\0abcd",
    "elf": b"\x7fELF" + bytes(100),
}


def a_zip() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps([1]))
    return file.getvalue()


def giant_frame(size: int) -> bytes:
    """Thirteen bytes that state `size` bytes of content, and so much for a window."""
    return b"\x28\xb5\x2f\xfd\xe0" + struct.pack("<Q", size)


def giant_modest_frame(size: int) -> bytes:
    """Fourteen bytes that state `size` bytes of content and a window of 1 KiB."""
    return b"\x28\xb5\x2f\xfd\xc0\0" + struct.pack("<Q", size)


def wide_frame(plain: bytes) -> bytes:
    """A whole and correct frame of `plain`, but for a window of 128 MiB."""
    header = b"\x28\xb5\x2f\xfd\x80" + bytes([17 << 3]) + struct.pack("<I", len(plain))
    return header + struct.pack("<I", len(plain) << 3 | 1)[:3] + plain


def with_dictionary() -> bytes:
    entries = zstandard.ZstdCompressionDict(VALID * 8, dict_type=zstandard.DICT_TYPE_RAWCONTENT)
    samples = [VALID[i:] + str(i).encode() * 20 for i in range(400)]
    trained = zstandard.train_dictionary(4096, samples)
    assert trained.dict_id()
    assert not entries.dict_id()
    return frame(VALID, dict_data=trained)


HOSTILE_FRAMES = {
    "bomb": frame(b" " * (300 * MIB)),
    "13 bytes": giant_frame(1 << 62),
    "13 bytes within the limit": giant_frame(200 * MIB),
    "14 bytes within the limit": giant_modest_frame(200 * MIB),
    "13 bytes of unknown size": giant_frame((1 << 64) - 1),
    "unknown size": frame(VALID, write_content_size=False),
    "wide window": wide_frame(VALID),
    "dictionary": with_dictionary(),
    "two frames": frame(VALID[:100]) + frame(VALID[100:]),
    "frame twice": frame(VALID) * 2,
    "trailing junk": frame(VALID) + b"\0",
    "skippable behind": frame(VALID) + b"\x50\x2a\x4d\x18\4\0\0\0abcd",
    "skippable before": b"\x50\x2a\x4d\x18\4\0\0\0abcd" + frame(VALID),
    "truncated": frame(VALID)[:-1],
    "magic only": b"\x28\xb5\x2f\xfd",
    "frame in a frame": frame(frame(VALID)),
    "empty frame": frame(b""),
    "wrong checksum": frame(VALID, write_checksum=True)[:-4] + b"\1\2\3\4",
    "zip": a_zip(),
}
HOSTILE = HOSTILE_JSON | HOSTILE_FRAMES


def test_the_hostile_corpus_is_made_of_valid_parts():
    assert decode_record(edited(), ANY_RANK, key=KEY) == rank_manifest()
    assert decode_record(spliced("sequence", "987"), ANY_RANK, key=KEY).sequence == 987
    assert zstandard.ZstdDecompressor().decompress(HOSTILE["wide window"]) == VALID


@pytest.mark.parametrize("name", sorted(HOSTILE))
def test_s1_s2_s3_j1_j2_j3_j5_hostile_bytes_are_one_error(name):
    for data in (HOSTILE[name], frame(HOSTILE[name])):
        with pytest.raises(CorruptError) as caught:
            decode_record(data, ANY_RANK, key=KEY)
        assert caught.value.key == KEY
        assert len(str(caught.value)) < 500


def test_s1_j7_no_stored_byte_reaches_code():
    seen: list[str] = []
    is_armed = False

    def watch(event: str, args: object) -> None:
        if is_armed and event.startswith(
            ("pickle", "exec", "compile", "subprocess", "import", "os.")
        ):
            seen.append(event)

    def decode_all() -> None:
        for data in HOSTILE.values():
            with pytest.raises(CorruptError):
                decode_record(data, ANY_RANK, key=KEY)

    decode_all()  # what is imported late is imported now
    sys.addaudithook(watch)  # cannot be taken away again; hence `is_armed`
    is_armed = True
    try:
        decode_all()
        assert seen == []
        pickle.loads(pickle.dumps(io.BytesIO))  # the hook does see what it should
        assert seen == ["pickle.find_class"]
    finally:
        is_armed = False


def test_r5_a_newer_format_is_told_from_damage():
    newer = {"format": 2, "record": "rank", "what": ["we", {"do": "not know"}]}
    for plain in (json.dumps(newer).encode(), edited(format=7), edited(format=10**15)):
        for data in (plain, frame(plain)):
            with pytest.raises(UnsupportedFormatError, match=KEY):
                decode_record(data, ANY_RANK, key=KEY)
    for number in (True, 2.5, "2", None, [2]):
        with pytest.raises(CorruptError):
            decode_record(edited(format=number), ANY_RANK, key=KEY)


def test_s2_the_limit_holds_for_json_and_for_what_a_frame_states():
    for data in (VALID, frame(VALID)):
        assert decode_record(data, ANY_RANK, key=KEY, max_bytes=len(VALID))
        with pytest.raises(CorruptError):
            decode_record(data, ANY_RANK, key=KEY, max_bytes=len(VALID) - 1)


def test_s2_values_are_counted_before_they_are_parsed():
    with pytest.raises(CorruptError, match="more than 16777216 values"):
        decode_record(HOSTILE["too many values"], ANY_RANK, key=KEY)


def test_s2_s3_a_frame_that_only_claims_is_never_allocated():
    large = frame(b"0" * (8 * MIB))
    tracemalloc.start()
    try:
        for name in (
            "bomb",
            "13 bytes",
            "13 bytes within the limit",
            "14 bytes within the limit",
            "13 bytes of unknown size",
        ):
            with pytest.raises(CorruptError):
                decode_record(HOSTILE[name], ANY_RANK, key=KEY)
        with pytest.raises(CorruptError):
            decode_record(large, ANY_RANK, key=KEY, max_bytes=MIB)
        assert tracemalloc.get_traced_memory()[1] < 1 * MIB
    finally:
        tracemalloc.stop()


MEMORY = """
import resource, zstandard
from ckptd.codec.records import decode_record
from ckptd.errors import CorruptError
from ckptd.model.manifest import Manifest
MIB = 1 << 20
decode = lambda data, most: decode_record(data, Manifest, key="k", max_bytes=most)
def refused(data, most):
    try:
        decode(data, most)
    except CorruptError:
        return
    raise SystemExit("accepted")
refused(b"[]", 4)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 80 * MIB, -1))
for unit in (b"[],", b"{},", b'"ab",', b"1.5,", b"0,", b'{"a":[]},', b"[[[[]]]],"):
    plain = b"[" + unit * (MIB // len(unit)) + b"0]"
    frame = zstandard.ZstdCompressor().compress(plain)
    refused(frame, MIB)
    refused(plain, MIB)
for size in (1 << 62, 200 * MIB):
    refused(b"\\x28\\xb5\\x2f\\xfd\\xe0" + size.to_bytes(8, "little"), 256 * MIB)
print("bounded")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS and /proc")
def test_s2_hostile_records_stay_within_a_constant_times_the_limit():
    done = subprocess.run(
        [sys.executable, "-c", MEMORY], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout) == (0, "bounded\n"), done.stderr[-2000:]


# --- fuzz --------------------------------------------------------------------------------------


def decodes_or_is_corrupt(data: bytes) -> None:
    for type_ in (ANY_RANK, Manifest, RootRecord):
        try:
            record = decode_record(data, type_, key=KEY)
        except (CorruptError, UnsupportedFormatError):
            continue
        assert decode_record(encode_record(record), type_, key=KEY) == record


@given(st.binary(max_size=300))
def test_random_bytes_never_raise_anything_else(data):
    decodes_or_is_corrupt(data)
    decodes_or_is_corrupt(records.MAGIC + data)


SEEDS = [VALID, msgspec.json.encode(manifest()), msgspec.json.encode(OUTCOME), frame(VALID)]
TOKENS = [
    b'"', b"{", b"}", b"[", b"]", b",", b":", b"\\", b"null", b"true", b"-", b"1e999", b"NaN",
    b"99999999999999999999", b"\\ud800", b"\xff", b"../", b"\0", b".5", b'"format":2,', b"18446744073709551615",
]  # fmt: skip


@given(
    seed=st.sampled_from(SEEDS),
    edits=st.lists(
        st.tuples(
            st.floats(0, 1), st.integers(0, 12), st.sampled_from(TOKENS) | st.binary(max_size=4)
        ),
        min_size=1,
        max_size=5,
    ),
)
@settings(max_examples=400, deadline=None)
def test_mutated_records_never_raise_anything_else(seed, edits):
    data = bytearray(seed)
    for where, length, new in edits:
        at = int(where * len(data))
        data[at : at + length] = new
    decodes_or_is_corrupt(bytes(data))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 70), 1 << 70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=12,
)  # fmt: skip


@given(field=st.sampled_from(sorted(json.loads(VALID))), value=JSON)
@settings(max_examples=400, deadline=None)
def test_any_json_in_any_field_never_raises_anything_else(field, value):
    decodes_or_is_corrupt(edited(**{field: value}))
    fields = json.loads(VALID)
    if isinstance(fields[field], list) and fields[field]:
        fields[field][0] = value
        decodes_or_is_corrupt(json.dumps(fields).encode())
