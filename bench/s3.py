"""PUT and GET of the same objects by S3 clients, by torch's own writers, and by ckptd.

All take turns against one server: moto, started here, or one that is named.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from bench import s3_clients, s3_jobs
from bench.memory import OwnPeak, cpu_s
from bench.peers import version_of
from bench.runtime import PROJECT, runtime_dir
from bench.s3_clients import Client
from bench.s3_place import Place, PlaceError, open_place
from bench.s3_table import Sample, is_sound, row_of, show

OBJECT_BYTES = 32 << 20  # ckptd's chunks
SLOTS = "memfd:ckptd-arena"  # what trainer and daemon share
CLIENTS: list[type[Client]] = [
    s3_clients.Floor, s3_clients.Boto3, s3_clients.S3fsPipe, s3_clients.S3fsFile,
    s3_jobs.DcpFsspec, s3_jobs.DcpS3torch, s3_clients.Obstore, s3_clients.ObstoreFsspec,
    s3_jobs.CkptdClient, s3_jobs.CkptdObstoreClient, s3_jobs.Ckptd, s3_jobs.CkptdObstore,
    s3_jobs.CkptdAuto,
]  # fmt: skip
VERSIONS = ("boto3", "aiobotocore", "s3fs", "obstore", "s3torchconnector", "torch", "moto")


def parse_options(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="scripts/bench s3",
        description="PUT and GET of the same incompressible bytes by S3 clients in turns. Without "
        "--endpoint and --bucket a server is started on this machine; it shares the cores.",
    )
    parser.add_argument("--endpoint", help="URL of a server that runs (credentials: as for AWS)")
    parser.add_argument("--bucket", help="a bucket that exists; without --endpoint it is AWS's")
    parser.add_argument("--mb", type=int, help="MiB in each turn, as objects of 32 (1024; 256)")
    parser.add_argument("--rounds", type=int, help="turns of each client that count (5; 3)")
    parser.add_argument("--only", help="names with commas: " + ", ".join(c.name for c in CLIENTS))
    parser.add_argument("--window", type=int, help="MiB that ckptd-client reads in one request")
    parser.add_argument("--quick", action="store_true", help="256 MiB, 3 rounds")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    options = parser.parse_args(arguments)
    options.mb = options.mb or (256 if options.quick else 1024)
    options.rounds = options.rounds or (3 if options.quick else 5)
    if options.mb < 1 or options.rounds < 1:
        parser.error("--mb and --rounds are at least 1")
    if options.window is not None:
        s3_jobs.CkptdClient.window_bytes = max(1, options.window) << 20
    return options


def choose(names: str | None) -> list[type[Client]]:
    """Return the clients of these names, all without names.

    Raises:
        ValueError: there is no client of a name.
    """
    if names is None:
        return CLIENTS
    wanted = [name.strip() for name in names.split(",")]
    known = {client.name: client for client in CLIENTS}
    if strange := [name for name in wanted if name not in known]:
        raise ValueError(f"no client {strange[0]!r}; there are {', '.join(known)}")
    return [client for name, client in known.items() if name in wanted]


class Turn(NamedTuple):
    """How long something took, and the processor seconds of client, helpers and server meanwhile."""

    seconds: float
    cpu_s: float
    server_cpu_s: float


class Bench:
    """The clients that still work, and what was measured of each."""

    def __init__(self, place: Place, mib: int, rounds: int, say: Callable[[str], None]) -> None:
        self.samples: dict[str, list[Sample]] = {}
        self.failed: dict[str, str] = {}
        self._place = place
        self._rounds = rounds
        self._say = say
        size = min(OBJECT_BYTES, (mib << 20) // 4)
        self.parts = [os.urandom(size) for _ in range((mib << 20) // size)]
        self._memory = memoryview(bytearray(size * len(self.parts)))
        self._out = [self._memory[at : at + size] for at in range(0, len(self._memory), size)]

    def run(self, kinds: Sequence[type[Client]]) -> None:
        """Measure; round 0 opens connections, fills slots and does not count."""
        clients = [client for kind in kinds if (client := self._open(kind))]
        try:
            for turn in range(self._rounds + 1):
                # Whoever comes after a client that stored less finds a server with less memory in use.
                for client in clients[turn % len(clients) :] + clients[: turn % len(clients)]:
                    if not self._guarded(client, lambda c=client, t=turn: self._take(c, t)):
                        clients.remove(client)
        finally:
            for client in clients:
                self._guarded(client, client.close)

    def _open(self, kind: type[Client]) -> Client | None:
        client = kind(self._place)
        self.samples[client.name] = []
        if client.needs is not None and version_of(client.needs) is None:
            self.failed[client.name] = f"{client.needs} is not installed"
            self._say(f"{client.name}: left out, {self.failed[client.name]}")
            return None
        return client if self._guarded(client, lambda: client.open(self.parts)) else None

    def _guarded(self, client: Client, act: Callable[[], object]) -> bool:
        """Do something with a client; if it cannot, its row says why and the rest goes on."""
        try:
            act()
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # noqa: BLE001 - DCP's CheckpointException is no Exception
            traceback.print_exc()
            lines = str(error).strip().splitlines() or [""]
            self.failed[client.name] = f"{type(error).__name__}: {lines[-1]}"[:200]
            self._say(f"{client.name}: failed, {self.failed[client.name]}")
            return False
        return True

    def _take(self, client: Client, turn: int) -> None:
        """Put everything once, read it back, compare and delete it."""
        before = client.place.sizes()
        with OwnPeak(client.pids, SLOTS) as rest:
            pass
        with OwnPeak(client.pids, SLOTS) as peak:
            put = self._timed(client, lambda: client.put(turn, self.parts))
        after = client.place.sizes()
        self._memory[:] = bytes(len(self._memory))
        found: list[Any] = []
        get = self._timed(client, lambda: found.extend(client.get(turn, self._out)))
        wanted = s3_jobs.expected(client, self.parts)
        is_same = len(found) == len(wanted) and all(map(_is_equal, found, wanted))
        sample = Sample(
            stored_bytes=sum(size for key, size in after.items() if key not in before),
            put_s=put.seconds, put_cpu_s=put.cpu_s, put_server_s=put.server_cpu_s,
            get_s=get.seconds, get_cpu_s=get.cpu_s, get_server_s=get.server_cpu_s,
            is_same=is_same, rest_bytes=rest.bytes, peak_bytes=peak.bytes,
        )  # fmt: skip
        if turn:
            self.samples[client.name].append(sample)
        rates = [sample.stored_bytes / 1e6 / span for span in (put.seconds, get.seconds)]
        self._say(
            f"round {turn}/{self._rounds}, {client.name}: "
            f"put {rates[0]:.0f} MB/s, get {rates[1]:.0f} MB/s"
            + ("" if is_same else ", NOT THE SAME BYTES")
            + ("" if turn else " (does not count)")
        )
        found.clear()
        client.discard(turn)

    def _timed(self, client: Client, act: Callable[[], object]) -> Turn:
        gc.collect()
        cpu, server = self._cpu_s(client), self._server_cpu_s()
        began = time.perf_counter()
        act()
        span_s = time.perf_counter() - began
        return Turn(span_s, self._cpu_s(client) - cpu, self._server_cpu_s() - server)

    @staticmethod
    def _cpu_s(client: Client) -> float:
        return time.process_time() + sum(cpu_s(pid) for pid in client.pids)

    def _server_cpu_s(self) -> float:
        return cpu_s(self._place.server_pid) if self._place.server_pid else 0.0


def _is_equal(found: Any, wanted: Any) -> bool:
    return bool(memoryview(found).cast("B") == memoryview(wanted).cast("B"))


def measure(options: argparse.Namespace, kinds: Sequence[type[Client]]) -> dict[str, Any]:
    """Return all figures: one row for each client."""

    def say(line: str) -> None:
        print(f"bench: {line}", file=sys.stderr, flush=True)

    logs = PROJECT / "bench-out"
    logs.mkdir(exist_ok=True)
    with (
        open_place(options.endpoint, options.bucket) as place,
        runtime_dir(logs, "s3.daemon") as runtime,
    ):
        os.environ["CKPTD_RUNTIME_DIR"] = str(runtime)  # where daemons are, and how they are known
        bench = Bench(place, options.mb, options.rounds, say)
        bench.run(kinds)
    rows = [row_of(kind, bench.samples[kind.name], bench.failed.get(kind.name)) for kind in kinds]
    return {
        "server": "moto, on this machine" if place.server_pid else place.endpoint or "AWS",
        "objects": len(bench.parts), "object_bytes": len(bench.parts[0]),
        "rounds": options.rounds, "cores": len(os.sched_getaffinity(0)),
        "versions": {name: version_of(name) for name in VERSIONS}, "clients": rows,
    }  # fmt: skip


def main(arguments: Sequence[str]) -> int:
    """Run the benchmark; 1 if ckptd failed or anything came back wrong."""
    options = parse_options(arguments)
    former = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what was made is taken away
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecations inside of the peers
            found = measure(options, choose(options.only))
    except (ValueError, PlaceError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    finally:
        signal.signal(signal.SIGTERM, former)
    show(Console() if sys.stdout.isatty() else Console(width=150), found)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0 if is_sound(found["clients"]) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
