"""Train a small model that the cluster may take away at any moment, and say whether to run it again.

    python examples/preemptible.py --root /tmp/run                             # one process
    torchrun --nproc-per-node 2 examples/preemptible.py --root /tmp/run        # two ranks
    sbatch --export=ALL,CKPTD_ROOT=/shared/run deploy/slurm/train.sbatch       # under Slurm

Warn it (SIGTERM or SIGUSR1 to any rank, ``ckptd preempt``, the file ``$CKPTD_STOP_FILE``): all ranks
end the same step, save it, wait for the commit and exit with 75, which says "not done, run me again".
Started again with the same root it goes on with the next step. It exits with 0 when it is done.
"""

from __future__ import annotations

import argparse
import os
import sys
import time

import torch
import torch.distributed as dist
from torch import nn

import ckptd

RUN_AGAIN = 75  # EX_TEMPFAIL of sysexits.h; deploy/ knows it
WIDTH, ROWS = 32, 8


def main() -> int:
    options = parse_options()
    rank = join()
    torch.manual_seed(1)
    layers = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))
    model = nn.parallel.DistributedDataParallel(layers) if dist.is_initialized() else layers
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    state = {"model": model, "optimizer": optimizer, "rng": ckptd.RNGState()}

    with ckptd.Checkpointer(options.root) as ckpt:
        resumed = ckpt.resume(state)
        step = resumed.step if resumed else 0
        say(rank, f"resumed at step {step}" if resumed else "starting")
        for step in ckpt.steps(range(1, options.steps + 1), state, every=options.save_every):
            loss = train(model, optimizer, rank, step)
            say(rank, f"step {step}: loss {loss:.4f}")
            time.sleep(options.pace_s)
        is_done = step >= options.steps
        say(rank, "done" if is_done else f"told to stop after step {step}")
    if dist.is_initialized():
        dist.destroy_process_group()
    return 0 if is_done else RUN_AGAIN


def join() -> int:
    """Join the other ranks, if a launcher started any; return this rank."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return 0
    dist.init_process_group("gloo")
    return dist.get_rank()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, rank: int, step: int) -> float:
    """Learn to give back what comes in; which rows come follows from rank and step alone."""
    rows = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(1000 * step + rank))
    optimizer.zero_grad()
    loss = (model(rows) - rows).square().mean()
    loss.backward()
    optimizer.step()
    return float(loss.detach())


def say(rank: int, text: str) -> None:
    print(f"rank {rank}: {text}", flush=True)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--root", required=True, help="where the checkpoints live: a path or URL")
    parser.add_argument("--steps", type=int, default=1000, help="train until this step")
    parser.add_argument("--save-every", type=int, default=100, help="steps from save to save")
    parser.add_argument("--pace-s", type=float, default=0.05, help="sleep so long after each step")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
