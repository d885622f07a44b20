"""A real Slurm of one node, of plain processes, with every file of it in one folder."""

from __future__ import annotations

import contextlib
import os
import pwd
import re
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.fakes.jobs import PATIENCE_S, Process, wait_until

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scancel", "scontrol", "squeue")
PATH = os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/sbin", "/usr/local/sbin"))
KILL_WAIT_S = 5  # from Slurm's SIGTERM to its SIGKILL
_FAILED = ("FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")

_CONF = """
ClusterName=ckptd
SlurmctldHost=localhost
SlurmctldPort={controller_port}
SlurmdPort={node_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
# A job that was requeued waits as long as credentials live; 5 s is the least that there is.
AuthInfo=socket={base}/munge.sock,cred_expire=5
StateSaveLocation={base}/state
SlurmdSpoolDir={base}/spool
SlurmctldPidFile={base}/slurmctld.pid
SlurmdPidFile={base}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=1,sched_min_interval=0
SlurmdParameters=config_overrides
ReturnToService=2
KillWait={kill_wait_s}
MailProg=/bin/true
NodeName=localhost NodeAddr=127.0.0.1 CPUs=2 State=UNKNOWN
PartitionName=all Nodes=localhost Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str | None:
    """Return why there can be no Slurm here; None if there can."""
    absent = [name for name in PROGRAMS if shutil.which(name, path=PATH) is None]
    if not absent:
        return None
    return (
        f"needs {', '.join(absent)} (Debian: apt-get install munge slurmctld slurmd slurm-client)"
    )


class Slurm:
    """A cluster of one node in the folder `base`, whose path must be short.

    Its processes belong to whoever runs the tests, and get `env`.
    """

    def __init__(self, base: Path, env: dict[str, str]) -> None:
        self.base = base
        self.env = {**env, "PATH": PATH, "SLURM_CONF": str(base / "slurm.conf")}
        self._processes: list[Process] = []

    def start(self) -> None:
        """Start its processes and wait until it takes jobs; to be closed afterwards all the same.

        Raises:
            OSError: it does not start here.
        """
        self._configure()
        self._spawn(
            "munged", "--foreground", "--force", f"--key-file={self.base}/munge.key",
            f"--socket={self.base}/munge.sock", f"--pid-file={self.base}/munge.pid",
            f"--log-file={self.base}/munge.log", f"--seed-file={self.base}/munge.seed",
        )  # fmt: skip
        self._until((self.base / "munge.sock").exists, "munged")
        self._spawn("slurmctld", "-D", "-c", "-f", f"{self.base}/slurm.conf")
        self._spawn("slurmd", "-D", "-N", "localhost", "-f", f"{self.base}/slurm.conf")
        self._until(self._is_ready, "slurmctld and slurmd")

    def close(self) -> None:
        """End its jobs, then its processes, the youngest first: slurmd before who it reports to."""
        if all(process.is_running for process in self._processes[1:]):
            self._empty()
        for process in reversed(self._processes):
            if process.is_running:
                process.send(signal.SIGTERM)
            try:
                process.wait(10.0)
            except subprocess.TimeoutExpired:
                process.kill()
            if process.popen.stdout is not None:
                process.popen.stdout.close()
        for pid in _listeners(self.base):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def run(self, *command: str, **env: str) -> str:
        """Run one of Slurm's commands and return what it prints; it must work."""
        done = subprocess.run(
            command, env={**self.env, **env}, cwd=self.base, capture_output=True, text=True,
            timeout=PATIENCE_S, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{command}: {done.stderr}\n{self.log}"
        return done.stdout.strip()

    def submit(self, script: Path, *options: str, **env: str) -> str:
        """Put a batch script into the queue and return the number of the job."""
        return self.run("sbatch", "--parsable", *options, str(script), **env)

    def job(self, number: str) -> dict[str, str]:
        """Return what Slurm says of a job, by its names: JobState, Restarts, Reason ..."""
        said = self.run("scontrol", "show", "job", number)
        return dict(re.findall(r"(?:^|\s)([A-Za-z]+)=(\S*)", said))

    def wait_job(self, number: str, **expected: str) -> None:
        """Wait until Slurm says this of a job; it is asked seldom, since each time is a process."""
        deadline = time.monotonic() + PATIENCE_S
        while not expected.items() <= (found := self.job(number)).items():
            assert time.monotonic() < deadline, f"job {number}: {expected}, but {found}"
            assert found["JobState"] not in _FAILED, f"job {number}: {found}"
            time.sleep(0.2)

    @property
    def log(self) -> str:
        """What its processes said."""
        return "\n".join(f"--- {each.log.name}\n{each.text[-2000:]}" for each in self._processes)

    # --- inside ----------------------------------------------------------------------------------

    def _configure(self) -> None:
        self.base.mkdir(mode=0o755)
        for name in ("state", "spool"):
            (self.base / name).mkdir()
        key = self.base / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(128))
        text = _CONF.format(
            base=self.base, user=_user(), controller_port=_free_port(), node_port=_free_port(),
            kill_wait_s=KILL_WAIT_S,
        )  # fmt: skip
        (self.base / "slurm.conf").write_text(text)
        # Nothing uses cgroups here, but slurmd wants a plugin; before 23.02 there was no "disabled".
        version = self.run("slurmd", "-V").split()[-1]
        is_old = tuple(int(part) for part in version.split(".")[:2]) < (23, 2)
        plugin = "cgroup/v1" if is_old else "disabled"
        (self.base / "cgroup.conf").write_text(f"CgroupPlugin={plugin}\n")

    def _spawn(self, *command: str) -> None:
        found = shutil.which(command[0], path=PATH)
        assert found is not None
        log = self.base / f"{command[0]}.out"
        self._processes.append(Process([found, *command[1:]], self.env, log))

    def _until(self, is_true: Callable[[], Any], what: str) -> None:
        wait_until(lambda: is_true() or not all(p.is_running for p in self._processes), what)
        if not is_true():
            raise OSError(f"{what}: does not start here\n{self.log}")

    def _empty(self) -> None:
        """End all jobs, which slurmd would leave behind."""
        deadline = time.monotonic() + 3 * KILL_WAIT_S
        while self._ask("squeue", "-h") and time.monotonic() < deadline:
            self._ask("scancel", f"--user={_user()}")
            time.sleep(0.2)

    def _is_ready(self) -> bool:
        return self._ask("sinfo", "-h", "-o", "%t") == "idle"

    def _ask(self, *command: str) -> str:
        """Run a command that may fail, for example because nobody answers yet."""
        done = subprocess.run(
            command, env=self.env, capture_output=True, text=True, timeout=PATIENCE_S, check=False
        )
        return done.stdout.strip()


def _listeners(base: Path) -> list[int]:
    """Return who listens on a socket below `base`: a slurmstepd is known by nothing else."""
    rows = [line.split() for line in Path("/proc/net/unix").read_text().splitlines()[1:]]
    inodes = {f"socket:[{row[6]}]" for row in rows if row[-1].startswith(f"{base}/")}
    found = []
    for folder in Path("/proc").glob("[0-9]*/fd"):
        with contextlib.suppress(OSError):  # gone meanwhile, or somebody else's
            if inodes & {os.readlink(fd) for fd in folder.iterdir()}:
                found.append(int(folder.parent.name))
    return found


def _user() -> str:
    return pwd.getpwuid(os.geteuid()).pw_name


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
