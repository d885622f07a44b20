"""A training job of the demo: started, watched through its journals, killed without warning."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from demo_place import open_store

from ckptd.store.base import Store

JOB_TIMEOUT_S = 150.0

Event = dict[str, Any]


class Journal:
    """The events that one rank wrote so far. A line that is half written is read next time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.offset = 0
        self.events: list[Event] = []

    def read(self) -> None:
        """Take in what was written since the last call."""
        with contextlib.suppress(FileNotFoundError), self.path.open("rb") as file:
            file.seek(self.offset)
            whole = file.read().rpartition(b"\n")[0]
            if whole:
                self.offset += len(whole) + 1
                self.events += [json.loads(line) for line in whole.splitlines()]

    def all(self, kind: str) -> list[Event]:
        """Return the events of one kind, in order."""
        return [event for event in self.events if event["event"] == kind]


class Job:
    """One run of the training script on `ranks` ranks."""

    def __init__(
        self, name: str, ranks: int, title: str, command: list[str], root: str, folder: Path
    ) -> None:
        self.name, self.ranks, self.title, self.root = name, ranks, title, root
        self.command = command
        self.folder = folder
        self.log = folder / "output.log"
        self.journals = [Journal(folder / f"rank{rank}.jsonl") for rank in range(ranks)]
        self.killed_in: str | None = None
        self.process: subprocess.Popen[bytes] | None = None
        self.deadline = 0.0

    @contextlib.contextmanager
    def started(self, env: dict[str, str]) -> Iterator[None]:
        """Run the job inside of the block; whatever happens in it, no rank outlives the block.

        Raises:
            SystemExit: the job failed, or took longer than `JOB_TIMEOUT_S`; with its last output.
        """
        launcher = [sys.executable]
        if self.ranks > 1:
            launcher += ["-m", "torch.distributed.run", "--standalone"]
            launcher += ["--nproc-per-node", str(self.ranks)]
        self.folder.mkdir(parents=True)
        self.deadline = time.monotonic() + JOB_TIMEOUT_S
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [*launcher, *self.command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=env,
                start_new_session=True,
            )
        try:
            yield
        finally:
            self._end()
        if self.killed_in is None and self.process.returncode != 0:
            tail = self.log.read_text(errors="replace")[-3000:]
            raise SystemExit(f"{tail}\ndemo: {self.name} failed ({self.process.returncode})")

    def poll(self) -> bool:
        """Read the journals; tell whether the job still runs."""
        assert self.process is not None
        if time.monotonic() > self.deadline:
            raise SystemExit(f"demo: {self.name} took over {JOB_TIMEOUT_S:.0f} s; see {self.log}")
        is_running = self.process.poll() is None
        self.journals[0].read()
        return is_running

    def kill(self) -> None:
        """Kill launcher and ranks, all at once and without warning; the daemon is left alone.

        torchrun puts every rank into a session of its own, so killing its group alone would leave
        the ranks running.
        """
        for journal in self.journals:
            journal.read()
        self._end()
        for journal in self.journals:
            journal.read()

    def _end(self) -> None:
        assert self.process is not None
        for pid in [*self.pids, self.process.pid]:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
        self.process.wait()
        for journal in self.journals:
            journal.read()

    @property
    def pids(self) -> list[int]:
        """The ranks' processes, each the leader of its own group. None once the job has ended."""
        assert self.process is not None
        if self.process.returncode is not None or self.ranks == 1:
            return []
        for journal in self.journals:
            journal.read()
        return [event["pid"] for j in self.journals for event in j.all("process")]

    @property
    def step(self) -> int:
        """The last step that rank 0 finished; where it started from before that; 0 at first."""
        counted = [e["step"] for e in self.journals[0].events if e["event"] in {"step", "resumed"}]
        return counted[-1] if counted else 0

    @property
    def first_step(self) -> int | None:
        """The step that the job went on from, 0 if from nothing; None before it is known."""
        found = self.journals[0].all("resumed") + self.journals[0].all("fresh")
        return found[0]["step"] if found else None

    @property
    def losses(self) -> dict[int, float]:
        """The loss of every step, exactly."""
        return {e["step"]: float.fromhex(e["loss"]) for e in self.journals[0].all("step")}


class Kill:
    """Says when a job is to be killed: within the first save from `step` on.

    With ``moment="saving"`` that is while a rank is inside of `save`; with ``"writing"``, while
    parts of the step stand in the root but not yet its manifest.
    """

    def __init__(self, step: int, moment: str) -> None:
        self.step, self.moment = step, moment
        self._store: Store | None = None

    def is_due(self, job: Job) -> bool:
        """Look once. Sets what the job was killed in when it answers True."""
        saves = job.journals[0].all("saving")
        if not saves or saves[-1]["step"] < self.step:
            return False
        step = saves[-1]["step"]
        if self.moment == "saving":
            is_inside = job.journals[0].events[-1]["event"] == "saving"
            return self._note(job, f"inside of save({step})", is_inside)
        if self._store is None:
            self._store = open_store(job.root)
        attempt = max((e.key.rpartition("/")[2] for e in self._store.list("attempts/")), default="")
        name = f"{step:012d}-{attempt}"
        # In this order: a manifest that is not there after its parts were may come at any moment.
        parts = [f"ranks/{name}/"]
        if "://" not in job.root:  # a folder lists its chunks in no time
            parts.append("chunks/")
        is_born = any(name in e.key for prefix in parts for e in self._store.list(prefix))
        is_committed = any(e.key.endswith(name) for e in self._store.list("checkpoints/"))
        is_due = is_born and not is_committed
        return self._note(job, f"step {step} being written", is_due)

    @staticmethod
    def _note(job: Job, moment: str, is_due: bool) -> bool:  # noqa: FBT001
        if is_due:
            job.killed_in = moment
        return is_due
