"""``ckptd status``."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
import typer

from ckptd.cli.console import add_row, new_table, plain, print_json, show
from ckptd.cli.daemons import ask_all, sockets
from ckptd.errors import DaemonUnavailableError
from ckptd.units import format_bytes, format_span
from ckptd.wire import messages as say


def command(
    *,
    socket: Annotated[
        str, typer.Option(help="Ask only this daemon.", envvar="CKPTD_SOCKET", show_default=False)
    ] = "",
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Show the daemons of this user on this machine: their jobs, what is open, what failed last."""
    paths = [socket] if socket else sockets()
    answers, silent = ask_all(paths, say.Ask(), say.Report)
    found = [
        {"socket": path, **msgspec.json.decode(answer.body, type=dict[str, Any])}
        for path, answer in answers.items()
    ]
    if json:
        print_json({"daemons": found, "silent": silent})
    else:
        for report in found:
            _show(report)
        for path, reason in silent.items():
            show(f"{path}: {plain(reason)}", style="red")
    if not found:
        raise DaemonUnavailableError(
            "no daemon is running; a trainer starts one when it resumes or saves, `ckptd daemon` by hand"
        )


def _show(report: dict[str, Any]) -> None:
    age = report["last_commit_age_s"]
    last = f"{report['last_commit']}, {format_span(age)} ago" if age is not None else "none yet"
    show(
        f"daemon {report['pid']} on {report['socket']}"
        + (" (stopping)" if report["is_draining"] else "")
    )
    stored = (
        f"{format_bytes(report['raw_bytes'])} in, {format_bytes(report['stored_bytes'])} stored"
    )
    show(f"  last commit: {last}; {stored}")
    counts = ("committed", "failed", "skipped", "unknown", "store_errors")
    show("  steps: " + ", ".join(f"{report[n]} {n.replace('_', ' ')}" for n in counts))
    if report["last_failure"]:
        show(f"  last failure: {plain(report['last_failure'])}", style="red")
    if report.get("last_skip"):  # a daemon of an earlier version does not say
        show(f"  last skip: {plain(report['last_skip'])}", style="yellow")
    if report["kept"]:
        show(f"  {_kept(report['kept'])}")
    if report["jobs"]:
        show(_jobs(report["jobs"]))


def _kept(kept: list[dict[str, Any]]) -> str:
    ranks = len(kept)
    newest = max((step for left in kept for step in left["steps"]), default=None)
    return (
        f"kept in memory: {format_bytes(sum(left['bytes'] for left in kept))} of {ranks} "
        f"rank{'s' if ranks != 1 else ''} that are gone, newest step {newest}, "
        f"for {format_span(max(left['left_s'] for left in kept))} more"
    )


def _jobs(jobs: list[dict[str, Any]]) -> Any:
    table = new_table(
        "  root", "attempt", "ranks here", "newest", "open steps", fold=("  root", "open steps")
    )  # fmt: skip
    for job in jobs:
        add_row(
            table, f"  {job['root']}", f"{job['attempt']:04d}",
            f"{len(job['ranks_here'])}/{job['world_size']}", job["newest"] or "",
            "; ".join(map(_step, job["open"])),
        )  # fmt: skip
    return table


def _step(step: dict[str, Any]) -> str:
    states: dict[str, int] = {}
    for state in step["parts"].values():
        states[state] = states.get(state, 0) + 1
    parts = ", ".join(f"{count} {state}" for state, count in sorted(states.items()))
    return f"{step['step']} ({parts or 'nothing yet'}, {format_span(step['age_s'])})"
