"""The command line of the benchmark: measures, prints, and writes JSON and plots."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from bench import codec, cost, limits, plots, preempted, ranks, report, reshard, restart, train
from bench.engines import choose
from bench.peers import version_of
from bench.stats import Spread, parse_size
from bench.train import PROJECT, Settings

VERSIONS = ("torch", "torchsnapshot", "safetensors", "torch_checkpointing", "zipnn", "blosc2")


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="scripts/bench",
        description="What checkpoints cost a training job, beside other engines, on this machine.",
        epilog="scripts/bench s3 --help: PUT and GET beside other S3 clients, a program of its own.",
    )
    parser.add_argument(
        "what", nargs="?", default="all", choices=["all", *PARTS, "limits"],
        help="train: the engines in one training loop; reshard: saved by 4 ranks, loaded by 2; "
        "codec: beside other codecs; cost: how costs grow; ranks: 1,024 simulated ranks; "
        "preempted: what asking costs a step; restart: workers killed, resumed from memory",
    )  # fmt: skip
    parser.add_argument("--size", type=parse_size, help="bytes of the state (500M; --quick: 64M)")
    parser.add_argument("--rounds", type=int, help="processes, each with a first save (2; 1)")
    parser.add_argument("--windows", type=int, help="warm saves per engine and round (4; 2)")
    parser.add_argument("--steps", type=int, help="plain steps before, least steps after (4; 3)")
    parser.add_argument("--device", default="cpu", help="where the job trains: cpu, cuda, cuda:1")
    parser.add_argument("--engines", help="only these, by the starts of their names: ckptd,dcp")
    parser.add_argument("--no-memory", action="store_true", help="leave the memory runs out")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="train and codec in under 90 s, or a small form of what is named",
    )
    parser.add_argument("--out", type=Path, default=PROJECT / "bench-out", help="JSON, plots, logs")
    return parser.parse_args()


def settings_of(options: argparse.Namespace) -> Settings:
    """Return how much to measure; what was asked for goes before the defaults."""
    default = (64_000_000, 1, 2, 3, 1) if options.quick else (500_000_000, 2, 4, 4, 1)
    asked = (options.size, options.rounds, options.windows, options.steps, None)
    chosen = [d if a is None else a for a, d in zip(asked, default, strict=True)]
    with_memory = not (options.no_memory or options.quick)
    return Settings(*chosen, device=options.device, with_memory=with_memory)


def machine() -> dict[str, Any]:
    """Say where this was measured."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(memory / 1e9, 1),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "load_before": os.getloadavg()[0],
        "versions": {name: version_of(name) for name in VERSIONS},
    }


class Run(NamedTuple):
    """What a part of the benchmark is given."""

    options: argparse.Namespace
    settings: Settings
    console: Console
    tick: Callable[[str], None]


def measure(options: argparse.Namespace, console: Console, found: dict[str, Any]) -> None:
    """Measure what was asked for into `found`, and print each part when it is there."""
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task("limits", total=None)

        def tick(title: str) -> None:
            progress.update(bar, description=title, advance=1)

        run = Run(options, settings_of(options), console, tick)
        size = (128 if options.quick else 512) << 20
        found["limits"] = limits.measure(options.out, size, rounds=2 if options.quick else 3)
        report.show_limits(console, found["limits"])
        chosen = [options.what]
        if options.what == "all":
            chosen = ["train", "codec"] if options.quick else list(PARTS)
        for name, (ticks, part) in PARTS.items():
            if name in chosen:
                progress.reset(bar, total=ticks(run))
                part(run, found)


def train_ticks(run: Run) -> int:
    """Return how many ticks `measure_train` makes."""
    engines, settings = choose(run.options.engines), run.settings
    each = 1 + settings.windows + 2 * settings.restores
    return len(engines) * (settings.rounds * each + settings.with_memory * 4)


def measure_train(run: Run, found: dict[str, Any]) -> None:
    """All engines in one training loop."""
    found["settings"] = run.settings._asdict()
    engines = choose(run.options.engines)
    content, rows = train.run(run.settings, engines, run.options.out, run.tick)
    found["content"], found["engines"] = content, rows
    for row in rows:
        row["state_bytes"] = content.get("state_bytes")
    show_train(run.console, found)


