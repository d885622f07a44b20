"""Daemons and trainers as real processes, in a place of their own that must be empty afterwards."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ckptd.store.local import LocalStore
from ckptd.wire.address import is_serving

REPOSITORY = Path(__file__).parent.parent.parent
PATIENCE_S = 60.0  # what a busy machine may need; nothing waits that long unless something is wrong

# What `ckptd daemon` runs, without the time that the command line takes to start.
_SERVE = """
import os, sys
from ckptd.config import daemon_config
from ckptd.daemon.process import main, set_up_log
config = daemon_config(os.environ, socket=sys.argv[1], is_on_demand=sys.argv[2] == "on-demand")
set_up_log(config.log_level)
sys.exit(main(config, os.environ))
"""


def wait_until(is_true: Callable[[], Any], what: str, timeout_s: float = PATIENCE_S) -> Any:
    """Return the first true answer; fail if there is none in time."""
    deadline = time.monotonic() + timeout_s
    while not (answer := is_true()):
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {timeout_s:.0f} s in vain: {what}")
        time.sleep(0.005)
    return answer


class Process:
    """A process in a session of its own, whose output goes to a file."""

    def __init__(
        self, command: list[str], env: dict[str, str], log: Path, *, pass_fds: Sequence[int] = ()
    ) -> None:  # fmt: skip
        self.log = log
        with log.open("ab") as out:
            self.popen = subprocess.Popen(
                command, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=out,
                cwd="/", start_new_session=True, pass_fds=pass_fds,
            )  # fmt: skip
        self.pid = self.popen.pid

    @property
    def is_running(self) -> bool:
        return self.popen.poll() is None

    @property
    def text(self) -> str:
        """What it wrote to its log so far."""
        return self.log.read_text(errors="replace")

    def send(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        """Kill it the hard way, and wait for its end."""
        self.send(signal.SIGKILL)
        self.wait()

    def wait(self, timeout_s: float = PATIENCE_S) -> int:
        """Return the exit code; the number of the signal, negative, where one ended it."""
        return self.popen.wait(timeout_s)

    def end(self) -> int:
        """Ask it to go, as an operator does; return the exit code."""
        if self.is_running:
            self.send(signal.SIGTERM)
        return self.wait()

    def is_stopped(self) -> bool:
        return state_of(self.pid) == "T"

    def fd_count(self) -> int:
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    def resident_bytes(self) -> int:
        text = Path(f"/proc/{self.pid}/status").read_text()
        return int(text.split("VmRSS:")[1].split()[0]) * 1024

    def cpu_s(self) -> float:
        """Processor time of all its threads so far."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Daemon(Process):
    """A daemon that listens on `socket`."""

    def __init__(
        self, command: list[str], env: dict[str, str], log: Path, socket: str, *,
        pass_fds: Sequence[int] = (),
    ) -> None:  # fmt: skip
        super().__init__(command, env, log, pass_fds=pass_fds)
        self.socket = socket

    def wait_serving(self) -> Daemon:
        wait_until(lambda: not self.is_running or is_serving(self.socket), f"{self.log} serves")
        assert self.is_running, self.text
        return self


class Script(Process):
    """A script that says what it sees, one JSON object a line."""

    def until(self, key: str) -> dict[str, Any]:
        """Skip to the line that has `key`."""
        assert self.popen.stdout is not None
        for line in self.popen.stdout:
            if key in (found := json.loads(line)):
                return found
        raise AssertionError(f"no line with {key!r}:\n{self.text}")


