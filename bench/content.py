"""The job that is checkpointed: the example's GPT at a chosen size, with content that looks trained.

Weights of a fresh model are uniform, with one bit more or less in the exponent, and shrink better
than trained ones. So rows are drawn from normal distributions whose widths vary from row to row, as
rows of trained layers do, and then real steps of AdamW on real text make the moments.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from examples.gpt import CONTEXT, GPT, standard_library

HOW = (
    "rows ~ N(0, 0.02 x lognormal(0, 0.5)), then {steps} steps of AdamW (lr 3e-4) on the source "
    "text of Python's standard library; moments are those of these steps"
)
BYTES_PER_PARAMETER = 12  # fp32: the weight and two moments
_PER_BLOCK = 12  # parameters of a block, in squares of its width


def shape_of(size_bytes: int) -> tuple[int, int]:
    """Return width and depth of a GPT whose weights and moments take about `size_bytes`."""
    parameters = size_bytes / BYTES_PER_PARAMETER
    best = (float("inf"), 64, 1)
    for width in range(64, 4097, 64):
        depth = max(1, round((parameters - 320 * width) / (_PER_BLOCK * width * width)))
        if not 4 <= depth <= 48 and parameters > 1e6:
            continue
        found = depth * _PER_BLOCK * width * width + 320 * width
        # Of equally close ones the flat one: its steps start fewer kernels.
        best = min(best, (abs(found - parameters) / parameters + depth * 1e-3, width, depth))
    return best[1], best[2]


class Job:
    """A training job: `step` trains once, `model` and `optimizer` are its state."""

    def __init__(self, size_bytes: int, *, device: str = "cpu", seed: int = 7) -> None:
        torch.manual_seed(seed)
        self.device = torch.device(device)
        self.width, self.depth = shape_of(size_bytes)
        self.model = GPT(self.width, self.depth, self.width // 64)
        _look_trained(self.model)
        self.model.to(self.device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=3e-4, fused=True)
        self.text = standard_library()
        self.rows = 8 if self.is_cuda else 1
        self.dice = torch.Generator().manual_seed(seed)
        self.steps = 0

    def step(self, fence: Callable[[], None] | None = None) -> float:
        """Train one step and return its seconds; `fence` is called before the weights change."""
        began = time.perf_counter()
        starts = torch.randint(len(self.text) - CONTEXT, (self.rows, 1), generator=self.dice)
        batch = self.text[starts + torch.arange(CONTEXT + 1)].long()
        loss = self.model(batch.to(self.device))
        self.optimizer.zero_grad()
        loss.backward()
        if fence is not None:
            fence()
        self.optimizer.step()
        self.finish()
        self.steps += 1
        return time.perf_counter() - began

    @property
    def is_cuda(self) -> bool:
        """Whether the state is a GPU's."""
        return self.device.type == "cuda"

    def finish(self) -> None:
        """Wait until the device has done what it was told, so that a clock tells the truth."""
        if self.is_cuda:
            torch.cuda.synchronize(self.device)

    def tensors(self) -> list[torch.Tensor]:
        """Return weights and moments, each once."""
        found = [p.detach() for p in self.model.parameters()]
        for parameter in self.model.parameters():
            kept = self.optimizer.state.get(parameter, {})
            found += [kept[name] for name in ("exp_avg", "exp_avg_sq") if name in kept]
        return found

    @property
    def state_bytes(self) -> int:
        """The bytes of weights and moments."""
        return sum(tensor.nbytes for tensor in self.tensors())

    def state_dicts(self) -> dict[str, Any]:
        """Return the state as most engines take it."""
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def describe(self) -> dict[str, Any]:
        """Say what the content is and how it was made."""
        weights, first, second = self.flat()
        return {
            "model": f"GPT, width {self.width}, depth {self.depth}",
            "parameters": len(weights),
            "tensors": len(self.tensors()),
            "state_bytes": self.state_bytes,
            "made": HOW.format(steps=self.steps),
            "exponent_bits": {
                "weights": exponent_bits(weights),
                "exp_avg": exponent_bits(first),
                "exp_avg_sq": exponent_bits(second),
            },
        }

    def flat(self, limit: int | None = None) -> list[np.ndarray[Any, Any]]:
        """Return weights, first and second moments, each end to end as fp32, `limit` of each."""
        parameters = list(self.model.parameters())
        state = [self.optimizer.state[p] for p in parameters]
        kinds: list[list[torch.Tensor]] = [
            [p.detach() for p in parameters],
            [kept["exp_avg"] for kept in state],
            [kept["exp_avg_sq"] for kept in state],
        ]
        return [torch.cat([t.flatten() for t in kind])[:limit].cpu().numpy() for kind in kinds]


def exponent_bits(values: np.ndarray[Any, Any]) -> float:
    """Return the entropy of the exponents of fp32 values, in bits; 8 would be noise."""
    exponents = (values.view(np.uint32) >> 23) & 0xFF
    counts = np.bincount(exponents.astype(np.int64), minlength=256).astype(float)
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log2(shares)).sum())


def look_trained(matrix: torch.Tensor) -> None:
    """Fill a matrix as a trained layer's weights are spread: its rows vary in width."""
    widths = torch.empty(len(matrix), 1).log_normal_(0.0, 0.5)
    matrix.normal_(0.0, 0.02).mul_(widths)


def _look_trained(model: torch.nn.Module) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                look_trained(parameter)
            elif name.endswith("norm.weight") or ".norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
