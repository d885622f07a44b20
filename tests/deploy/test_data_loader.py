"""The lines of docs/operations.md that keep a data loader's workers alive."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys

import pytest

from tests.fakes.jobs import PATIENCE_S, REPOSITORY

pytestmark = pytest.mark.system

TRAINER = """
import os, signal, sys, threading
from torch.utils.data import DataLoader

{lines}

signal.signal(signal.SIGTERM, lambda *_: print("warned", flush=True))
batches = iter(DataLoader(range(1000), num_workers=1, worker_init_fn=hear_only_the_rank))
next(batches)
print("up", flush=True)
sys.stdin.readline()
for _ in range(20):  # more than the worker has fetched ahead
    next(batches)
print("trained", flush=True)
"""


def lines() -> str:
    text = (REPOSITORY / "docs/operations.md").read_text()
    (found,) = [part for part in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "sigwaitinfo" in part]  # fmt: skip
    return found


def test_workers_of_a_data_loader_survive_a_warning_to_the_whole_group():
    with subprocess.Popen(
        [sys.executable, "-c", TRAINER.format(lines=lines())],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, start_new_session=True, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    ) as popen:  # fmt: skip
        try:
            assert popen.stdout is not None
            assert popen.stdout.readline() == "up\n"
            os.killpg(popen.pid, signal.SIGTERM)
            assert popen.stdout.readline() == "warned\n"
            said, _ = popen.communicate("go on\n", timeout=PATIENCE_S)
            assert (said, popen.returncode) == ("trained\n", 0)
        finally:
            popen.kill()
