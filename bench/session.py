"""One round in one process: all engines take turns in one training loop.

usage: python -m bench.session PLAN.json EVENTS.jsonl

Turns of a few seconds each (A B C A B C ...) mean that a machine that gets slower or faster meanwhile
does so for all engines alike. Each window is: plain steps, a bare copy of the same bytes, a save, and
steps until the save is durable. What happened is written to EVENTS, a line per event.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import xxhash

from bench.content import Job
from bench.engine import Engine, Ticket
from bench.engines import choose
from bench.files import forget, sizes_in

MAX_STEPS = 400  # in one window; a save that is not durable by then is waited for


class Plan:
    """What a session does; made by `bench.train`."""

    def __init__(self, facts: dict[str, Any]) -> None:
        self.size_bytes: int = facts["size_bytes"]
        self.device: str = facts["device"]
        self.engines: list[str] = facts["engines"]
        self.folder = Path(facts["folder"])
        self.windows: int = facts["windows"]
        self.steps: int = facts["steps"]
        self.restores: int = facts["restores"]
        self.is_memory: bool = facts["is_memory"]


class Session:
    """The engines of a round that still work, and the file that events go to."""

    def __init__(self, plan: Plan, events: Path) -> None:
        self.plan = plan
        self._file = events.open("w", buffering=1)
        self.job = Job(plan.size_bytes, device=plan.device)
        self.engines: list[Engine] = []
        self._copies: list[torch.Tensor] = []
        self._last: dict[str, int] = {}
        self._save = 0

    def close(self) -> None:
        """Close the file of events."""
        self._file.close()

    def say(self, event: str, **facts: Any) -> None:
        """Write an event."""
        line = {"event": event, "at": time.perf_counter(), **facts}
        self._file.write(json.dumps(line) + "\n")

    def run(self) -> None:
        """Run the whole round."""
        for _ in range(6):  # kernels are chosen, the moments appear and get their shape
            self.job.step()
        self.say("content", **self.job.describe())
        if self.plan.is_memory:
            self.say("base")
            for _ in range(3):
                self.job.step()
            self.say("saves")
        for kind in choose(",".join(self.plan.engines)):
            self.prepare(kind)
        if not self.plan.is_memory:
            self.bare_copy()
            for _ in range(10):
                self.job.step()
        for window in range(1 + self.plan.windows):
            for engine in list(self.engines):
                self.guarded(engine, "save", lambda e=engine, w=window: self.window(e, w))
        self.say("plain", spans_s=self.plain_steps())
        self.restore_all()
        for engine in self.engines:
            self.guarded(engine, "close", engine.close)
        self.say("end")

    def prepare(self, kind: type[Engine]) -> None:
        """Make an engine and let it get ready."""
        engine = kind(self.job, self.plan.folder / kind.name.replace(" ", "-"))
        engine.folder.mkdir(parents=True)
        self.engines.append(engine)
        self.guarded(engine, "prepare", engine.prepare)

    def guarded(self, engine: Engine, stage: str, act: Callable[[], object]) -> None:
        """Do something with an engine; if it cannot, its row says why and the rest goes on."""
        try:
            act()
        except Exception as error:  # noqa: BLE001 - a peer may fail in any way
            traceback.print_exc()
            self.say("failed", engine=engine.name, stage=stage, why=f"{stage}: {_short(error)}")
            if engine in self.engines and stage != "close":
                self.engines.remove(engine)

    def plain_steps(self) -> list[float]:
        """Train a few steps with nothing beside them."""
        return [self.job.step() for _ in range(self.plan.steps)]

    def window(self, engine: Engine, window: int) -> None:
        """Save once and measure all that it costs; window 0 is the first save."""
        is_quiet = self.plan.is_memory
        self.say("plain", spans_s=[] if is_quiet else self.plain_steps())
        copy_s = 0.0 if is_quiet else self.bare_copy()
        before = sizes_in(engine.folder)
        self._save += 1
        began = time.perf_counter()
        ticket = engine.save(self._save)
        pause_s = time.perf_counter() - began
        spans = self.follow(engine, ticket)
        span_s = time.perf_counter() - began
        durable_s = ticket.wait_durable() - began
        after = sizes_in(engine.folder)
        self.say(
            "window", engine=engine.name, window=window, copy_s=copy_s, pause_s=pause_s,
            span_s=span_s, steps=len(spans), durable_s=durable_s,
            stored_bytes=sum(size for path, size in after.items() if path not in before),
        )  # fmt: skip
        if engine.name in self._last:
            engine.discard(self._last[engine.name])
        self._last[engine.name] = self._save

    def follow(self, engine: Engine, ticket: Ticket) -> list[float]:
        """Train on until the save is durable, and the planned steps at least."""
        spans: list[float] = []
        while len(spans) < MAX_STEPS and (len(spans) < self.plan.steps or not ticket.done.is_set()):
            spans.append(self.job.step(engine.fence))
        return spans

    def bare_copy(self) -> float:
        """Copy the state once into memory that is in use already: what no pause can beat."""
        tensors = self.job.tensors()
        if not self._copies:
            self._copies = [host_copy(tensor) for tensor in tensors]
        began = time.perf_counter()
        torch._foreach_copy_(self._copies, tensors, non_blocking=True)
        self.job.finish()
        return time.perf_counter() - began

    def restore_all(self) -> None:
        """Save the same state with every engine, then restore it, in turns, cold and hot."""
        if not self.plan.restores:
            return
        self._copies.clear()
        for engine in list(self.engines):
            self.guarded(engine, "save", lambda e=engine: self.keep(e))
        digest = self.digest()
        self.say("restores")
        for _ in range(self.plan.restores):
            for engine in list(self.engines):
                for name in engine.restores():
                    self.guarded(
                        engine, "restore", lambda e=engine, n=name: self.restore(e, n, digest)
                    )

    def keep(self, engine: Engine) -> None:
        """Save what the restores are about."""
        self._save += 1
        engine.save(self._save).wait_durable()
        engine.fence()
        engine.discard(self._last[engine.name])
        self._last[engine.name] = self._save

    def restore(self, engine: Engine, name: str, digest: str) -> None:
        """Restore from the disk, then from the page cache, and check every byte of it once."""
        for kind in ("cold", "hot"):
            with torch.no_grad():
                for tensor in self.job.tensors():
                    tensor.zero_()
            self.job.finish()
            if kind == "cold":
                forget(engine.folder)
            began = time.perf_counter()
            undo = engine.restores()[name](self._last[engine.name])
            self.job.finish()
            span_s = time.perf_counter() - began
            is_same = self.digest() == digest
            self.say(
                "restore", engine=engine.name, way=name, kind=kind, span_s=span_s, is_same=is_same
            )
            if undo is not None:
                undo()

    def digest(self) -> str:
        """Return a hash of the whole state."""
        seen = xxhash.xxh3_128()
        for tensor in self.job.tensors():
            seen.update(tensor.cpu().contiguous().numpy())
        return seen.hexdigest()


def host_copy(tensor: torch.Tensor) -> torch.Tensor:
    """Return a copy in main memory, page-locked where the tensor is on a GPU."""
    if not tensor.is_cuda:
        return tensor.clone()
    return torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor)


def join() -> None:
    """Be a job of one rank: torch's process executor wants a process group."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK="0", WORLD_SIZE="1", LOCAL_RANK="0"
    )
    dist.init_process_group("gloo")


def _short(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[-1]}"[:200]


def main() -> None:
    """Run the plan."""
    warnings.simplefilter("ignore")  # deprecations inside of the peers
    plan = Plan(json.loads(Path(sys.argv[1]).read_text()))
    join()
    with contextlib.closing(Session(plan, Path(sys.argv[2]))) as session:
        session.run()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
