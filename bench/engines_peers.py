"""Engines from PyPI. They are imported when they are prepared: one may be missing or broken."""

from __future__ import annotations

import json
import os
from typing import Any

import torch

from bench.engine import Engine, Restore, Ticket
from bench.files import make_durable


class TorchSnapshot(Engine):
    """torchsnapshot, superseded by DCP: copies under a memory budget, then writes on threads."""

    name = "torchsnapshot async"
    needs = "torchsnapshot"
    does_sync = False

    def prepare(self) -> None:
        """Import it."""
        import torchsnapshot

        self._lib: Any = torchsnapshot

    def save(self, step: int) -> Ticket:
        """Copy and return."""
        path = self.path(step)
        pending = self._lib.Snapshot.async_take(str(path), self._state())

        def wait() -> None:
            pending.wait()
            make_durable(path)

        return Ticket.after(wait)

    def restores(self) -> dict[str, Restore]:
        """Load into the live objects."""
        return {"": lambda step: self._lib.Snapshot(str(self.path(step))).restore(self._state())}

    def _state(self) -> dict[str, Any]:
        return {"model": self.job.model, "optimizer": self.job.optimizer}


class Safetensors(Engine):
    """safetensors: one flat file, which holds tensors only; the options of groups go beside it."""

    name = "safetensors"
    needs = "safetensors"
    does_sync = False

    def prepare(self) -> None:
        """Import it."""
        import safetensors.torch

        self._lib: Any = safetensors.torch

    def save(self, step: int) -> Ticket:
        """Write, fsync."""
        state = self.job.state_dicts()
        tied = "head.weight"  # tied to the embedding: the format refuses shared memory
        flat = {f"model.{key}": t for key, t in state["model"].items() if key != tied}
        for number, kept in state["optimizer"]["state"].items():
            flat.update({f"optimizer.{number}.{key}": t for key, t in kept.items()})
        groups = json.dumps(state["optimizer"]["param_groups"])
        path = self.path(step)
        self._lib.save_file(flat, path, metadata={"param_groups": groups})
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)
        make_durable(self.folder)
        return Ticket.now()

    def restores(self) -> dict[str, Restore]:
        """Load all, then hand it to the objects."""
        return {"": self._load}

    def _load(self, step: int) -> None:
        flat = self._lib.load_file(self.path(step), device=str(self.job.device))
        model = {k.removeprefix("model."): t for k, t in flat.items() if k.startswith("model.")}
        model["head.weight"] = model["embed.weight"]
        self.job.model.load_state_dict(model)
        state = self.job.optimizer.state_dict()
        kept: dict[int, dict[str, torch.Tensor]] = {}
        for key, tensor in flat.items():
            if key.startswith("optimizer."):
                _, number, name = key.split(".")
                # Tensors of this format go on living in the mapped file: training must own them.
                kept.setdefault(int(number), {})[name] = tensor.clone()
        self.job.optimizer.load_state_dict({**state, "state": kept})


class TorchCheckpointing(Engine):
    """torch_checkpointing: staging on a thread, a writer process, a lock around the step."""

    name = "torch_checkpointing"
    needs = "torch_checkpointing"
    note = "buffered writes: its O_DIRECT writes fail on file systems that want alignment (EINVAL)"
    does_sync = False

    def prepare(self) -> None:
        """Build the manager, which starts its process, and let it allocate its staging memory."""
        from torch_checkpointing import CheckpointManager
        from torch_checkpointing.storage.filesystem import LocalFileSystemStorageConfig

        storage = LocalFileSystemStorageConfig(use_direct_io=False)
        self._manager = CheckpointManager(CheckpointManager.Config(storage_config=storage))
        self._manager.prewarm_staging(self.job.state_dicts())

    def save(self, step: int) -> Ticket:
        """Start copying and return."""
        path = self.path(step)
        future: Any = self._manager.save(str(path), self.job.state_dicts())

        def wait() -> None:
            future.result()
            make_durable(path)

        return Ticket.after(wait)

    def fence(self) -> None:
        """Wait for the copy, as its lock around the step does."""
        with self._manager.lock():
            pass

    def restores(self) -> dict[str, Restore]:
        """Load into the live state."""
        return {"": self._load}

    def _load(self, step: int) -> None:
        state = self._manager.load(str(self.path(step)), into=self.job.state_dicts())
        self.job.model.load_state_dict(state["model"])
        self.job.optimizer.load_state_dict(state["optimizer"])

    def close(self) -> None:
        """End its process."""
        self._manager.close()
