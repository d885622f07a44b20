"""Workers that are killed under torchrun --max-restarts go on from the memory of their daemon."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.jobs import Place, Script
from tests.fakes.trainers import assert_all_whole
from tests.system.test_memory import hide_contents, show_contents

pytestmark = pytest.mark.system
WORKER = Path(__file__).parent / "restart_worker.py"


def start(place: Place, *, kills: int, ranks: int = 2) -> Script:
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--monitor-interval", "0.1",
        "--max-restarts", str(kills), "--nproc-per-node", str(ranks), str(WORKER), place.root,
        str(kills),
    ]  # fmt: skip
    # With the agent's own store gloo finds addresses of the start before (torch 2.13, seen).
    env = place.env(CKPTD_LINGER_S="60", TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")
    agent = Script(command, env, place.base / "agent.log")
    place.processes.append(agent)
    return agent


def hear(agent: Script, key: str) -> dict[str, Any]:
    """Return all that rank 0 says up to the line that has `key`."""
    said: dict[str, Any] = {}
    assert agent.popen.stdout is not None
    for line in agent.popen.stdout:
        said |= json.loads(line)
        if key in said:
            return said
    raise AssertionError(f"no {key!r}: {agent.text}")


def test_killed_workers_resume_at_the_step_that_was_handed_off_and_read_no_checkpoint(
    place: Place,
) -> None:
    agent = start(place, kills=1)
    hear(agent, "resumed")
    before = hear(agent, "saved")
    hide_contents(place)
    for pid in before["pids"]:
        os.kill(pid, signal.SIGKILL)
    resumed = hear(agent, "digest")
    assert (resumed["resumed"], resumed["source"]) == (before["saved"], "memory")
    assert resumed["digest"] == before["digest"]
    show_contents(place)
    before = hear(agent, "saved")
    assert agent.wait() == 0, agent.text
    store = place.store()
    assert before["saved"] in assert_all_whole(store)
    store.close()
