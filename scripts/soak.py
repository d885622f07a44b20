"""Kill trainers, daemons, both and some of each at random moments, again and again.

After each kill the job starts again on another number of ranks, and must come back with what was
safe; every checkpoint that is listed is read and hashed, and nothing may be left behind. What a round
does follows from its seed: one that failed can be run alone.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))

from rich.console import Console  # noqa: E402
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn  # noqa: E402
from rich.table import Table  # noqa: E402

from tests.fakes.cycles import Sample, crash_daemons, crash_trainers  # noqa: E402
from tests.fakes.jobs import Ranks, new_place  # noqa: E402
from tests.fakes.soak import RoundError, run_rounds  # noqa: E402
from tests.fakes.soak_jobs import Row  # noqa: E402
from tests.fakes.soak_plans import KINDS  # noqa: E402

MIB = 1 << 20
TRAINERS_PER_DAEMON = 20  # a daemon takes that much longer to start


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/soak", description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=200, help="how many (200)")
    parser.add_argument("--seed", type=int, default=0, help="of the first round (0)")
    parser.add_argument("--minutes", type=float, help="begin no new round after so long")
    parser.add_argument(
        "--cycles", type=int,
        help="in place of rounds: so many trainers that die, and a daemon for every "
        f"{TRAINERS_PER_DAEMON} of them",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print one JSON document at the end")
    parser.add_argument(
        "--out", type=Path, default=PROJECT / "soak-out", help="where logs of a failed round go"
    )
    return parser.parse_args()


class Soak:
    """Runs what was asked for, and shows it."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        # Where JSON is asked for it is all that goes to the standard output.
        is_plain = not sys.stdout.isatty()
        self.console = Console(
            stderr=options.json, width=120 if is_plain else None, highlight=False
        )
        self.began_s = time.monotonic()

    def is_over(self) -> bool:
        minutes = self.options.minutes
        return minutes is not None and time.monotonic() - self.began_s > 60 * minutes

    # --- rounds ----------------------------------------------------------------------------------

    def rounds(self) -> int:
        """Run rounds; return the exit code."""
        rows: list[Row] = []
        failed: RoundError | None = None
        ranks = Ranks()
        try:
            found = run_rounds(
                self.options.seed, self.options.rounds, ranks, keep=self.options.out,
                is_over=self.is_over,
            )  # fmt: skip
            for row in self._with_bar(found, self.options.rounds):
                rows.append(row)
                self.console.print(_line(row), soft_wrap=True)
        except RoundError as error:
            failed = error
            traceback.print_exception(error.__cause__)
        finally:
            ranks.close()
        self._show(rows)
        if failed is not None:
            self._explain(failed)
        if self.options.json:
            print(json.dumps({
                "rounds": [row._asdict() for row in rows],
                "failed": None if failed is None else failed.seed,
            }))  # fmt: skip
        return 0 if failed is None else 1

    def _with_bar(self, rows: Iterable[Row], total: int) -> Iterator[Row]:
        columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        is_shown = self.console.is_terminal
        with Progress(*columns, console=self.console, transient=True, disable=not is_shown) as bar:
            task = bar.add_task("", total=total)
            for row in rows:
                yield row
                bar.advance(task)

    def _show(self, rows: list[Row]) -> None:
        if not rows:
            return
        table = Table(title="Rounds by who was killed", title_justify="left", title_style="bold")
        for name in ("", "rounds", "at a failpoint", "from memory", "from the store", "anew"):
            table.add_column(name, justify="right" if name else "left")
        lost = sorted({row.lost for row in rows})
        for steps in lost:
            table.add_column(f"lost {steps}", justify="right")
        for kind in (*KINDS, "all"):
            these = [row for row in rows if kind in ("all", row.kind)]
            sources = Counter(row.source for row in these)
            steps = Counter(row.lost for row in these)
            table.add_row(
                kind, str(len(these)), str(sum(row.is_at_point for row in these)),
                *(str(sources[name]) for name in ("memory", "store", "none")),
                *(str(steps[count]) for count in lost), end_section=kind == KINDS[-1],
            )  # fmt: skip
        self.console.print(table)
        rides, stumbles = sum(r.is_ridden for r in rows), sum(r.has_stumbled for r in rows)
        self.console.print(
            f"{len(rows)} rounds in {time.monotonic() - self.began_s:.0f} s; {rides} times the job "
            f"went on with new daemons, {stumbles} times another kill came in its restart.\n"
            f"A daemon that lived on had at most {max(r.most.arenas for r in rows)} arenas and "
            f"{max(r.most.private_bytes for r in rows) / MIB:.0f} MiB of its own.\n"
            "lost: saves that all ranks had begun and that did not come back."
        )

    def _explain(self, failed: RoundError) -> None:
        alone = f"scripts/soak --seed {failed.seed} --rounds 1"
        whole = f"scripts/soak --seed {failed.first} --rounds {failed.seed - failed.first + 1}"
        self.console.print(
            f"[bold red]the round of seed {failed.seed} FAILED[/]; logs: {self.options.out}\n"
            f"alone:                            {alone}\n"
            f"with what its root held by then:  {whole}"
        )

    # --- cycles ----------------------------------------------------------------------------------

    def cycles(self, count: int) -> int:
        """Crash trainers and daemons; return the exit code."""
        ranks = Ranks()
        parts: dict[str, Callable[[], int]] = {
            "a daemon whose trainers die": lambda: self._trainers(count),
            "a trainer whose daemons die": lambda: self._daemons(
                ranks, max(1, count // TRAINERS_PER_DAEMON)
            ),
        }
        try:
            for name, part in parts.items():
                self.console.print(f"[bold]{name}[/]")
                self.console.print(f"after {part()} crashes: nothing left")
        except AssertionError:
            traceback.print_exc()
            return 1
        finally:
            ranks.close()
        self.console.print(f"took {time.monotonic() - self.began_s:.0f} s")
        return 0

    def _trainers(self, count: int) -> int:
        with new_place() as place:
            return self._tell(crash_trainers(place, count))

    def _daemons(self, ranks: Ranks, count: int) -> int:
        with new_place() as place:
            return self._tell(crash_daemons(place, ranks, count))

    def _tell(self, samples: Iterable[Sample]) -> int:
        crashes = 0
        for crashes, held in samples:
            self.console.print(
                f"{crashes:5} crashes: {held.fds} descriptors, {held.arenas} arenas of "
                f"{held.arena_bytes} bytes, {held.mapped_bytes} mapped, "
                f"{held.private_bytes / MIB:.1f} MiB"
            )
        return crashes


def _line(row: Row) -> str:
    return (
        f"{row.seed:5} {row.kind:7} {row.ranks} ranks on {row.nodes}: {row.struck:42}"
        f" back at {row.resumed:8} {row.source:6} lost {row.lost} {row.seconds:5.1f} s"
    )


def main() -> int:
    options = parse_options()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    soak = Soak(options)
    return soak.cycles(options.cycles) if options.cycles else soak.rounds()


if __name__ == "__main__":
    sys.exit(main())
