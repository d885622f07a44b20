"""Codecs beside each other: ratio and speed of one thread, on content that looks trained."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
import zstandard

from bench.content import Job, exponent_bits
from bench.stats import median
from ckptd.codec.chunk import Decoder, Encoder, stored_bound

BLOCK_BYTES = 1 << 20

Data = np.ndarray[Any, np.dtype[np.uint8]]
Tick = Callable[[str], None]


class Codec(NamedTuple):
    """`encode` returns what `decode` needs, and its length; both run on the calling thread."""

    encode: Callable[[Data], tuple[Any, int]]
    decode: Callable[[Any], Data]


def content(bytes_each: int) -> tuple[dict[str, tuple[str, Data]], dict[str, Any]]:
    """Return kinds of content with element type and bytes, and how they were made."""
    count = bytes_each // 4
    job = Job(14 * bytes_each)
    for _ in range(8):
        job.step()
    weights, first, second = job.flat(count)
    longer = torch.from_numpy(np.tile(weights, 4)[: 4 * count].copy())
    longer[count:] *= torch.empty(3 * count).uniform_(0.5, 2.0)  # no copies of what came before
    scale = 127 / longer.view(-1, 1024).abs().amax(1, keepdim=True)
    int8 = (longer.view(-1, 1024) * scale).round().to(torch.int8)
    kinds = {
        "weights fp32": ("float32", torch.from_numpy(weights)),
        "exp_avg fp32": ("float32", torch.from_numpy(first)),
        "exp_avg_sq fp32": ("float32", torch.from_numpy(second)),
        "weights bf16": ("bfloat16", longer[: 2 * count].to(torch.bfloat16)),
        "weights fp16": ("float16", longer[: 2 * count].to(torch.float16)),
        "weights fp8 e4m3": ("float8_e4m3fn", (longer * 256).to(torch.float8_e4m3fn)),
        "weights int8": ("int8", int8),
    }
    about = {
        "made": job.describe()["made"] + "; bf16, fp16: cast; fp8: scaled by 256 and cast; int8: "
        "rows of 1,024 scaled to 127",
        "bytes_each": bytes_each,
        "exponent_bits": exponent_bits(weights),
    }
    return {name: (dtype, _bytes(t)) for name, (dtype, t) in kinds.items()}, about


def measure(
    bytes_each: int, rounds: int, tick: Tick
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Measure every codec on every content, in turns; return the rows and the content's story."""
    kinds, about = content(bytes_each)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    rows = []
    try:
        for name, (dtype, data) in kinds.items():
            rows += _kind(name, dtype, data, rounds)
            tick(f"codec: {name}")
    finally:
        torch.set_num_threads(threads)
    return rows, about


def codecs(dtype: str, size: int) -> dict[str, Codec | str]:
    """Return the codecs for an element type; a text where one cannot serve says why."""
    return {
        "ckptd auto": _ckptd(dtype, size),
        "zstd 1": _zstd(1),
        "zstd 3": _zstd(3),
        "ZipNN": _or_why(lambda: _zipnn(dtype)),
        "blosc2 shuffle + zstd": _or_why(lambda: _blosc(dtype)),
    }


def _kind(name: str, dtype: str, data: Data, rounds: int) -> list[dict[str, Any]]:
    found = codecs(dtype, len(data))
    spans: dict[str, list[tuple[float, float]]] = {codec: [] for codec in found}
    ratios: dict[str, float] = {}
    failed = {codec: codec_or for codec, codec_or in found.items() if isinstance(codec_or, str)}
    for _ in range(rounds):
        for codec, pair in found.items():
            if codec in failed or isinstance(pair, str):
                continue
            try:
                spans[codec].append(_once(pair, data, ratios, codec))
            except Exception as error:  # noqa: BLE001 - a peer may fail in any way
                failed[codec] = f"{type(error).__name__}: {error}"[:120]
    return [
        {"content": name, "codec": codec, "failed": failed.get(codec), "ratio": ratios.get(codec),
         **_speeds(spans[codec], len(data))}
        for codec in found
    ]  # fmt: skip