class Ranks:
    """Starts ranks: a process that has imported torch, and forks."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.settimeout(PATIENCE_S)
        self._control = ours
        env = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
        with theirs:
            self._popen = subprocess.Popen(
                [sys.executable, str(REPOSITORY / "tests/system/worker.py"), str(theirs.fileno())],
                env=env, pass_fds=[theirs.fileno()], start_new_session=True,
            )  # fmt: skip

    def fork(self, talk: socket.socket, env: dict[str, str], log: Path) -> int:
        order = json.dumps({"env": env, "log": str(log)}).encode()
        socket.send_fds(self._control, [order], [talk.fileno()])
        return json.loads(self._control.recv(1024))

    def wait(self, pid: int) -> int:
        self._control.send(json.dumps({"wait": pid}).encode())
        return json.loads(self._control.recv(1024))

    def close(self) -> None:
        self._control.close()
        self._popen.wait(PATIENCE_S)


class Rank:
    """A rank of a real job, which does what it is told."""

    def __init__(self, ranks: Ranks, env: dict[str, str], log: Path) -> None:
        self._ranks = ranks
        self.log = log
        ours, theirs = socket.socketpair()
        with theirs:
            self.pid = ranks.fork(theirs, env, log)
        ours.settimeout(PATIENCE_S)
        self._talk = ours
        self._lines = ours.makefile("rw", buffering=1)
        self._code: int | None = None

    @property
    def text(self) -> str:
        """What it wrote to its log so far."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def order(self, what: str, **details: Any) -> None:
        """Tell it what to do, and do not wait."""
        with contextlib.suppress(BrokenPipeError):
            self._lines.write(json.dumps({"do": what, **details}) + "\n")
            self._lines.flush()

    def answer(self) -> dict[str, Any]:
        """Wait for the answer to the oldest order; an empty object if the process is dead."""
        try:
            line = self._lines.readline()
        except ConnectionResetError:
            line = ""
        return json.loads(line) if line else {}

    def do(self, what: str, **details: Any) -> Any:
        """Tell it what to do; return what comes of it. It must work."""
        self.order(what, **details)
        said = self.answer()
        assert "value" in said, f"{what}: {said}\n{self.text}"
        return said["value"]

    def fail(self, what: str, **details: Any) -> dict[str, Any]:
        """Tell it to do what cannot work; return the error."""
        self.order(what, **details)
        said = self.answer()
        assert "error" in said, f"{what}: {said}"
        return said

    def send(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        """Kill it, if it was not waited for already."""
        if self._code is None:
            self.send(signal.SIGKILL)
            self.wait()

    def wait(self) -> int:
        """Return the exit code; the number of the signal, negative, where one ended it."""
        if self._code is None:
            self._code = self._ranks.wait(self.pid)
        return self._code

    def end(self) -> int:
        """Let the script come to its end."""
        self.order("exit")
        return self.wait()

    def clear(self) -> None:
        self.kill()
        with contextlib.suppress(OSError):
            self._lines.close()
        self._talk.close()


def all_do(ranks: Sequence[Rank], what: str, **details: Any) -> list[Any]:
    """Tell several ranks to do something together."""
    for rank in ranks:
        rank.order(what, **details)
    said = [rank.answer() for rank in ranks]
    assert all("value" in each for each in said), f"{what}: {said}"
    return [each["value"] for each in said]


def all_fail(ranks: Sequence[Rank], what: str, **details: Any) -> list[dict[str, Any]]:
    """Tell several ranks to do together what cannot work; return the errors."""
    for rank in ranks:
        rank.order(what, **details)
    said = [rank.answer() for rank in ranks]
    assert all("error" in each for each in said), f"{what}: {said}"
    return said


class Place:
    """A runtime directory, a root, and the processes that were started for them."""

    def __init__(self, base: Path) -> None:
        self.base = base
        self.runtime = base / "run"
        self.runtime.mkdir(mode=0o700)
        self.root = str(base / "root")
        self.processes: list[Process] = []
        self.ranks: list[Rank] = []

    def env(self, **more: str) -> dict[str, str]:
        ours = ("CKPTD_", "XDG_", "NOTIFY_", "LISTEN_")
        kept = {k: v for k, v in os.environ.items() if not k.startswith(ours)}
        return {
            **kept, "CKPTD_RUNTIME_DIR": str(self.runtime), "PYTHONPATH": str(REPOSITORY),
            "PYTHONWARNINGS": "default", "OMP_NUM_THREADS": "1", "CKPTD_NICE": "0", **more,
        }  # fmt: skip

    def socket(self, name: str = "d") -> str:
        return str(self.runtime / f"{name}.sock")

    def daemon(
        self, name: str = "d", *, failpoints: str = "", is_on_demand: bool = False, **env: str
    ) -> Daemon:
        """Start a daemon in the foreground and wait until it listens."""
        return self.start_daemon(
            name, failpoints=failpoints, is_on_demand=is_on_demand, **env
        ).wait_serving()

    def start_daemon(
        self, name: str = "d", *, failpoints: str = "", is_on_demand: bool = False, **env: str
    ) -> Daemon:
        """Start a daemon and do not wait."""
        socket = name if name.startswith("/") else self.socket(name)
        kind = "on-demand" if is_on_demand else "service"
        daemon = Daemon(
            [sys.executable, "-c", _SERVE, socket, kind],
            self.env(CKPTD_DAEMON_FAILPOINTS=failpoints, **env),
            self.base / f"{Path(socket).stem}.log",
            socket,
        )
        self.processes.append(daemon)
        return daemon

    def rank(self, ranks: Ranks, **env: str) -> Rank:
        """Start a training script of one rank."""
        rank = Rank(ranks, self.env(**env), self.base / f"rank-{len(self.ranks)}.log")
        self.ranks.append(rank)
        return rank

    def job(self, ranks: Ranks, world_size: int, **env: str) -> list[Rank]:
        """Start the ranks of a job, which have met."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        found = [
            self.rank(
                ranks, RANK=str(number), WORLD_SIZE=str(world_size), LOCAL_RANK=str(number),
                LOCAL_WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1", MASTER_PORT=port, **env,
            )
            for number in range(world_size)
        ]  # fmt: skip
        if world_size > 1:
            all_do(found, "join")
        return found

    def run(self, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
        """Run the command line."""
        return subprocess.run(
            [sys.executable, "-m", "ckptd", *arguments], env=self.env(**env), cwd="/",
            capture_output=True, text=True, timeout=PATIENCE_S, check=False,
        )  # fmt: skip

    def store(self) -> LocalStore:
        return LocalStore(self.root)

    # --- what is left ---------------------------------------------------------------------------

    def pids(self) -> list[int]:
        """Return the processes that run for this place, whoever started them."""
        return [pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if self._has(pid)]

    def sockets(self) -> list[str]:
        return [p.name for p in self.runtime.iterdir() if stat.S_ISSOCK(p.lstat().st_mode)]

    def temporary_files(self) -> list[str]:
        """Return what below the root is no object: what a writer left."""
        found = [str(p) for p in Path(self.root).rglob(".*")]
        return found + [str(p) for p in (Path(self.root) / "tmp").glob("*")]

    def assert_empty(self) -> None:
        """Check that no process and no socket is left. Daemons that go may take a moment."""
        # A daemon that forks while /proc is read is not seen, but its socket is.
        wait_until(
            lambda: not self.pids() and not self.sockets(),
            f"processes and sockets of {self.base} go", 20.0,
        )  # fmt: skip

    def clear(self) -> None:
        """End everything the hard way."""
        for rank in self.ranks:
            rank.clear()
        for pid in self.pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for process in self.processes:
            process.popen.wait()
            if process.popen.stdout is not None:
                process.popen.stdout.close()
        wait_until(lambda: not self.pids(), "killed processes are gone", 20.0)

    def _has(self, pid: int) -> bool:
        try:
            environment = Path(f"/proc/{pid}/environ").read_bytes()
        except OSError:  # gone meanwhile, or somebody else's
            return False
        return f"={self.runtime}".encode() in environment and state_of(pid) != "Z"


def state_of(pid: int) -> str:
    """Return the letter of /proc for a process's state; empty once it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


@contextlib.contextmanager
def new_place() -> Iterator[Place]:
    """Give a place for the block. At its end every process that still runs is asked to go.

    Fails if one does not go, or if one that nobody knows of or a socket is left behind.
    """
    base = Path(tempfile.mkdtemp(prefix="ckptd-", dir="/tmp"))  # sockets need short paths
    place = Place(base)
    try:
        yield place
        for rank in place.ranks:
            rank.clear()
        for process in place.processes:
            if process.is_running:
                assert process.end() in (0, -signal.SIGTERM), process.text
        place.assert_empty()
    finally:
        place.clear()
        shutil.rmtree(base)
