"""The agent of torchrun is told to stop: the step is committed, and the next start goes on there."""

from __future__ import annotations

import json
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.jobs import Place, Script
from tests.fakes.trainers import assert_all_whole

pytestmark = pytest.mark.system
WORKER = Path(__file__).parent / "preempt_worker.py"


def start(place: Place, moment: str = "", *, ranks: int = 4) -> Script:
    """Start the job; the agent is the process that is returned."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone",
        "--nproc-per-node", str(ranks), str(WORKER), place.root,
    ]  # fmt: skip
    env = place.env(CKPTD_LINGER_S="0.1", MOMENT=moment)
    agent = Script(command, env, place.base / f"agent-{len(place.processes)}.log")
    place.processes.append(agent)
    return agent


def hear(agent: Script, moment: str = "") -> dict[str, Any]:
    """Return all that rank 0 says until it comes to a moment, or until the agent ends."""
    said: dict[str, Any] = {}
    assert agent.popen.stdout is not None
    for line in agent.popen.stdout:
        said |= json.loads(line)
        if moment and said.get("at") == moment:
            return said
    agent.wait()
    return said


def committed(place: Place) -> int:
    """Return the newest step that is there, after a look at every byte of all."""
    if not Path(place.root).exists():  # stopped before it began
        return 0
    store = place.store()
    try:
        return max(assert_all_whole(store), default=0)
    finally:
        store.close()


def test_a_job_that_is_stopped_at_any_moment_goes_on_at_the_step_it_had_come_to(
    place: Place,
) -> None:
    last: dict[str, Any] = {"stopped": 0}
    # Every process imports torch: fewer ranks after the first start, which proves the same.
    for moment, ranks in (("evaluation", 4), ("mid-save", 2), ("start-up", 2)):
        agent = start(place, moment, ranks=ranks)
        said = hear(agent, moment)
        assert said["resumed"] == last["stopped"]
        assert said["digest"] == last.get("digest", said["digest"])
        agent.send(signal.SIGTERM)
        last = hear(agent)
        assert last["is_preempted"]
        assert last["stopped"] == committed(place)
        assert (last["stopped"] > said["resumed"]) == (moment != "start-up")
        assert "via SIGKILL" not in agent.text, "nobody had to be killed"


@pytest.mark.nightly
@pytest.mark.timeout(3600)
def test_twenty_random_moments(place: Place) -> None:
    """Also before a rank has begun to listen: then it is killed, and nothing is lost either."""
    dice = random.Random(6)
    last, stops = 0, 0
    for number in range(20):
        agent = start(place)
        after = dice.choice(["", "start-up", "evaluation", "mid-save"])
        said = hear(agent, after) if after else {}
        time.sleep(dice.uniform(0, 0.2 if after else 8.0))
        agent.send(signal.SIGTERM)
        said |= hear(agent)
        print(number, after or "any", said, committed(place), flush=True)
        assert said.get("resumed", last) == last, "it goes on at that very step"
        if "stopped" in said:
            assert said["is_preempted"]
            last, stops = said["stopped"], stops + 1
        assert committed(place) == last, "what was reported is there, and nothing more was lost"
    assert stops >= 10
