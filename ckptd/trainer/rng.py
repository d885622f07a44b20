"""The state of random generators, which every rank has its own of."""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Iterable
from typing import Any

import msgspec
import numpy as np
import torch
import xxhash

from ckptd.errors import CorruptError
from ckptd.model.manifest import Tree
from ckptd.trainer import tags
from ckptd.trainer.values import InlineTensors, PerRank, decode_value, encode_value


class RNGState:
    """Stands in a state for the generators of this process; always kept per rank.

    These are Python's ``random``, numpy's global one if ``numpy.random`` is imported, torch's on the
    CPU and, if CUDA is in use, on every visible device. Generators of your own, such as
    ``numpy.random.default_rng()``, are not among them: put their state into the state mapping.

    A rank of a checkpoint of another world size gets the generators of its `stream`, or fresh ones
    that follow from the checkpoint where there was no such stream. Ranks that must draw the same
    numbers, as tensor-parallel peers must for dropout, have one stream: their data-parallel index.
    """

    def __init__(self, stream: Any = None) -> None:
        """Take the number of this rank's stream, or the mesh of data parallelism that it is on.

        Without one it is the place among all dimensions but ``tp`` of the mesh with a dimension of that
        name that a DTensor of the state lies on, if all ranks are on it; else the rank.
        """
        is_plain = stream is None or type(stream) is int
        self.stream: int | None = stream if is_plain else int(stream.get_local_rank())


def stream_of_meshes(meshes: Iterable[Any], world_size: int) -> int | None:
    """Return this rank's place among the data-parallel ones of the mesh of all ranks with a ``tp``."""
    mesh = next(
        (
            mesh
            for mesh in meshes
            if "tp" in (mesh.mesh_dim_names or ()) and math.prod(mesh.shape) == world_size
        ),
        None,
    )
    place = mesh.get_coordinate() if mesh is not None else None
    if mesh is None or place is None:
        return None
    stream = 0
    for name, count, index in zip(mesh.mesh_dim_names, mesh.shape, place, strict=True):
        if name != "tp":
            stream = stream * count + index
    return stream


def stream_of(tree: Tree, rank: int) -> int:
    """Return the stream that a stored state of generators is of; `rank` saved it."""
    held = tree.get("$per_rank") if type(tree) is dict else None
    stream = held.get("stream") if type(held) is dict else None
    return stream if type(stream) is int else rank


def capture(stream: int | None = None) -> Tree:
    """Return the state of all generators of this process, which has this stream."""
    version, numbers, gauss = random.getstate()
    held: dict[str, Any] = {
        "python": [version, np.array(numbers, np.uint32), gauss],
        "torch": torch.get_rng_state(),
    }
    if "numpy.random" in sys.modules:
        held["numpy"] = list(np.random.get_state())  # noqa: NPY002 - it is the global one that is meant
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        held["cuda"] = torch.cuda.get_rng_state_all()
    if stream is not None:
        held["stream"] = stream
    return encode_value(PerRank(held), path="rng", tensors=InlineTensors())


def restore(tree: Tree) -> None:
    """Set all generators of this process that `tree` has a state for.

    Devices beyond those that were there keep their state; so does what is not in use here.

    Raises:
        CorruptError: the tree is not a state of generators.
    """
    try:
        held = decode_value(tree, tensors={}).value  # type: ignore[attr-defined]
        version, numbers, gauss = held["python"]
        random.setstate((version, tuple(numbers.tolist()), gauss))
        if "numpy" in held:
            np.random.set_state(tuple(held["numpy"]))  # noqa: NPY002 - as above
        torch.set_rng_state(held["torch"])
        if torch.cuda.is_available():
            for device, state in zip(
                range(torch.cuda.device_count()), held.get("cuda", []), strict=False
            ):
                torch.cuda.set_rng_state(state, device)
    except tags.BAD_BODY as error:
        raise CorruptError(
            f"the stored state of the random generators does not fit: {error}"
        ) from error


def derive(base: Tree, stream: int) -> Tree:
    """Return a state for a stream that was not there when `base`, the lowest rank's state, was saved.

    Every generator is seeded anew with 64 bits of xxh3-128 over (`base` as canonical JSON, the stream,
    the generator's name). So new streams differ from each other and from all old ones, a second
    resume of the same checkpoint gives the same streams, and resuming a later one gives others.

    Raises:
        CorruptError: `base` is not a state of generators.
    """
    try:
        return _derive(base, stream)
    except tags.BAD_BODY as error:
        raise CorruptError(
            f"the stored state of the random generators does not fit: {error}"
        ) from error


def _derive(base: Tree, stream: int) -> Tree:
    digest = xxhash.xxh3_128_digest(msgspec.json.encode(base, order="sorted"))

    def seed(name: str) -> int:
        return xxhash.xxh3_64_intdigest(digest + msgspec.json.encode([stream, name]))

    held = decode_value(base, tensors={}).value  # type: ignore[attr-defined]
    if not {"python", "torch"} <= held.keys() or len(held["python"]) != 3:
        raise ValueError("Python's or torch's generator is not among them")
    version, numbers, gauss = random.Random(seed("python")).getstate()  # noqa: S311 - no secret
    fresh: dict[str, Any] = {
        "python": [version, np.array(numbers, np.uint32), gauss],
        "torch": torch.Generator().manual_seed(seed("torch")).get_state(),
    }
    if "numpy" in held:
        words = np.array([seed("numpy") & 0xFFFFFFFF, seed("numpy") >> 32], np.uint32)
        fresh["numpy"] = list(np.random.RandomState(words).get_state())
    # A CUDA generator's state is its seed and its offset, both 64-bit little-endian.
    fresh["cuda"] = [
        torch.tensor([*seed(f"cuda:{i}").to_bytes(8, "little"), *bytes(8)], dtype=torch.uint8)
        for i in range(len(held.get("cuda", [])))
    ]
    return encode_value(PerRank(fresh), path="rng", tensors=InlineTensors())
