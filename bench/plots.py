"""Plots for people who read no tables."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib import pyplot as plt

from bench.report import is_ours, middle

mpl.use("Agg")

Rows = list[dict[str, Any]]
_KEYS = {
    "pause_s": "pause of a save",
    "overhead_s": "whole overhead of a save",
    "durable_s": "time to durable",
}


def plot_saves(rows: Rows, path: Path) -> None:
    """Draw pause, whole overhead and time to durable of every engine, with intervals."""
    rows = [row for row in rows if row["pause_s"]][::-1]
    if not rows:
        return
    figure, axes = plt.subplots(1, 3, figsize=(15, 0.45 * len(rows) + 1.6), sharey=True)
    for axis, (key, title) in zip(axes, _KEYS.items(), strict=True):
        for place, row in enumerate(rows):
            found = row[key]
            colour = "tab:blue" if is_ours(row["engine"]) else "tab:gray"
            axis.barh(place, found.median, color=colour)
            axis.plot([found.low, found.high], [place, place], color="black", linewidth=1)
        copies = [middle(row["copy_s"]) for row in rows]
        axis.axvline(sorted(copies)[len(copies) // 2], color="tab:red", linewidth=1, linestyle="--")
        axis.set_title(title)
        axis.set_xlabel("seconds (dashed: a bare copy)")
    axes[0].set_yticks(range(len(rows)), [row["engine"] for row in rows])
    _write(figure, path)


def plot_codecs(rows: Rows, path: Path) -> None:
    """Draw ratio against speed, in and out, a colour per content and a mark per codec."""
    rows = [row for row in rows if row["ratio"] is not None and not row["failed"]]
    if not rows:
        return
    contents = list(dict.fromkeys(row["content"] for row in rows))
    codecs = list(dict.fromkeys(row["codec"] for row in rows))
    figure, axes = plt.subplots(1, 2, figsize=(14, 6), sharey=True)
    for axis, way in zip(axes, ("in", "out"), strict=True):
        for row in rows:
            axis.scatter(
                row[f"{way}_median"], row["ratio"], s=70,
                color=f"C{contents.index(row['content'])}", marker="osD^v"[codecs.index(row["codec"])],
            )  # fmt: skip
        axis.set_xlim(left=0)
        axis.set_xlabel(f"GB/s {way}, one thread")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("stored / raw (lower is better)")
    names = [(f"C{i}", "o", name) for i, name in enumerate(contents)]
    names += [("black", "osD^v"[i], name) for i, name in enumerate(codecs)]
    for colour, mark, name in names:
        axes[1].scatter([], [], color=colour, marker=mark, label=name)
    axes[1].legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    _write(figure, path)


def _write(figure: Any, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)
