"""Runs sessions, reads what they write, and makes one result per engine of it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from bench.engine import Engine
from bench.memory import Watch
from bench.runtime import PROJECT, runtime_dir
from bench.stats import median, overhead_s, quantile, spread

Event = dict[str, Any]
Tick = Callable[[str], None]


class Settings(NamedTuple):
    """How much is measured. A round is a process; a window is one warm save of each engine."""

    size_bytes: int
    rounds: int
    windows: int
    steps: int
    restores: int
    device: str = "cpu"
    with_memory: bool = True


def run(
    settings: Settings, engines: list[type[Engine]], folder: Path, tick: Tick
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Run all rounds; return the content's description and one result per engine."""
    rounds = []
    for number in range(settings.rounds):
        plan = _plan(settings, [e.name for e in engines], is_memory=False)
        rounds.append(_session(plan, folder, f"round {number + 1}/{settings.rounds}", tick)[0])
    memory = {}
    for engine in engines if settings.with_memory else []:
        plan = _plan(settings, [engine.name], is_memory=True)
        events, watch = _session(plan, folder, f"memory: {engine.name}", tick)
        memory[engine.name] = memory_of(events, watch)
    content = next((e for events in rounds for e in events if e["event"] == "content"), {})
    results = [
        {"engine": e.name, "note": e.note, **result_of(e.name, rounds), **memory.get(e.name, {})}
        for e in engines
    ]
    return {k: v for k, v in content.items() if k not in {"event", "at"}}, results


def result_of(name: str, rounds: list[list[Event]]) -> dict[str, Any]:
    """Return the figures of one engine from the events of all rounds."""
    windows = [w for events in rounds for w in windows_of(events) if w["engine"] == name]
    warm = [w for w in windows if w["window"] > 0]
    cold = [w for w in windows if w["window"] == 0]
    failed = [e["why"] for events in rounds for e in events if e.get("event") == "failed"
              and e["engine"] == name]  # fmt: skip
    restores = [e for events in rounds for e in events if e["event"] == "restore"
                and e["engine"] == name]  # fmt: skip
    found: dict[str, Any] = {
        "failed": failed[0] if failed else None,
        "pause_s": spread([w["pause_s"] for w in warm], 1.0),
        "first_pause_s": spread([w["pause_s"] for w in cold], 1.0),
        "overhead_s": spread([w["overhead_s"] for w in warm]),
        "first_overhead_s": spread([w["overhead_s"] for w in cold]),
        "durable_s": spread([w["durable_s"] for w in warm]),
        "copy_s": spread([w["copy_s"] for w in warm]),
        "plain_step_s": spread([w["plain_s"] for w in warm]),
        "stored_bytes": median([w["stored_bytes"] for w in warm]),
        "restores": {},
    }
    for way in sorted({e["way"] for e in restores}):
        of_way = [e for e in restores if e["way"] == way]
        found["restores"][way] = {
            "cold_s": spread([e["span_s"] for e in of_way if e["kind"] == "cold"], 1.0),
            "hot_s": spread([e["span_s"] for e in of_way if e["kind"] == "hot"], 1.0),
            "is_same": all(e["is_same"] for e in of_way),
        }
    return found


def windows_of(events: list[Event]) -> list[Event]:
    """Return the windows of one round, each with its plain steps (before and after) and overhead."""
    found = []
    plain: list[float] = []
    for place, event in enumerate(events):
        if event["event"] == "plain":
            plain = event["spans_s"]
        elif event["event"] == "window":
            after = next((e["spans_s"] for e in events[place:] if e["event"] == "plain"), [])
            if plain + after:
                base = quantile(plain + after, 0.5)
                cost = overhead_s(plain + after, event["span_s"], event["steps"])
                found.append({**event, "plain_s": base, "overhead_s": cost})
    return found


def memory_of(events: list[Event], watch: Watch) -> dict[str, Any]:
    """Return the most memory beyond the training itself, while saving and while restoring."""
    at = {e["event"]: e["at"] for e in events if e["event"] in {"base", "saves", "restores", "end"}}
    if not {"base", "saves", "restores", "end"} <= at.keys():
        return {}
    base = watch.peak(at["base"], at["saves"])
    saving = watch.peak(at["saves"], at["restores"])
    restoring = watch.peak(at["restores"], at["end"])
    if base is None or saving is None or restoring is None:
        return {}
    return {
        "save_memory_bytes": saving.bytes - base.bytes,
        "save_shared_bytes": saving.shared_bytes - base.shared_bytes,
        "restore_memory_bytes": restoring.bytes - base.bytes,
    }


def _plan(settings: Settings, engines: list[str], *, is_memory: bool) -> Event:
    return {
        "size_bytes": settings.size_bytes,
        "device": settings.device,
        "engines": engines,
        "windows": 0 if is_memory else settings.windows,
        "steps": 1 if is_memory else settings.steps,
        "restores": 1 if is_memory else settings.restores,
        "is_memory": is_memory,
    }


def _session(plan: Event, folder: Path, title: str, tick: Tick) -> tuple[list[Event], Watch]:
    """Run a session in a process of its own, and end all that it leaves behind."""
    work = folder / "work"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    (work / "plan.json").write_text(json.dumps({**plan, "folder": str(work / "engines")}))
    log = folder / f"{title.replace('/', '-of-').replace(': ', '-').replace(' ', '-')}.log"
    with runtime_dir(folder, f"{log.stem}.daemon") as runtime:
        watch = Watch(str(runtime), 0.02 if plan["is_memory"] else 3600.0)
        try:
            with log.open("wb") as output:
                process = subprocess.Popen(
                    [sys.executable, "-m", "bench.session", work / "plan.json",
                     work / "events.jsonl"],
                    cwd=PROJECT, env={**os.environ, "CKPTD_RUNTIME_DIR": str(runtime)},
                    stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True,
                )  # fmt: skip
            _follow(process, work / "events.jsonl", title, tick)
            events = _read(work / "events.jsonl")
        finally:
            watch.stop()
            shutil.rmtree(work, ignore_errors=True)
    if not events or events[-1]["event"] != "end":
        at = events[-1].get("engine", "") if events else ""
        why = f"the process ended early ({process.returncode}), last at {at!r}; see {log}"
        events += [{"event": "failed", "engine": name, "why": why} for name in plan["engines"]]
    return events, watch


def _follow(process: subprocess.Popen[bytes], events: Path, title: str, tick: Tick) -> None:
    seen = 0
    try:
        while process.poll() is None:
            time.sleep(0.5)  # it shares the cores with what it watches
            windows = [e for e in _read(events) if e["event"] in {"window", "restore"}]
            for event in windows[seen:]:
                tick(f"{title}, {event['engine']}")
            seen = len(windows)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _read(path: Path) -> list[Event]:
    if not path.exists():
        return []
    whole = path.read_bytes().rpartition(b"\n")[0]
    return [json.loads(line) for line in whole.splitlines()]
