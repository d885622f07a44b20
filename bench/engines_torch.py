"""Engines that come with torch, each as its documentation has it and in its best working mode."""

from __future__ import annotations

import contextlib
import logging
import os
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

from bench.engine import Engine, Restore, Ticket
from bench.files import make_durable


class TorchSave(Engine):
    """One file, written and flushed while training waits."""

    name = "torch.save"
    does_sync = False

    def save(self, step: int) -> Ticket:
        """Write, flush, fsync."""
        with self.path(step).open("wb") as file:
            torch.save(self.job.state_dicts(), file)
            file.flush()
            os.fsync(file.fileno())
        make_durable(self.folder)
        return Ticket.now()

    def restores(self) -> dict[str, Restore]:
        """Plain, and mapped with every page used."""
        return {
            "": lambda step: self._load(step, is_mapped=False),
            "mmap": lambda step: self._load(step, is_mapped=True),
        }

    def _load(self, step: int, *, is_mapped: bool) -> None:
        state = torch.load(self.path(step), mmap=is_mapped, weights_only=True)
        self.job.model.load_state_dict(state["model"])
        if is_mapped:  # the moments would go on living in the file: training must own them
            state["optimizer"]["state"] = {
                number: {name: tensor.clone() for name, tensor in kept.items()}
                for number, kept in state["optimizer"]["state"].items()
            }
        self.job.optimizer.load_state_dict(state["optimizer"])


class _Dcp(Engine):
    def restores(self) -> dict[str, Restore]:
        """Load into the live tensors."""
        return {"": self._load}

    def _load(self, step: int) -> None:
        state = self.job.state_dicts()
        dcp.load(state, checkpoint_id=str(self.path(step)))
        self.job.model.load_state_dict(state["model"])
        self.job.optimizer.load_state_dict(state["optimizer"])


class DcpSave(_Dcp):
    """`dcp.save`: training waits for the disk."""

    name = "dcp.save"

    def save(self, step: int) -> Ticket:
        """Write with the defaults, which include fsync."""
        dcp.save(self.job.state_dicts(), checkpoint_id=str(self.path(step)))
        return Ticket.now()


class DcpThread(_Dcp):
    """`dcp.async_save` as it is by default: a copy, then a thread of the trainer writes."""

    name = "dcp.async thread"

    def save(self, step: int) -> Ticket:
        """Copy and return."""
        future = dcp.async_save(self.job.state_dicts(), checkpoint_id=str(self.path(step)))
        return Ticket.after(future.result)  # type: ignore[union-attr]


class DcpProcess(_Dcp):
    """`dcp.async_save` at its best on a CPU: a process, shared memory, a thread that copies."""

    name = "dcp.async process"
    note = (
        "process executor, shared-memory staging on a thread (waited for before optimizer.step), "
        "plan caching, 2 writer threads; with CUDA also pinned memory and non-blocking copies"
    )

    def prepare(self) -> None:
        """Make what is kept from save to save."""
        logging.getLogger("torch.distributed.checkpoint").setLevel(logging.WARNING)
        self._stager = DefaultStager(
            StagingOptions(
                use_pinned_memory=self.job.is_cuda,
                use_shared_memory=True,
                use_async_staging=True,
                use_non_blocking_copy=self.job.is_cuda,
            )
        )
        self._planner = dcp.DefaultSavePlanner(enable_plan_caching=True)
        self._staged: Any = None

    def save(self, step: int) -> Ticket:
        """Start copying and return."""
        response = dcp.async_save(
            self.job.state_dicts(),
            storage_writer=dcp.FileSystemWriter(str(self.path(step)), thread_count=2),
            planner=self._planner,
            async_checkpointer_type=AsyncCheckpointerType.PROCESS,
            async_stager=self._stager,
        )
        self._staged = response.staging_completion  # type: ignore[union-attr]
        return Ticket.after(response.upload_completion.result)  # type: ignore[union-attr]

    def fence(self) -> None:
        """Wait for the copy."""
        if self._staged is not None:
            self._staged.result()
            self._staged = None

    def close(self) -> None:
        """End the thread and the process, which torch keeps in a global."""
        self._stager.close()
        from torch.distributed.checkpoint import _async_process_executor as executor

        with contextlib.suppress(Exception):
            executor._CHECKPOINT_PROCESS = None  # its __del__ ends the process
