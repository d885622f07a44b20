"""A rank of a real training job that does what it is told, one JSON object a line each way.

Started with --server it imports torch once and forks a rank for each descriptor that it is sent:
importing torch costs seconds, a fork milliseconds. What the ranks use starts after the fork.
"""

from __future__ import annotations

import ctypes
import hashlib
import itertools
import json
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import ckptd
import ckptd.trainer.checkpointer  # so that the server has it all
from ckptd import failpoints
from ckptd.errors import CkptdError
from tests.fakes import marching

FACTS = ("step", "missing_ranks", "fqn", "ranks", "key")


class Rank:
    """One rank's model, optimizer and Checkpointer."""

    def __init__(self) -> None:
        self.state: dict[str, Any] = {}
        self.handles: dict[int, ckptd.Handle] = {}
        self.checkpointer: ckptd.Checkpointer | None = None
        self.source: str | None = None

    def join(self) -> None:
        """Meet the other ranks, as RANK, WORLD_SIZE and MASTER_PORT say."""
        torch.distributed.init_process_group("gloo", init_method="env://")

    def build(self, *, seed: int = 1, width: int = 64, is_ddp: bool = False) -> None:
        """Make a model with batch statistics, and all that goes with it."""
        torch.manual_seed(seed)
        model: nn.Module = nn.Sequential(
            nn.Linear(16, width), nn.BatchNorm1d(width), nn.Linear(width, 16)
        )
        if is_ddp:
            model = nn.parallel.DistributedDataParallel(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        self.state = {
            "model": model, "optimizer": optimizer, "epoch": 0, "rng": ckptd.RNGState(),
        }  # fmt: skip

    def train(self, *, steps: int = 1) -> list[float]:
        losses = []
        for _ in range(steps):
            self.state["optimizer"].zero_grad()
            loss = self.state["model"](torch.randn(8, 16)).square().mean()
            loss.backward()
            self.state["optimizer"].step()
            self.state["epoch"] += 1
            losses.append(float(loss.detach()))
        return losses

    def digest(self) -> str:
        """Return a hash of every tensor, and of the values."""
        found = hashlib.sha256()
        tensors = {
            f"m.{name.removeprefix('module.')}": tensor
            for name, tensor in self.state["model"].state_dict().items()
        }
        for i, held in self.state["optimizer"].state_dict()["state"].items():
            tensors |= {f"o.{i}.{name}": torch.as_tensor(value) for name, value in held.items()}
        for name in sorted(tensors):
            found.update(name.encode() + tensors[name].numpy().tobytes())
        found.update(str(self.state["epoch"]).encode())
        return found.hexdigest()

    def put(self, **values: object) -> None:
        """Put values into the state; "socket" stands for something that cannot be stored."""
        for name, value in values.items():
            self.state[name] = socket.socket() if value == "socket" else value

    def take(self, *, name: str) -> None:
        value = self.state.pop(name)
        if isinstance(value, socket.socket):
            value.close()

    def bend(self) -> None:
        """Change a parameter on this rank alone."""
        with torch.no_grad():
            next(iter(self.state["model"].parameters())).add_(1.0)

    def open(self, *, root: str, **settings: Any) -> int:
        self.handles = {}
        self.checkpointer = ckptd.Checkpointer(root, **settings)
        return self.checkpointer.attempt.ordinal

    def prepare(self) -> None:
        self._ckpt.prepare(self.state)

    def save(self, *, step: int, **settings: Any) -> float:
        try:
            self.handles[step] = self._ckpt.save(step, self.state, **settings)
        except CkptdError:
            last = self._ckpt._saving._handles[-1]
            if last.step == step:
                self.handles[step] = last
            raise
        return self.handles[step].pause_s

    def walk(self, *, beacon: str, **settings: Any) -> int:
        """Train until told to stop; return the last step. After a few, make the file `beacon`."""
        done = 0
        for step in self._ckpt.steps(itertools.count(1), self.state, **settings):
            self.train()
            done = step
            if step == 3:
                Path(beacon).touch()
        return done

    def march(self, **orders: Any) -> int:
        """Train and save until killed, or as often as ordered; see `marching.march`."""
        return marching.march(self._ckpt, self.state, **orders)

    def strays(self, **where: int) -> list[str]:
        """Name what is not as `march` saved it."""
        return marching.strays(self.state, **where)

    def result(self, *, step: int, timeout_s: float = 60.0) -> int:
        return self.handles[step].result(timeout_s).step

    def status(self, *, step: int) -> str:
        return self.handles[step].status

    def resume(self, **settings: Any) -> dict[str, Any] | None:
        resumed = self._ckpt.resume(self.state, **settings)
        self.source = None if resumed is None else resumed.source
        return None if resumed is None else {"step": resumed.step, "attempt": resumed.attempt}

    def whence(self) -> str | None:
        """Return where the last `resume` found what it filled in."""
        return self.source

    def checkpoints(self) -> list[int]:
        return [found.step for found in self._ckpt.checkpoints()]

    def wait(self, *, timeout_s: float) -> bool:
        return self._ckpt.wait(timeout_s)

    def abandon(self) -> None:
        """Leave the Checkpointer as an exception does."""
        self._ckpt.__exit__(ValueError, ValueError("an error"), None)

    def close(self) -> None:
        self._ckpt.close()

    def arm(self, *, spec: str) -> None:
        failpoints.arm(spec)

    def hide(self, *, folder: str) -> None:
        """Give this rank another file system at `folder`, as on a node that does not share it."""
        libc = ctypes.CDLL(None, use_errno=True)
        is_done = (
            libc.unshare(0x20000) == 0  # CLONE_NEWNS
            and libc.mount(b"none", b"/", None, 0x44000, None) == 0  # MS_REC | MS_PRIVATE
            and libc.mount(b"none", folder.encode(), b"tmpfs", 0, None) == 0
        )
        if not is_done:
            raise OSError(ctypes.get_errno(), "no mount of its own")

    def setenv(self, **values: str) -> None:
        os.environ.update(values)

    @property
    def _ckpt(self) -> ckptd.Checkpointer:
        assert self.checkpointer is not None
        return self.checkpointer


def answer(work: Callable[[], Any]) -> dict[str, Any]:
    try:
        return {"value": work()}
    except Exception as error:  # noqa: BLE001 - whatever it is, the test wants to see it
        facts = {name: getattr(error, name) for name in FACTS if hasattr(error, name)}
        return {"error": type(error).__name__, "text": str(error), **facts}


def obey(talk: socket.socket) -> None:
    """Do what comes until the other end is closed or says "exit"."""
    rank = Rank()
    with talk.makefile("rw", buffering=1) as lines:
        for line in lines:
            order = json.loads(line)
            name = order.pop("do")
            if name == "exit":
                return
            said = answer(lambda name=name, order=order: getattr(rank, name)(**order))
            lines.write(json.dumps(said) + "\n")
            lines.flush()


def become_rank(talk: socket.socket, env: dict[str, str], log: str) -> None:
    os.setsid()
    os.environ.clear()
    os.environ.update(env)
    fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    os.close(fd)
    os.chdir("/")
    obey(talk)


def serve(control: socket.socket) -> None:
    """Fork a rank for each request; say how one ended when asked."""
    while True:
        data, fds, _, _ = socket.recv_fds(control, 1 << 20, 1)
        if not data:
            return
        order = json.loads(data)
        if "wait" in order:
            status = os.waitpid(order["wait"], 0)[1]
            control.send(json.dumps(os.waitstatus_to_exitcode(status)).encode())
            continue
        talk = socket.socket(fileno=fds[0])
        pid = os.fork()
        if pid == 0:
            control.close()
            become_rank(talk, order["env"], order["log"])
            sys.exit(0)  # with all that a script does at its end
        talk.close()
        control.send(json.dumps(pid).encode())


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.optim.AdamW([torch.zeros(1)])  # imports as much again as torch itself
    with socket.socket(fileno=int(sys.argv[1])) as given:
        serve(given)
