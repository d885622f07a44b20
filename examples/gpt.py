"""Train a small byte-level GPT on Python's own source text, and never lose more than a few steps.

    python examples/gpt.py --root /tmp/gpt                              # one process
    torchrun --nproc-per-node 4 examples/gpt.py --root /tmp/gpt         # four ranks, DDP

Kill either at any moment and start either again with the same ``--root``: training goes on from the
newest whole checkpoint, on however many ranks there are now. The lines that make it so are in
`main`; search for ``ckpt``. Everything else is a plain PyTorch training script.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import xxhash
from torch import nn
from torch.nn import functional as F  # noqa: N812 - the name everybody knows

import ckptd

CONTEXT = 64  # bytes that the model sees at once
BATCH = 16  # rows of the global batch, split over the ranks, however many there are


# --- the model ---------------------------------------------------------------------------------


class Block(nn.Module):
    """Attention, then a two-layer perceptron, each added to what came in."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )
        self.dropout = nn.Dropout(0.1)

    def attend(self, x: torch.Tensor) -> torch.Tensor:
        rows, length, width = x.shape
        q, k, v = self.qkv(x).view(rows, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).reshape(rows, length, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.dropout(self.attend(self.norm1(x)))
        return x + self.dropout(self.mlp(self.norm2(x)))


class GPT(nn.Module):
    """A GPT over bytes. Its output layer and its embedding are one tied tensor."""

    def __init__(self, width: int = 256, depth: int = 4, heads: int = 4) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, width)
        self.places = nn.Parameter(torch.zeros(CONTEXT, width))
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 256, bias=False)
        nn.init.normal_(self.embed.weight, std=0.02)
        self.head.weight = self.embed.weight

    def forward(self, text: torch.Tensor) -> torch.Tensor:
        """Return the loss of guessing each byte of `text` from the bytes before it."""
        x = self.embed(text[:, :-1]) + self.places
        logits = self.head(self.norm(self.blocks(x)))
        return F.cross_entropy(logits.flatten(0, 1), text[:, 1:].flatten())


# --- the data ----------------------------------------------------------------------------------


def standard_library() -> torch.Tensor:
    """Return the source text of Python's standard library, one file after the other, as bytes."""
    files = sorted(Path(os.__file__).parent.glob("*.py"))
    return torch.from_numpy(np.frombuffer(b"".join(f.read_bytes() for f in files), np.uint8).copy())


class Loader:
    """Draws global batches in an order that the seed alone decides, and hands out this rank's rows.

    Its whole state is a position, so it goes on where it was on any number of ranks.
    """

    def __init__(self, text: torch.Tensor, rank: int, world_size: int, seed: int) -> None:
        if BATCH % world_size:
            raise SystemExit(f"{BATCH} rows cannot be split over {world_size} ranks")
        self.text, self.seed, self.position = text, seed, 0
        share = BATCH // world_size
        self.rows = slice(rank * share, (rank + 1) * share)

    def next(self) -> torch.Tensor:
        dice = torch.Generator().manual_seed(self.seed + self.position)
        starts = torch.randint(len(self.text) - CONTEXT, (BATCH, 1), generator=dice)
        self.position += 1
        return self.text[starts[self.rows] + torch.arange(CONTEXT + 1)].long()

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position, "seed": self.seed}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position, self.seed = state["position"], state["seed"]


# --- the training ------------------------------------------------------------------------------


def main() -> None:
    options = parse_options()
    rank, world_size = join()
    torch.manual_seed(options.seed)  # the same first weights on every rank ...
    model = GPT()
    torch.manual_seed(options.seed + 1 + rank)  # ... but every rank drops other activations
    wrapped = wrap(model, world_size, options.find_unused_parameters)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, warm_up)
    loader = Loader(standard_library(), rank, world_size, options.seed)
    state = {
        "model": wrapped,
        "optimizer": optimizer,
        "scheduler": scheduler,
        "loader": loader,
        "rng": ckptd.RNGState(),
    }
    journal = Journal(options.journal, rank, world_size)

    with ckptd.Checkpointer(options.root) as ckpt:
        resumed = ckpt.resume(state)
        step = resumed.step if resumed else 0
        journal.started(step, state, is_resumed=resumed is not None)
        if rank == 0:
            came = f"resumed at step {step} of attempt {resumed.attempt}" if resumed else "starting"
            print(f"{came}, {world_size} rank(s), to step {options.steps}", flush=True)
        while step < options.steps:
            begin = time.perf_counter()
            loss = wrapped(loader.next())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
            step += 1
            mean = mean_over_ranks(loss, world_size)
            journal.trained(step, mean, time.perf_counter() - begin)
            if step % options.save_every == 0:
                with journal.saving(step, state):
                    handle = ckpt.save(step, state, metrics={"loss": mean})
                journal.saved(handle)
                if rank == 0:
                    print(
                        f"step {step}: loss {mean:.3f}, saved in {handle.pause_s * 1e3:.1f} ms",
                        flush=True,
                    )
        ckpt.wait()  # the last saves become durable
        journal.finished()
    if world_size > 1:
        dist.destroy_process_group()


def join() -> tuple[int, int]:
    """Join the other ranks, if torchrun started any; return this rank and how many there are."""
    if "RANK" not in os.environ:
        return 0, 1
    dist.init_process_group("gloo")
    return dist.get_rank(), dist.get_world_size()


def wrap(model: nn.Module, world_size: int, find_unused_parameters: bool) -> nn.Module:  # noqa: FBT001
    """Wrap the model for the ranks there are. `find_unused_parameters` fixes DDP's summing order.

    By default DDP regroups the gradients after a process's first step and then sums them over more
    than two ranks in another order, which shows in the last bits of the loss after a resume.
    """
    if world_size == 1:
        return nn.DataParallel(model)
    return nn.parallel.DistributedDataParallel(model, find_unused_parameters=find_unused_parameters)


