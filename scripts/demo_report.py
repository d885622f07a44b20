"""What the demo prints and draws, from the journals of its jobs."""

from __future__ import annotations

import json
import re
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from demo_job import Event, Job
from rich.console import Console
from rich.table import Table

MIB = 1 << 20
STORY = ("main-4", "main-2", "main-1")
# Who went on from whose save, and which uninterrupted run its losses must equal.
RESUMES = (
    ("main-2", "main-4"),
    ("main-1", "main-2"),
    ("proof-4", "main-4"),
    ("reference-2", "main-4"),
    ("proof-2", "main-2"),
)
TWINS = (
    ("main-4", "reference-4", "4 ranks up to the kill = never interrupted"),
    ("proof-4", "reference-4", "4 ranks, killed and resumed = never interrupted"),
    ("main-2", "reference-2", "2 ranks up to the kill = never interrupted"),
    ("proof-2", "reference-2", "2 ranks, killed and resumed = never interrupted"),
)


class Proof(NamedTuple):
    """One thing that must hold, whether it does, and what was looked at."""

    claim: str
    holds: bool
    seen: str


class Report:
    """Tables about a finished demo."""

    def __init__(self, jobs: dict[str, Job], save_every: int, console: Console) -> None:
        self.jobs, self.save_every, self.console = jobs, save_every, console

    def show(self, listing: tuple[int, str], verified: tuple[int, str]) -> bool:
        """Print everything; tell whether every proof holds."""
        self.console.print(self.kills())
        self.console.print(self.pauses())
        self.console.print(self.shares())
        print(f"\n$ ckptd ls\n{listing[1].rstrip()}\n")  # whole lines, as the command wrote them
        proofs = [*self.resumed_bytes(), *self.equal_losses()]
        proofs.append(Proof("ckptd ls lists the root", listing[0] == 0, f"exit {listing[0]}"))
        proofs.append(all_verified(*verified))
        table = new_table("Proofs", "claim", "", "what was compared")
        for proof in proofs:
            verdict = "[green]holds[/]" if proof.holds else "[bold red]FAILS[/]"
            table.add_row(proof.claim, verdict, proof.seen)
        self.console.print(table)
        return all(proof.holds for proof in proofs)

    # --- tables --------------------------------------------------------------------------------

    def kills(self) -> Table:
        """Return where each job was killed, and what the next one lost by it."""
        table = new_table(
            "Kills and resumes", "job", "killed", "last step done", "resumed by", "at step", "lost"
        )
        for name, following in (("main-4", "main-2"), ("main-2", "main-1")):
            job, after = self.jobs[name], self.jobs[following]
            last, resumed = max(job.losses), after.first_step or 0
            lost = f"{last - resumed} steps"
            table.add_row(name, job.killed_in, str(last), following, str(resumed), lost)
        return table

    def pauses(self) -> Table:
        """Return what a save costs each rank, beside a bare copy of as many bytes.

        The first save of a job is left out of the medians and shown apart: the ranks are still
        agreeing on who writes what, and slots may still be untouched memory.
        """
        table = new_table(
            "Pause per save (medians in ms; ranks that share cores save in turn)",
            *("job", "rank", "saves", "pause", "bare copy", "ratio", "allowed", "first save"),
        )
        for name in STORY:
            for rank, journal in enumerate(self.jobs[name].journals):
                first, *rest = journal.all("saved") or [None]
                if not rest:
                    continue
                tensors = journal.all("saving")[-1]["tensors"] / self.jobs[name].ranks
                pause = median(e["pause_s"] for e in rest)
                bare = median(e["copy_s"] for e in rest)
                allowed = 1.3 * bare + max(0.002 * tensors / 1000, 0.003)
                colour = "green" if pause <= allowed else "yellow"
                table.add_row(
                    *(name, str(rank), str(len(rest)), f"[{colour}]{pause * 1e3:.2f}[/]"),
                    *(f"{bare * 1e3:.2f}", f"{pause / bare:.2f}", f"{allowed * 1e3:.2f}"),
                    f"{first['pause_s'] * 1e3:.2f}",
                )
        return table

    def shares(self) -> Table:
        """Return how much each rank wrote of the state, and what of it had to be stored."""
        table = new_table(
            "Bytes of the last whole save (MiB)",
            *("job", "state", "stored", "stored / raw", "written per rank", "share", "1/N"),
        )
        for name in STORY:
            job = self.jobs[name]
            done = job.journals[0].all("committed")
            if not done:
                continue
            raw, stored = done[-1]["bytes"], done[-1]["stored_bytes"]
            wrote = [j.all("saved")[-1]["captured_bytes"] for j in job.journals if j.all("saved")]
            table.add_row(
                *(name, f"{raw / MIB:.1f}", f"{stored / MIB:.1f}", f"{stored / raw:.3f}"),
                " ".join(f"{w / MIB:.2f}" for w in wrote),
                " ".join(f"{w / raw:.3f}" for w in wrote),
                f"{1 / job.ranks:.3f}",
            )
        return table

    # --- proofs --------------------------------------------------------------------------------

    def resumed_bytes(self) -> list[Proof]:
        """Compare what every rank of a resumed job held with what its predecessor saved."""
        proofs = []
        for name, source in RESUMES:
            job = self.jobs[name]
            events = [event for j in job.journals for event in j.all("resumed")]
            steps = {event["step"] for event in events}
            saved = {e["step"]: e["digest"] for e in self.jobs[source].journals[0].all("saving")}
            same = {event["digest"] for event in events} == {saved.get(min(steps, default=0))}
            holds = len(events) == job.ranks and len(steps) == 1 and same
            seen = f"step {sorted(steps)} on {len(events)} ranks: {_first_digest(events)}"
            proofs.append(Proof(f"{name} resumed, bit for bit, what {source} saved", holds, seen))
        return proofs

    def equal_losses(self) -> list[Proof]:
        """Compare the losses of each killed or resumed job with those of its twin."""
        proofs = []
        for name, twin, claim in TWINS:
            mine, theirs = self.jobs[name].losses, self.jobs[twin].losses
            common = sorted(mine.keys() & theirs.keys())
            different = [step for step in common if mine[step] != theirs[step]]
            is_enough = len(common) >= self.save_every
            seen = f"{len(common)} losses, all equal" if not different else f"differ: {different}"
            proofs.append(Proof(claim, is_enough and not different, seen))
        return proofs


