"""A rank that trains and saves without end, and writes down at once what it knows of each save.

What it trains is a function of seed, attempt and step, so whoever resumes can tell what must be there.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

import ckptd

LOOK_S = 0.001


def tensors_of(state: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Return all tensors of model and optimizer by name, in one order."""
    found = dict(state["model"].state_dict())
    for number, held in state["optimizer"].state_dict()["state"].items():
        found |= {f"optimizer.{number}.{name}": tensor for name, tensor in held.items()}
    return dict(sorted(found.items()))


def contents(
    tensors: Mapping[str, torch.Tensor], seed: int, attempt: int, step: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Give each tensor and what is in it at that step of that attempt."""
    rng = np.random.default_rng([seed, attempt, step])
    for tensor in tensors.values():
        if tensor.is_floating_point():
            yield tensor, torch.from_numpy(rng.random(tensor.shape, np.float32))
        else:
            yield tensor, torch.full_like(tensor, step)


def paint(state: dict[str, Any], seed: int, attempt: int, step: int) -> None:
    """Train one step: every number changes."""
    if not state["optimizer"].state:
        for parameter in state["model"].parameters():
            parameter.grad = torch.zeros_like(parameter)
        state["optimizer"].step()
    with torch.no_grad():
        for tensor, wanted in contents(tensors_of(state), seed, attempt, step):
            tensor.copy_(wanted)
    state["epoch"] = step
    state["mark"] = f"{seed}/{attempt}/{step}"


def strays(state: Mapping[str, Any], seed: int, attempt: int, step: int) -> list[str]:
    """Name what is not as `paint` left it."""
    tensors = tensors_of(state)
    pairs = zip(tensors, contents(tensors, seed, attempt, step), strict=True)
    found = [name for name, (tensor, wanted) in pairs if not torch.equal(tensor, wanted)]
    if (state["epoch"], state["mark"]) != (step, f"{seed}/{attempt}/{step}"):
        found.append(f"epoch {state['epoch']}, mark {state['mark']}")
    return found


class _Journal:
    """Lines in a file, one system call each: they outlive the process. For any thread."""

    def __init__(self, path: str) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def note(self, step: int, what: str) -> None:
        os.write(self._fd, f"{step} {what}\n".encode())

    def close(self) -> None:
        os.close(self._fd)


class _Watch:
    """Notes each change of a handle's status, on a thread of its own."""

    def __init__(self, journal: _Journal) -> None:
        self._journal = journal
        self._handles: dict[ckptd.Handle, str] = {}
        self._lock = threading.Lock()  # guards _handles
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def add(self, handle: ckptd.Handle) -> None:
        with self._lock:
            self._handles[handle] = ""

    def close(self) -> None:
        self._is_over.set()
        self._thread.join()
        self._look()

    def _run(self) -> None:
        while not self._is_over.wait(LOOK_S):
            self._look()

    def _look(self) -> None:
        with self._lock:
            handles = list(self._handles.items())
        for handle, before in handles:
            is_done, status = handle.is_done, handle.status
            if status != before:
                self._journal.note(handle.step, status)
            with self._lock:
                self._handles[handle] = status
                if is_done:
                    del self._handles[handle]


def march(
    checkpointer: ckptd.Checkpointer,
    state: dict[str, Any],
    *,
    seed: int,
    first: int,
    journal: str,
    count: int = 0,
    wait_every: int = 3,
    pause_s: float = 0.0,
    is_in_step: bool = True,
) -> int:
    """Train and save each step from `first` on, `count` of them or until killed; return the last.

    Every `wait_every`-th save is awaited. With `is_in_step` ranks meet in each step, as those do that
    add up gradients: none is a whole step ahead of another.
    """
    book = _Journal(journal)
    watch = _Watch(book)
    step = first
    try:
        while not count or step < first + count:
            if is_in_step and dist.is_initialized():
                dist.all_reduce(torch.zeros(1))
            paint(state, seed, checkpointer.attempt.ordinal, step)
            time.sleep(pause_s)
            book.note(step, "begun")
            handle = checkpointer.save(step, state)
            watch.add(handle)
            if wait_every and step % wait_every == 0:
                handle.wait_committed()
            step += 1
        checkpointer.wait()
    except BaseException as error:
        with contextlib.suppress(OSError):
            book.note(step, f"stopped: {error!r}".replace("\n", " "))
        raise
    finally:
        watch.close()
        book.close()
    return step - 1