def _once(codec: Codec, data: Data, ratios: dict[str, float], name: str) -> tuple[float, float]:
    began = time.perf_counter()
    stored, size = codec.encode(data)
    middle = time.perf_counter()
    plain = codec.decode(stored)
    end = time.perf_counter()
    if name not in ratios and not np.array_equal(plain, data):
        raise RuntimeError("it does not give back what it got")
    ratios[name] = size / len(data)
    return middle - began, end - middle


def _speeds(spans: list[tuple[float, float]], size: int) -> dict[str, float | None]:
    if not spans:
        return {}
    into, out = ([size / 1e9 / span for span in side] for side in zip(*spans, strict=True))
    return {
        "in_best": max(into), "in_median": median(into),
        "out_best": max(out), "out_median": median(out),
    }  # fmt: skip


def _ckptd(dtype: str, size: int) -> Codec:
    """The daemon's own path: hashes, header and bypass are part of it."""
    encoder, decoder = Encoder(), Decoder()
    room, back = np.empty(stored_bound(size), np.uint8), np.empty(size, np.uint8)
    room.fill(1)
    back.fill(1)

    def encode(data: Data) -> tuple[Any, int]:
        done = encoder.encode(data.data, dtype, room.data, mode="auto")
        return (done.hash, room[: done.stored_bytes]), done.stored_bytes

    def decode(stored: Any) -> Data:
        decoder.decode(stored[1].data, back.data, hash=stored[0], dtype=dtype, raw_bytes=size)
        return back

    return Codec(encode, decode)


def _zstd(level: int) -> Codec:
    packer, unpacker = zstandard.ZstdCompressor(level=level), zstandard.ZstdDecompressor()

    def encode(data: Data) -> tuple[Any, int]:
        frames = [
            packer.compress(data[at : at + BLOCK_BYTES].data)
            for at in range(0, len(data), BLOCK_BYTES)
        ]
        return frames, sum(map(len, frames))

    def decode(frames: Any) -> Data:
        back = np.empty(len(frames) * BLOCK_BYTES, np.uint8)
        at = 0
        for frame in frames:
            plain = unpacker.decompress(frame)
            back[at : at + len(plain)] = np.frombuffer(plain, np.uint8)
            at += len(plain)
        return back[:at]

    return Codec(encode, decode)


def _zipnn(dtype: str) -> Codec:
    from zipnn import ZipNN

    if dtype == "int8":
        raise ValueError("does not take int8")
    engine = ZipNN(bytearray_dtype=dtype, threads=1)

    def encode(data: Data) -> tuple[Any, int]:
        stored = engine.compress(bytearray(data))  # it writes to what it gets
        return stored, len(stored)

    return Codec(encode, lambda stored: np.frombuffer(engine.decompress(stored), np.uint8))


def _blosc(dtype: str) -> Codec:
    import blosc2

    size = {"float32": 4, "bfloat16": 2, "float16": 2}.get(dtype, 1)
    settings = {
        "codec": blosc2.Codec.ZSTD, "clevel": 1, "typesize": size, "nthreads": 1,
        "filters": [blosc2.Filter.SHUFFLE],
    }  # fmt: skip

    def encode(data: Data) -> tuple[Any, int]:
        stored = blosc2.compress2(data, **settings)
        return stored, len(stored)

    return Codec(
        encode, lambda stored: np.frombuffer(blosc2.decompress2(stored, nthreads=1), np.uint8)
    )


def _or_why(make: Callable[[], Codec]) -> Codec | str:
    try:
        return make()
    except Exception as error:  # noqa: BLE001 - missing, broken, or not for this type
        return f"{type(error).__name__}: {error}"[:120]


def _bytes(tensor: torch.Tensor) -> Data:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().copy()
