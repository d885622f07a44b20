"""Train, kill, resume on another number of ranks, and prove that nothing was lost or changed.

The main job: 4 ranks under DDP are killed in the middle of a save; 2 ranks go on and are killed
too; one process with nn.DataParallel finishes. Then the proofs: at the same world size a killed and
resumed job gives the same losses, bit for bit, as one that was never interrupted.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import demo_report
from demo_job import Job, Kill
from demo_place import Place, make_place, settle
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

PROJECT = Path(__file__).resolve().parent.parent
SAVE_EVERY = 5
FIRST_KILL, SECOND_KILL, END = 40, 80, 120  # steps
TAIL = 10  # steps that a proof runs on after its resume
ORDERED = ("--find-unused-parameters",)  # more than two ranks sum in the same order after a resume


class Story:
    """Runs the jobs one after the other, each with a line of progress."""

    def __init__(self, out: Path, place: Place, runtime: Path, progress: Progress) -> None:
        self.work, self.place, self.progress = out / "work", place, progress
        self.env = {
            **os.environ,
            "CKPTD_RUNTIME_DIR": str(runtime),
            "CKPTD_LINGER_S": "60",
            "OMP_NUM_THREADS": "1",
            "PYTHONWARNINGS": "ignore",
        }
        proofs = (FIRST_KILL + TAIL) + TAIL + (SECOND_KILL - FIRST_KILL + TAIL) + TAIL
        self.bar = progress.add_task("", total=END + proofs)

    def run(self, job: Job, kill: Kill | None = None) -> Job:
        """Run a job to its end, or to its kill, and move the bar by its steps."""
        self.progress.update(self.bar, description=job.title)
        seen = None
        with job.started(self.env):
            while job.poll():
                if seen is None:
                    seen = job.first_step
                if seen is not None and job.step > seen:
                    self.progress.advance(self.bar, job.step - seen)
                    seen = job.step
                if kill is not None and kill.is_due(job):
                    job.kill()
                    break
                time.sleep(0.001)
        if kill is not None and job.killed_in is None:
            raise SystemExit(f"demo: {job.name} ended before it was killed; see {job.log}")
        return job

    def job(self, name: str, ranks: int, steps: int, title: str, **how: object) -> Job:
        """Describe a job of the training script; `how`: root, flags."""
        root = how.get("root", self.place.root)
        assert isinstance(root, str)
        command = [str(PROJECT / "examples" / "gpt.py"), "--root", root]
        command += ["--steps", str(steps), "--save-every", str(SAVE_EVERY)]
        command += ["--journal", str(self.work / name)]
        if how.get("is_ordered"):
            command += ORDERED
        return Job(name, ranks, title, command, root, self.work / name)


def tell(story: Story) -> tuple[dict[str, Job], float]:
    """Run the main job and the proofs; return the jobs by name and the seconds that it took."""
    begin = time.monotonic()
    jobs = {}

    def add(job: Job, kill: Kill | None = None) -> None:
        jobs[job.name] = story.run(job, kill)

    four = "4 ranks (DDP)"
    add(
        story.job("main-4", 4, END, f"{four} train until they are killed", is_ordered=True),
        Kill(FIRST_KILL, "writing"),
    )
    # A kill may come some saves late: the proofs go on from where it came.
    first = jobs["main-4"].step + TAIL
    proof_4, reference_2 = story.place.copy("proof-4"), story.place.copy("reference-2")
    add(
        story.job("main-2", 2, END, "2 ranks (DDP) resume and are killed too"),
        Kill(SECOND_KILL, "saving"),
    )
    second = jobs["main-2"].step + TAIL
    proof_2 = story.place.copy("proof-2")
    add(story.job("main-1", 1, END, "1 process (DataParallel) resumes and finishes"))

    title = "proof: 4 ranks, never interrupted"
    to = FIRST_KILL + TAIL
    add(
        story.job(
            "reference-4", 4, to, title, root=story.place.beside("ref-4-root"), is_ordered=True
        )
    )
    title = "proof: 4 ranks resume what was killed"
    add(story.job("proof-4", 4, first, title, root=proof_4, is_ordered=True))
    add(story.job("reference-2", 2, second, "proof: 2 ranks, never interrupted", root=reference_2))
    add(story.job("proof-2", 2, second, "proof: 2 ranks resume what was killed", root=proof_2))
    return jobs, time.monotonic() - begin


def command_line(*words: str) -> tuple[int, str]:
    """Run the installed ckptd and return its exit code and what it printed."""
    tool = Path(sys.executable).with_name("ckptd")
    done = subprocess.run([tool, *words], capture_output=True, text=True, check=False, timeout=120)
    return done.returncode, done.stdout or done.stderr


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/demo", description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--root",
        help="where the checkpoints go: a new folder (demo-out/root), a URL, or s3: a server of its own",
    )
    parser.add_argument("--out", type=Path, default=PROJECT / "demo-out", help="plot, logs, root")
    return parser.parse_args()


def main() -> int:
    options = parse_options()
    out: Path = options.out.resolve()
    for old in (out / "work", out / "root"):
        shutil.rmtree(old, ignore_errors=True)
    (out / "work").mkdir(parents=True)
    with make_place(options.root, out) as place:
        return run(out, place)


def run(out: Path, place: Place) -> int:
    """Run everything, show the report, and leave no process behind; return the exit code."""
    runtime = Path(tempfile.mkdtemp(prefix="ckptd-d.", dir="/tmp"))
    console = Console() if sys.stdout.isatty() else Console(width=120)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    try:
        with Progress(*columns, console=console, transient=True) as progress:
            jobs, span_s = tell(Story(out, place, runtime, progress))
        settle(place.root)
        listing = command_line("ls", place.root)
        verified = command_line("verify", place.root, "--all", "--data", "--json")
    finally:
        leftovers = PROJECT / "scripts" / "leftovers.py"
        left = subprocess.run([sys.executable, leftovers, runtime], check=False).returncode
        for log in runtime.glob("*.log"):
            shutil.copy2(log, out / "work" / f"daemon-{log.name}")
        shutil.rmtree(runtime, ignore_errors=True)
    report = demo_report.Report(jobs, SAVE_EVERY, console)
    is_good = report.show(listing, verified)
    plot = demo_report.plot(jobs, out / "loss.png")
    for copied in (out / "work").glob("*-root"):
        shutil.rmtree(copied)
    console.print(f"\nplot: {plot}\nroot: {place.root}\ntook: {span_s:.0f} s")
    return 0 if is_good and left == 0 else 1


if __name__ == "__main__":
    sys.exit(main())
