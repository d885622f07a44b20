"""Rounds of a job that is killed: trainers, daemons, both, some of each, at any moment.

A round begins with a job that trains and saves in every step. Somebody is killed, the rest of the
ranks is ended as a launcher ends them, dead daemons are started again, and the job starts again on
another number of ranks. Then it must go on from no earlier than what was promised.
"""

from __future__ import annotations

import contextlib
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from ckptd.engine.lifetime import EXIT_UNFINISHED
from ckptd.model.keys import StepId
from ckptd.units import MIB
from tests.fakes.footprints import Footprint, has_work
from tests.fakes.jobs import Daemon, Place, Rank, Ranks, all_do, new_place, state_of, wait_until
from tests.fakes.soak_jobs import Book, Job, Row
from tests.fakes.soak_plans import ROUNDS, Ground, Plan, Strike
from tests.fakes.soak_store import Ledger

MOST_SAVES = 12  # a failpoint that nobody came to by then is not waited for
COMMIT_TIMEOUT_S = 60.0
DRAIN_S = 0.5
MOST_RANKS = 4
FDS = 6  # what a daemon may keep open for a root, beyond what it had before its first client
PRIVATE_BYTES = 256 * MIB


class Root:
    """A root through several rounds, with the nodes of its job.

    The next attempt must come back with no earlier step than was `certain`, whatever happens, and
    than was `held`, as long as no daemon dies.

    Attributes:
        job: what trains, and `resumed` what it came back with, from `source`.
        most: what a daemon held at most that had lived through a kill.
    """

    def __init__(self, place: Place, ranks: Ranks, first: Plan) -> None:
        self.place = place
        self.ground = Ground.of(first.seed)
        self.seed = first.seed // ROUNDS
        self.ledger = Ledger(place.root)
        self.most = Footprint(0, 0, 0, 0, 0)
        self.is_finished = False
        self._ranks = ranks
        self._nodes: dict[int, Daemon] = {}
        self._fresh: dict[int, Footprint] = {}  # by pid
        self._stalled: set[int] = set()  # pids of those that hang, or are to
        self._worlds: dict[int, int] = {}
        self._certain: StepId | None = None
        self._held: StepId | None = None
        numbers = range(self.ground.nodes)
        self._start_nodes({number: self._point_at(first, number) for number in numbers})
        self._sees: StepId | None = None
        self.resumed: StepId | None = None
        self.job, self.source = self._restart(first)
        self._arm(first)

    # --- a round -------------------------------------------------------------------------------

    def round(self, plan: Plan, following: Plan, *, is_last: bool) -> Row:
        """Strike the job, start it again as the next plan says, and check what came back."""
        began_s = time.monotonic()
        struck, strike = self.job, plan.strike
        struck.march(self.seed, plan)
        has_lost_node = self._strike(strike, struck, random.Random(plan.seed))
        book = struck.book
        # A rank whose own operation hangs has one slot less: while the others wait it goes on in the other
        # one, over what they hold. Then the newest checkpoint is all that is safe.
        has_hole = strike.stall.startswith("rank.put")
        self._learn(struck, book, has_lost_node=has_lost_node or has_hole)
        stalled = set(self._stalled)
        coming = None if is_last else following
        self._mend_nodes(coming)
        if plan.stumble_s is not None:
            self._stumble(following, plan.stumble_s)
        self.job, self.source = self._restart(following)
        self._replace(stalled, coming)
        self._arm(coming)
        resumed = self.resumed
        last = max(book.begun, struck.next_step - 1)
        return Row(
            plan.seed, plan.kind, plan.ranks, self.ground.nodes, self.ground.slots, _name(strike),
            bool(strike.point), strike.rides, plan.stumble_s is not None,
            max(0, last - (resumed.step if resumed else 0)), resumed.short if resumed else "none",
            self.source, len(self.ledger.committed), self.most, time.monotonic() - began_s,
        )  # fmt: skip

    def _strike(self, strike: Strike, job: Job, dice: random.Random) -> bool:
        """Kill whom it hits, then all ranks; tell whether a daemon's memory is gone."""
        victims: list[Rank | Daemon] = [job.ranks[number] for number in strike.ranks]
        victims += [self._nodes[number] for number in strike.nodes]
        dice.shuffle(victims)
        self._await_moment(strike, job)
        for victim in victims:
            with contextlib.suppress(ProcessLookupError):  # dead at its failpoint
                victim.send(signal.SIGKILL)
        for number in strike.nodes:
            self._nodes[number].wait()
        for number, node in self._nodes.items():
            assert number in strike.nodes or node.is_running, (node.popen.returncode, node.text)
        time.sleep(strike.gap_s)
        is_ridden = strike.rides and not strike.ranks
        if is_ridden:
            self._ride(strike, job)
        job.kill()
        return bool(strike.nodes) and not is_ridden

    def _await_moment(self, strike: Strike, job: Job) -> None:
        first = job.next_step

        def has_begun(saves: int) -> bool:
            book = job.book
            return book.latest >= first + saves - 1 or bool(book.stopped)

        if not strike.point:
            wait_until(lambda: has_begun(strike.saves), "saves begin")
            time.sleep(strike.delay_s)
            assert not job.book.stopped, job.book.stopped
            return
        victim = job.ranks[strike.ranks[0]] if strike.trainer_point else None
        wait_until(
            lambda: has_begun(MOST_SAVES)
            or (state_of(victim.pid) in ("Z", "") if victim is not None
                else not self._nodes[strike.nodes[0]].is_running),
            f"{strike.point} strikes",
        )  # fmt: skip

    def _ride(self, strike: Strike, job: Job) -> None:
        """Start daemons again under ranks that train on: nothing may be lost by it."""
        self._start_nodes(dict.fromkeys(strike.nodes, ""))
        latest = job.book.latest

        def is_over() -> bool:
            book = job.book
            assert not book.stopped, book.stopped
            return book.committed > latest

        wait_until(is_over, "the job goes on with another daemon")

    # --- starting ------------------------------------------------------------------------------

    def _restart(self, plan: Plan) -> tuple[Job, str]:
        """Start the job; it comes back from where it must, with what it must."""
        job = self._begin(plan)
        found = all_do(job.ranks, "resume")
        assert found == [found[0]] * plan.ranks, found
        (source,) = set(all_do(job.ranks, "whence"))
        least = max(filter(None, [self._certain, self._held]), default=None)
        self.resumed = None if found[0] is None else StepId(found[0]["attempt"], found[0]["step"])
        assert (self.resumed or (0, 0)) >= (least or (0, 0)), (
            f"came back at {self.resumed}, and {least} was safe "
            f"(certain {self._certain}, held {self._held})"
        )
        if self.resumed is not None:
            where = {"seed": self.seed, **self.resumed._asdict()}
            assert all_do(job.ranks, "strays", **where) == [[]] * plan.ranks, self.resumed
            self._held = self.resumed
            job.next_step = self.resumed.step + 1
        self.ledger.look()
        return job, source or "none"

    def _arm(self, plan: Plan | None) -> None:
        if plan is not None and plan.strike.trainer_point:
            self.job.ranks[plan.strike.ranks[0]].do("arm", spec=plan.strike.trainer_point)

    def _begin(self, plan: Plan) -> Job:
        """Start ranks up to their Checkpointers."""
        ranks = self.place.job(self._ranks, plan.ranks)
        for number, rank in enumerate(ranks):
            node = self._nodes[(number + plan.swapped) % len(self._nodes)]
            rank.do("setenv", CKPTD_SOCKET=node.socket)
        (ordinal,) = set(
            all_do(
                ranks, "open", root=self.place.root, slots=self.ground.slots,
                commit_timeout_s=COMMIT_TIMEOUT_S,
            )
        )  # fmt: skip
        self._worlds[ordinal] = plan.ranks
        self.ledger.begin_attempt(ordinal, self._sees)
        all_do(ranks, "build", width=self.ground.width)
        all_do(ranks, "take", name="rng")
        all_do(ranks, "put", mark="")
        journals = [self.place.base / f"journal-{ordinal}-{n}" for n in range(plan.ranks)]
        return Job(ranks, ordinal, journals)

    def _stumble(self, plan: Plan, after_s: float) -> None:
        """Start an attempt that is killed while it comes back."""
        job = self._begin(plan)
        for rank in job.ranks:
            rank.order("resume")
        time.sleep(after_s)
        job.kill()

    def _learn(self, job: Job, book: Book, *, has_lost_node: bool) -> None:
        """Note what is safe now."""
        self._sees, whole = self.ledger.glance(self._worlds)
        safe = [self._certain, job.id_of(book.committed), whole]
        self._certain = max(filter(None, safe), default=None)
        handed_off = job.id_of(book.handed_off)
        self._held = None if has_lost_node else handed_off or self._held

    # --- nodes ---------------------------------------------------------------------------------

    @staticmethod
    def _point_at(plan: Plan | None, number: int) -> str:
        """Return the failpoint that a daemon is to come to in a round, if there is another one."""
        if plan is None:
            return ""
        strike = plan.strike
        if strike.stall and number == 0:
            return strike.stall
        return strike.daemon_point if strike.nodes[:1] == (number,) else ""

    def _start_nodes(self, points: dict[int, str]) -> None:
        """Start daemons, each with the failpoint that it is to die at."""
        for number, point in points.items():
            self._nodes[number] = self.place.start_daemon(
                "ab"[number], failpoints=point, CKPTD_DRAIN_S=str(DRAIN_S), CKPTD_TRIM_S="0"
            )
        for number, point in points.items():
            node = self._nodes[number].wait_serving()
            self._fresh[node.pid] = Footprint.of(node)
            if "=hang" in point:
                self._stalled.add(node.pid)

    def _mend_nodes(self, following: Plan | None) -> None:
        """Start dead daemons again, and those that are to come to a failpoint in the next round.

        The latter end as for an upgrade: they store what they have, and their memory is gone. One that
        hangs is kept, as the job is to come back from its memory.
        """
        points = {}
        for number, node in self._nodes.items():
            point = self._point_at(following, number)
            if not node.is_running:
                points[number] = point
            elif point and node.pid not in self._stalled:
                self._end(node)
                points[number] = point
            else:
                self._check_footprint(node)
        self._start_nodes(points)

    def _replace(self, stalled: set[int], following: Plan | None) -> None:
        """Replace daemons that hang, under a job that has come back."""
        points = {}
        for number, node in self._nodes.items():
            if node.pid in stalled and node.is_running:
                self._end(node)
                points[number] = self._point_at(following, number)
        self._start_nodes(points)

    def _end(self, node: Daemon) -> None:
        node.send(signal.SIGTERM)
        if _wait(node) == EXIT_UNFINISHED:
            self._held = None  # it waits for ranks elsewhere, who are dead; or it hangs

    def _check_footprint(self, node: Daemon) -> None:
        """Check that a daemon that lives on holds no more than it may."""
        fresh = self._fresh[node.pid]

        def is_small() -> bool:
            found = Footprint.of(node)
            self.most = Footprint(*map(max, zip(self.most, found, strict=True)))
            return found.fds <= fresh.fds + FDS and found.arenas <= MOST_RANKS

        wait_until(is_small, f"descriptors go: {fresh}, then {Footprint.of(node)}")
        assert Footprint.of(node).private_bytes < PRIVATE_BYTES

    # --- the end -------------------------------------------------------------------------------

    def finish(self, plan: Plan) -> None:
        """Let the job come to its end; nothing is left of it but checkpoints."""
        ranks = self.job.ranks
        last = self.job.next_step + 1
        self.job.march(self.seed, plan, count=2)
        for rank in ranks:
            assert rank.answer() == {"value": last}, rank.text
        all_do(ranks, "close")
        for rank in ranks:
            rank.clear()
        for node in self._nodes.values():
            self._await_empty(node)
            node.send(signal.SIGTERM)
        for node in self._nodes.values():
            _wait(node)
        self.is_finished = True
        self.ledger.check_all()
        assert self.ledger.newest == StepId(self.job.ordinal, last)
        assert self.place.temporary_files() == []

    def _await_empty(self, node: Daemon) -> None:
        """Wait until a daemon whose jobs are over holds nothing of theirs."""
        wait_until(lambda: not has_work(node.socket), "daemons have nothing to do")
        fresh = self._fresh[node.pid]

        def is_empty() -> bool:
            found = Footprint.of(node)
            return found.fds <= fresh.fds + FDS and (found.arenas, found.mapped_bytes) == (0, 0)

        wait_until(is_empty, f"memory goes: {fresh}, then {Footprint.of(node)}")


