"""A rank that restores what all ranks want, reading its part of it."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import ckptd
from ckptd.trainer import fetching
from tests.system import matrix_layouts as layouts


def main(root: str, out: str, share: str) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    read = fetching.read_chunks
    elements = 0

    def counted(store: Any, reads: Any, *arguments: Any, **options: Any) -> None:
        nonlocal elements
        elements += sum(region.box.volume for one in reads for region in one.regions)
        read(store, reads, *arguments, **options)

    fetching.read_chunks = counted
    job = layouts.build("DDP", seed=5)
    half = {"odd": torch.zeros(6, 4).t(), "big": torch.zeros(300, 300, dtype=torch.bfloat16)}
    resumed = ckptd.restore(
        root, {**job.state, **half}, share_reads={"yes": True, "no": None}[share]
    )
    tensors = {**layouts.whole(job), **half}
    torch.save(tensors, f"{out}/{rank}.pt")
    row = {"step": resumed.step, "elements": elements}
    Path(out, f"{rank}.json").write_text(json.dumps(row))
    dist.destroy_process_group()


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main(*sys.argv[1:])