def measure_reshard(run: Run, found: dict[str, Any]) -> None:
    """Restores by another number of ranks."""
    rounds = 1 if run.options.quick else 5
    found["reshard"] = reshard.measure(run.settings.size_bytes, rounds, run.options.out, run.tick)
    reshard.show(run.console, found["reshard"])


def measure_codec(run: Run, found: dict[str, Any]) -> None:
    """The codec beside others."""
    each_bytes, rounds = ((4 << 20), 2) if run.options.quick else ((32 << 20), 5)
    found["codecs"], found["codec_content"] = codec.measure(each_bytes, rounds, run.tick)
    report.show_codecs(run.console, found["codecs"])


def measure_cost(run: Run, found: dict[str, Any]) -> None:
    """How costs grow."""
    small = {"sizes": (4_000_000, 16_000_000), "counts": (10, 100), "middle_bytes": 4_000_000}
    found["cost"] = cost.measure(run.options.out, run.tick, **small if run.options.quick else {})
    cost.show(run.console, found["cost"])


def measure_ranks(run: Run, found: dict[str, Any]) -> None:
    """A thousand simulated ranks."""
    counts = {"ranks": 32, "tensors": 100} if run.options.quick else {}
    found["ranks"] = ranks.measure(run.tick, **counts)
    ranks.show(run.console, found["ranks"])


def measure_preempted(run: Run, found: dict[str, Any]) -> None:
    """What `preempted()` costs."""
    calls = 100_000 if run.options.quick else 1_000_000
    found["preempted"] = preempted.measure(calls, run.tick)
    preempted.show(run.console, found["preempted"])


def measure_restart(run: Run, found: dict[str, Any]) -> None:
    """Restarts from memory."""
    settings = run.settings
    rows = restart.measure(settings.size_bytes, settings.rounds, run.options.out, run.tick)
    found["restart"] = rows
    restart.show(run.console, rows)


PARTS: dict[str, tuple[Callable[[Run], int], Callable[[Run, dict[str, Any]], None]]] = {
    "train": (train_ticks, measure_train),
    "reshard": (lambda _: 2, measure_reshard),
    "codec": (lambda _: 7, measure_codec),
    "cost": (lambda run: 4 if run.options.quick else 8, measure_cost),
    "ranks": (lambda _: 2, measure_ranks),
    "preempted": (lambda _: 2, measure_preempted),
    "restart": (lambda run: 3 * run.settings.rounds, measure_restart),
}


def show_train(console: Console, found: dict[str, Any]) -> None:
    """Print all tables of the training loop."""
    rows = found["engines"]
    report.show_content(console, found["content"])
    report.show_saves(console, rows)
    report.show_ratios(console, rows)
    report.show_restores(console, rows)
    report.show_notes(console, rows)
    report.show_drift(console, rows)


def write(out: Path, found: dict[str, Any]) -> list[Path]:
    """Write everything as JSON, and the plots."""
    paths = [out / "results.json"]
    paths[0].write_text(json.dumps(_plain(found), indent=1) + "\n")
    if found.get("engines"):
        plots.plot_saves(found["engines"], out / "saves.png")
        paths.append(out / "saves.png")
    if found.get("codecs"):
        plots.plot_codecs(found["codecs"], out / "codecs.png")
        paths.append(out / "codecs.png")
    return paths


def _plain(value: Any) -> Any:
    if isinstance(value, Spread):
        return value.as_dict()
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list) else value


def main() -> int:
    """Run the benchmark."""
    if sys.argv[1:2] == ["s3"]:
        from bench import s3

        return s3.main(sys.argv[2:])
    options = parse_options()
    try:
        choose(options.engines)
    except ValueError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    options.out = options.out.resolve()
    options.out.mkdir(parents=True, exist_ok=True)
    console = Console() if sys.stdout.isatty() else Console(width=150)
    began = time.monotonic()
    found: dict[str, Any] = {"machine": machine(), "threads": torch.get_num_threads()}
    here = found["machine"]
    console.print(
        f"{here['cores']} cores, {here['memory_gb']} GB, load {here['load_before']:.1f} before, "
        + ", ".join(f"{name} {version or 'missing'}" for name, version in here["versions"].items())
    )
    measure(options, console, found)
    for path in write(options.out, found):
        console.print(f"wrote {path}", soft_wrap=True, highlight=False)
    console.print(f"took {time.monotonic() - began:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