def warm_up(step: int) -> float:
    """Return the share of the learning rate: up over twenty steps, then down with the root."""
    return min((step + 1) / 20, (20 / (step + 1)) ** 0.5)


def mean_over_ranks(loss: torch.Tensor, world_size: int) -> float:
    total = loss.detach().clone()
    if world_size > 1:
        dist.all_reduce(total)
    return float(total) / world_size


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--root", required=True, help="where the checkpoints live: a path or URL")
    parser.add_argument("--steps", type=int, default=200, help="train until this step")
    parser.add_argument("--save-every", type=int, default=5, help="steps from save to save")
    parser.add_argument("--seed", type=int, default=1234)
    parser.add_argument(
        "--find-unused-parameters",
        action="store_true",
        help="keep DDP's summing order, so that more than two ranks resume bit for bit",
    )
    parser.add_argument("--journal", help="write what happens, line by line, to this folder")
    return parser.parse_args()


# --- what the demo wants to know; training does not need it ------------------------------------


def digest(state: dict[str, Any]) -> str:
    """Return a hash of every byte that all ranks share: weights, moments, schedule, position."""
    seen = xxhash.xxh3_128()
    model = state["model"].module
    for name, parameter in sorted(model.named_parameters()):
        moments = sorted(state["optimizer"].state[parameter].items())
        for key, tensor in [("", parameter), *moments]:
            seen.update(f"{name}/{key}/{tensor.dtype}/{tuple(tensor.shape)}".encode())
            seen.update(tensor.detach().contiguous().numpy())
    plain = {key: state[key].state_dict() for key in ("scheduler", "loader")}
    plain["options"] = [
        {k: v for k, v in group.items() if k != "params"}
        for group in state["optimizer"].param_groups
    ]
    seen.update(json.dumps(plain, sort_keys=True, default=str).encode())
    return seen.hexdigest()


class Journal:
    """Writes one JSON line per event to ``FOLDER/rank<R>.jsonl``, or nothing without a folder."""

    def __init__(self, folder: str | None, rank: int, world_size: int) -> None:
        self.file = None
        self.rank, self.world_size = rank, world_size
        self.pending: list[Any] = []
        self.buffers: tuple[torch.Tensor, torch.Tensor] | None = None
        self.last_bytes, self.copy_s = 0, 0.0
        if folder is not None:
            Path(folder).mkdir(parents=True, exist_ok=True)
            self.file = Path(folder, f"rank{rank}.jsonl").open("w", buffering=1)  # noqa: SIM115 - lives as long as the process
            self.write("process", pid=os.getpid(), world_size=world_size)

    def write(self, event: str, **facts: Any) -> None:
        assert self.file is not None
        self.file.write(json.dumps({"event": event, "at": time.time(), **facts}) + "\n")

    def started(self, step: int, state: dict[str, Any], *, is_resumed: bool) -> None:
        if self.file is not None:
            self.write("resumed" if is_resumed else "fresh", step=step, digest=digest(state))

    def trained(self, step: int, loss: float, span_s: float) -> None:
        if self.file is not None:
            self.write("step", step=step, loss=loss.hex(), span_s=span_s)

    @contextmanager
    def saving(self, step: int, state: dict[str, Any]) -> Iterator[None]:
        """Note what is about to be saved, and time a bare copy right before the save.

        Ranks that share cores would time each other: with a journal they save one after the other
        where there are more of them than cores. One rank's digest is enough: all hold the same.
        """
        if self.file is None:
            yield
            return
        tensors = sum(1 + len(kept) for kept in state["optimizer"].state.values())
        seen = digest(state) if self.rank == 0 else None
        self.write("saving", step=step, digest=seen, tensors=tensors)
        takes_turns = self.world_size > (os.cpu_count() or 1)
        self.wait_for_others(self.rank + 1 if takes_turns else 1)
        self.copy_s = self.time_copy(self.last_bytes)
        yield
        self.wait_for_others(self.world_size - self.rank if takes_turns else 1)

    def wait_for_others(self, times: int) -> None:
        for _ in range(times if self.world_size > 1 else 0):
            dist.barrier()

    def saved(self, handle: Any) -> None:
        """Note the pause of a save, and beside it that of a bare copy of the same bytes."""
        if self.file is None:
            return
        self.write(
            "saved",
            pause_s=handle.pause_s,
            captured_bytes=handle.captured_bytes,
            copy_s=self.copy_s,
        )
        self.last_bytes = handle.captured_bytes
        self.pending.append(handle)
        self.pending = [h for h in self.pending if not self.note_committed(h)]

    def time_copy(self, size_bytes: int) -> float:
        """Return the seconds of one copy of `size_bytes` between two buffers already touched."""
        if self.buffers is None or len(self.buffers[0]) < size_bytes:
            self.buffers = torch.ones(2, size_bytes, dtype=torch.uint8).unbind()
        source, target = self.buffers
        begin = time.perf_counter()
        target[:size_bytes].copy_(source[:size_bytes])
        return time.perf_counter() - begin

    def note_committed(self, handle: Any) -> bool:
        if not handle.is_done:
            return False
        done = handle.result(0)
        self.write("committed", step=done.step, bytes=done.bytes, stored_bytes=done.stored_bytes)
        return True

    def finished(self) -> None:
        if self.file is not None:
            for handle in self.pending:
                self.note_committed(handle)
            self.write("finished")


if __name__ == "__main__":
    main()