def all_verified(code: int, answer: str) -> Proof:
    """Judge what ``ckptd verify --all --data --json`` answered about the main job's root."""
    claim = "ckptd verify --all --data finds every byte of every checkpoint"
    if code != 0:
        return Proof(claim, holds=False, seen=f"exit {code}: {answer[-300:]}")
    whole = [found["is_whole"] for found in json.loads(answer)["checkpoints"]]
    return Proof(claim, bool(whole) and all(whole), f"{len(whole)} checkpoints re-hashed")


def _first_digest(events: list[Event]) -> str:
    return str(events[0]["digest"])[:12] + "…" if events else "no rank resumed"


def new_table(title: str, *columns: str) -> Table:
    """Return an empty table in the demo's one style; columns of figures stand to the right."""
    table = Table(title=title, title_justify="left", title_style="bold")
    for column in columns:
        is_text = re.fullmatch(r"job|killed|resumed by|claim|what was compared|", column)
        table.add_column(column, justify="left" if is_text else "right")
    return table


def plot(jobs: dict[str, Job], path: Path) -> Path:
    """Draw the loss of the main job, with its kills and resumes marked."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 4.5), layout="constrained")
    labels = {"main-4": "4 ranks, DDP", "main-2": "2 ranks, DDP", "main-1": "1 process"}
    before: dict[int, float] = {}
    for name in STORY:
        losses = jobs[name].losses
        (line,) = axes.plot(list(losses), list(losses.values()), label=labels[name], lw=1.5)
        start = jobs[name].first_step
        if start:
            mark(axes, start, before[start], f"resumed at {start}", "o", line.get_color())
        before = losses
        if jobs[name].killed_in:
            last = max(losses)
            mark(axes, last, losses[last], f"killed at {last}", "X", "crimson")
    axes.set(xlabel="step", ylabel="loss (nats per byte)", title="One training, three lives")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path


def mark(axes: Any, step: int, loss: float, words: str, shape: str, colour: str) -> None:
    is_kill = shape == "X"
    axes.axvline(step, color=colour, lw=0.8, ls="--" if is_kill else ":")
    axes.plot([step], [loss], shape, color=colour, ms=9, zorder=3)
    axes.annotate(
        words,
        (step, axes.get_ylim()[1]),
        xytext=(-4 if is_kill else 12, -8 if is_kill else -70),
        textcoords="offset points",
        rotation=90,
        ha="right",
        va="top",
        color=colour,
        fontsize=8,
    )