def _wait(node: Daemon) -> int:
    """Return the exit code of a daemon that was told to go."""
    code = node.wait()
    assert code in (0, EXIT_UNFINISHED), node.text
    return code


def _name(strike: Strike) -> str:
    """Say whom it hits, and when."""
    whom = [f"r{n}" for n in strike.ranks] + [f"d{n}" for n in strike.nodes]
    when = strike.point or f"save {strike.saves} + {strike.delay_s * 1e3:.0f} ms"
    more = ", ridden" if strike.rides else f", {strike.stall}" if strike.stall else ""
    return f"{' '.join(whom)} at {when}{more}"


class RoundError(Exception):
    """A round failed: `seed`, in a root that began with the round `first`."""

    def __init__(self, seed: int, first: int) -> None:
        super().__init__(f"the round of seed {seed} failed, in a root that began with {first}")
        self.seed = seed
        self.first = first


def run_rounds(
    seed: int, rounds: int, ranks: Ranks, *, keep: Path | None = None,
    is_over: Callable[[], bool] = lambda: False,
) -> Iterator[Row]:  # fmt: skip
    """Run the rounds `seed`, `seed` + 1 and so on, until `is_over`; those of one root in a row.

    Raises:
        RoundError: something that was promised does not hold. The logs are copied to `keep`.
    """
    end, at = seed + rounds, seed
    while at < end and not is_over():
        first, until = at, min(end, (at // ROUNDS + 1) * ROUNDS)
        try:
            with new_place() as place, _keeping_logs(place, keep):
                root = Root(place, ranks, Plan.of(first))
                while not root.is_finished:
                    plan, following = Plan.of(at), Plan.of(at + 1)
                    is_last = at + 1 == until or is_over()
                    row = root.round(plan, following, is_last=is_last)
                    if is_last:
                        root.finish(following)
                    yield row
                    at += 1
        except Exception as error:
            raise RoundError(min(at, until - 1), first) from error


@contextlib.contextmanager
def _keeping_logs(place: Place, keep: Path | None) -> Iterator[None]:
    """Copy logs, journals and the names of all objects if the block fails."""
    try:
        yield
    except Exception:
        if keep is not None:
            keep.mkdir(parents=True, exist_ok=True)
            for path in filter(Path.is_file, place.base.iterdir()):
                shutil.copy2(path, keep)
            names = sorted(str(path) for path in Path(place.root).rglob("*") if path.is_file())
            (keep / "root.txt").write_text("\n".join(names))
        raise
