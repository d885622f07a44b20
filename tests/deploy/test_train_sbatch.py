"""What the batch script decides, with stand-ins for Slurm's commands. On a real Slurm: tests/system."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fakes.jobs import PATIENCE_S, REPOSITORY, wait_until

pytestmark = pytest.mark.system
SCRIPT = REPOSITORY / "deploy/slurm/train.sbatch"

# Each step is a process group of its own, to which `scancel` sends its signal, as Slurm does.
COMMANDS = {
    "srun": """
        for each; do case $each in
          --job-name=*) step=${each#*=} ;;
          --*) ;;
          *) break ;;
        esac; shift; done
        echo "step $step" >>"$LOG"
        SLURM_PROCID=3 SLURM_LOCALID=1 setsid "$@" &
        echo $! >"$PLACE/$step"
        wait $!""",
    "squeue": """
        printf '7.0 daemons\\n7.1 ranks\\n'""",
    "scancel": """
        echo "scancel $*" >>"$LOG"
        case $* in *7.0) kill -TERM -- "-$(cat "$PLACE/daemons")" ;; esac""",
    "scontrol": """
        case $1 in show) echo node-1; echo node-2 ;; *) echo "scontrol $*" >>"$LOG" ;; esac""",
    "ckptd": """
        echo "ckptd $* on $CKPTD_SOCKET" >>"$LOG"
        trap 'echo told >>"$LOG"' TERM
        sleep 60 &
        wait $!
        # It drains as long as there are ranks, and some more: a second signal would be seen.
        while kill -0 "$(cat "$PLACE/ranks")" 2>/dev/null; do sleep 0.02; done
        sleep 0.2""",
}


class Batch:
    """The batch script, running; what happens is in `log`."""

    def __init__(self, place: Path, train: str) -> None:
        self.place = place
        self.log = place / "log"
        self.log.touch()
        (place / "train.sh").write_text(train)
        folder = place / "bin"
        folder.mkdir()
        for name, text in COMMANDS.items():
            (folder / name).write_text(f"#!/bin/bash{text}\n")
            (folder / name).chmod(0o755)
        self.popen = subprocess.Popen(
            ["bash", str(SCRIPT)], cwd=place, env=self._env(folder), start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    def _env(self, folder: Path) -> dict[str, str]:
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("CKPTD_", "SLURM_"))}
        return {
            **kept, "PATH": f"{folder}{os.pathsep}{kept['PATH']}", "LOG": str(self.log),
            "PLACE": str(self.place), "CKPTD_RUNTIME_DIR": str(self.place / "run"),
            "TRAIN": f"sh {self.place}/train.sh", "CKPTD_DRAIN_S": "20",
            "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node-[1-2]", "SLURM_NNODES": "2",
            "SLURM_NTASKS": "4", "SLURM_NTASKS_PER_NODE": "2", "SLURM_CPUS_PER_TASK": "8",
        }  # fmt: skip

    @property
    def lines(self) -> list[str]:
        return self.log.read_text().splitlines()

    def wait_line(self, start: str) -> None:
        wait_until(lambda: any(line.startswith(start) for line in self.lines), start)

    def wait_up(self) -> None:
        """Wait for the daemon and the ranks."""
        for name in ("daemons", "ranks"):
            wait_until((self.place / name).exists, name)
        self.wait_line("rank")
        self.wait_line("ckptd")

    def tell_daemons(self) -> None:
        os.killpg(int((self.place / "daemons").read_text()), signal.SIGTERM)
        self.wait_line("told")

    def end(self) -> int:
        said, _ = self.popen.communicate(timeout=PATIENCE_S)
        assert "not found" not in said, said
        return self.popen.returncode

    @property
    def is_requeued(self) -> bool:
        return "scontrol requeue 7" in self.lines


@pytest.fixture
def start(tmp_path: Path) -> Iterator:
    running: list[Batch] = []

    def make(train: str) -> Batch:
        running.append(Batch(tmp_path, train))
        return running[0]

    yield make
    for batch in running:
        for name in ("daemons", "ranks"):
            if (tmp_path / name).exists() and (pid := (tmp_path / name).read_text().strip()):
                kill(int(pid))
        kill(batch.popen.pid)
        batch.popen.communicate(timeout=PATIENCE_S)


def kill(group: int) -> None:
    try:
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        return


UP = 'echo "rank $RANK of $WORLD_SIZE, $LOCAL_RANK of $LOCAL_WORLD_SIZE here" >>"$LOG"\n'
AT_THE_WARNING = UP + 'until [ -e "$CKPTD_STOP_FILE" ]; do sleep 0.02; done\n'
# Ranks that end once the daemon is up, and that do not before.
ONCE_SERVED = UP + 'until grep -q ^ckptd "$LOG" && [ -e "$PLACE/go" ]; do sleep 0.02; done\n'


@pytest.mark.parametrize(("code", "is_again"), [(0, False), (1, False), (137, False), (75, True)])
def test_ranks_that_end_with_75_run_again_and_others_do_not(start, code, is_again):
    batch = start(f"{ONCE_SERVED}exit {code}")
    batch.wait_up()
    if code == 75:  # not told by the script: then the daemon may have been told already
        batch.tell_daemons()
    (batch.place / "go").touch()
    assert (batch.end(), batch.is_requeued) == (code, is_again)
    assert batch.lines.count("told") == 1, "a second signal would end the daemon at once"
    assert "rank 3 of 4, 1 of 2 here" in batch.lines
    assert f"ckptd daemon on {batch.place}/run/job-7.sock" in batch.lines
    assert (batch.place / "run").stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize(("code", "is_again"), [(0, False), (75, True), (1, True), (138, True)])
def test_a_warned_job_that_is_not_done_runs_again(start, code, is_again):
    batch = start(f"{AT_THE_WARNING}exit {code}")
    batch.wait_up()
    batch.popen.send_signal(signal.SIGUSR1)
    assert (batch.end(), batch.is_requeued) == (code, is_again)
    assert batch.lines.count("told") == 1
    assert not (batch.place / "run/job-7.stop").exists(), "the next start would stop at once"


def test_a_job_that_was_cancelled_stays_away(start):
    """Slurm tells ranks, daemons and the script; the daemon must not hear it from both."""
    batch = start(f"{ONCE_SERVED}exit 75")
    batch.wait_up()
    batch.tell_daemons()
    batch.popen.send_signal(signal.SIGTERM)
    wait_until(lambda: not has_pending(batch.popen.pid, signal.SIGTERM), "the script was told")
    (batch.place / "go").touch()
    assert (batch.end(), batch.is_requeued) == (75, False)
    assert batch.lines.count("told") == 1
    assert not any(line.startswith("scancel") for line in batch.lines)


def has_pending(pid: int, number: int) -> bool:
    text = Path(f"/proc/{pid}/status").read_text()
    return bool(int(text.split("ShdPnd:\t")[1].split()[0], 16) >> (number - 1) & 1)


def test_a_daemon_that_is_killed_is_started_anew(start):
    batch = start(f"{AT_THE_WARNING}exit 75")
    batch.wait_up()
    (daemon,) = Path(f"/proc/{(batch.place / 'daemons').read_text().strip()}/task").glob(
        "*/children"
    )
    os.kill(int(daemon.read_text().split()[0]), signal.SIGKILL)
    wait_until(lambda: sum(line.startswith("ckptd") for line in batch.lines) == 2, "another one")
    batch.popen.send_signal(signal.SIGUSR1)
    assert (batch.end(), batch.is_requeued) == (75, True)
    assert batch.lines.count("told") == 1
