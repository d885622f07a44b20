"""deploy/slurm/train.sbatch, as it is, on a real Slurm of one node."""

from __future__ import annotations

import os
import re
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from ckptd.pipeline.catalog import list_checkpoints
from tests.fakes.jobs import REPOSITORY, Place, new_place, wait_until
from tests.fakes.slurm import Slurm, missing

pytestmark = [
    pytest.mark.system,
    pytest.mark.skipif(missing() is not None, reason=f"Slurm: {missing()}"),
]
SCRIPT = REPOSITORY / "deploy/slurm/train.sbatch"
STEPS = 100

# Slow at first, so that whoever warns it comes in time; the second start need not wait for anybody.
_TRAIN = """
if [ -z "${{SLURM_RESTART_COUNT:-}}" ]; then pace=0.3; else pace=0; fi
exec {python} {example} --root {root} --steps {steps} --save-every 1000000 --pace-s $pace
"""


class Job:
    """A job of two ranks made from the batch script, with nothing but its variables set."""

    def __init__(self, slurm: Slurm, place: Place) -> None:
        self.slurm, self.place = slurm, place
        train = place.base / "train.sh"
        train.write_text(
            _TRAIN.format(
                python=sys.executable, example=REPOSITORY / "examples/preemptible.py",
                root=place.root, steps=STEPS,
            )
        )  # fmt: skip
        self.output = place.base / "train.log"
        self.output.touch()
        self.number = slurm.submit(
            SCRIPT, f"--output={self.output}", TRAIN=f"sh {train}", MASTER_PORT=_free_port(),
            PATH=f"{Path(sys.executable).parent}{os.pathsep}{slurm.env['PATH']}",
        )  # fmt: skip

    @property
    def text(self) -> str:
        return self.output.read_text()

    def wait_said(self, text: str, times: int = 1) -> None:
        wait_until(lambda: self.text.count(text) >= times, f"{text!r} in\n{self.output}")

    def said(self, pattern: str) -> list[int]:
        """Return the numbers that stand in lines like this."""
        return [int(found) for found in re.findall(pattern, self.text, re.MULTILINE)]

    def saved(self) -> list[int]:
        store = self.place.store()
        try:
            return [found.step for found in list_checkpoints(store)]
        finally:
            store.close()

    def daemons(self) -> list[int]:
        """Return the processes of the daemons that have served this job, in order."""
        return self.said(r"serving on .*, pid (\d+)$")


def _free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


@pytest.fixture
def place() -> Iterator[Place]:
    with new_place() as found:
        yield found


@pytest.fixture
def job(place: Place) -> Iterator[Job]:
    with closing(Slurm(place.base / "slurm", place.env())) as slurm:
        try:
            slurm.start()
        except OSError as error:
            pytest.skip(f"Slurm: {error}")
        yield Job(slurm, place)


def test_p6_a_warned_job_saves_goes_back_into_the_queue_and_goes_on_with_the_next_step(job):
    job.wait_said("step 3:", times=2)
    os.kill(job.daemons()[0], signal.SIGKILL)
    wait_until(lambda: len(job.daemons()) == 2, "another daemon serves")

    job.slurm.run("scancel", "--batch", "--signal=USR1", job.number)
    job.wait_said("told to stop after step", times=2)
    stopped = job.said(r"told to stop after step (\d+)")
    assert stopped[0] == stopped[1] < STEPS
    job.slurm.wait_job(job.number, Restarts="1")
    assert job.saved() == [stopped[0]]

    job.slurm.wait_job(job.number, JobState="COMPLETED")
    assert job.said(r"resumed at step (\d+)") == stopped, job.text
    assert job.said(r"rank 0: step (\d+):") == list(range(1, STEPS + 1)), "each step once"
    assert job.saved() == [STEPS, stopped[0]]


def test_p6_sigterm_to_all_steps_lets_the_daemon_serve_its_trainers_until_they_have_saved(job):
    """What Slurm does before it takes a job away: trainers and daemons are told at one moment."""
    job.wait_said("step 3:", times=2)
    job.slurm.run("scancel", "--signal=TERM", job.number)
    job.wait_said("told to stop after step", times=2)
    stopped = job.said(r"told to stop after step (\d+)")
    assert stopped[0] == stopped[1]
    job.slurm.wait_job(job.number, Restarts="1")
    assert job.saved() == [stopped[0]]
    job.slurm.run("scancel", job.number)
