"""Page-locked memory and side streams: what copies from a GPU want. Without CUDA nothing happens."""

from __future__ import annotations

import functools
import logging
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

log = logging.getLogger("ckptd.trainer")


def pin(address: int, length: int) -> bool:
    """Lock memory that is mapped already, so that a GPU can copy into it without the processor.

    Undo it with `unpin` before the memory is unmapped. False where the driver refuses: copies work
    all the same, more slowly, and a thread waits for each.
    """
    try:
        code = int(_cudart().cudaHostRegister(address, length, 0))
    except (RuntimeError, AssertionError) as error:
        log.warning("slots are not page-locked: %s", error)
        return False
    if code:
        log.warning("slots are not page-locked: cudaHostRegister says %d", code)
    return code == 0


def unpin(address: int) -> None:
    """Undo `pin`."""
    _cudart().cudaHostUnregister(address)


def _cudart() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]


def pinned_buffer(count: int) -> npt.NDArray[np.uint8]:
    """Return new page-locked memory."""
    return torch.empty(count, dtype=torch.uint8, pin_memory=True).numpy()


@functools.lru_cache(maxsize=None)  # noqa: UP033 - says that it is a cache, per device
def side_stream(device: torch.device) -> torch.cuda.Stream:
    """Return the stream of a device on which captures are copied, beside what trains."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
