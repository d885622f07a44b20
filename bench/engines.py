"""All engines, in the order of the tables."""

from __future__ import annotations

from bench.engine import Engine
from bench.engines_ckptd import Ckptd, CkptdOverlap, CkptdOverlapRaw, CkptdRaw, can_overlap
from bench.engines_peers import Safetensors, TorchCheckpointing, TorchSnapshot
from bench.engines_torch import DcpProcess, DcpSave, DcpThread, TorchSave

PEERS: list[type[Engine]] = [
    TorchSave, DcpSave, DcpThread, DcpProcess, TorchSnapshot, Safetensors, TorchCheckpointing,
]  # fmt: skip
OURS: list[type[Engine]] = [Ckptd, CkptdRaw]
if can_overlap():
    OURS += [CkptdOverlap, CkptdOverlapRaw]


def choose(names: str | None) -> list[type[Engine]]:
    """Return the engines whose names start with one of `names` (separated by commas), or all.

    Raises:
        ValueError: a name fits no engine.
    """
    engines = PEERS + OURS
    if not names:
        return engines
    wanted = [name.strip() for name in names.split(",")]
    for name in wanted:
        if not any(engine.name.startswith(name) for engine in engines):
            known = ", ".join(engine.name for engine in engines)
            raise ValueError(f"no engine {name!r}; there are: {known}")
    exact = {engine.name for engine in engines} & set(wanted)
    return [
        e for e in engines
        if e.name in exact or any(e.name.startswith(n) for n in wanted if n not in exact)
    ]  # fmt: skip
