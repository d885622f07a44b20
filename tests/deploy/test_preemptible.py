"""examples/preemptible.py alone, as a user starts it; with two ranks: tests/system/test_slurm.py."""

from __future__ import annotations

import re
import signal
import subprocess
import sys

import pytest

from examples.preemptible import RUN_AGAIN
from tests.fakes.jobs import PATIENCE_S, REPOSITORY, Place, new_place

pytestmark = pytest.mark.system


def start(place: Place, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(REPOSITORY / "examples/preemptible.py"), "--root", place.root]
    return subprocess.Popen(
        [*command, *options], env=place.env(CKPTD_LINGER_S="0.1"), text=True,
        stdout=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip


def test_the_example_stops_with_75_when_warned_and_goes_on_where_it_was():
    with new_place() as place:
        with start(place, "--steps", "100000", "--pace-s", "0.02") as first:
            assert first.stdout is not None
            for line in first.stdout:
                if "step 3:" in line:
                    break
            first.send_signal(signal.SIGUSR1)
            said, _ = first.communicate(timeout=PATIENCE_S)
        assert first.returncode == RUN_AGAIN, said
        (step,) = re.findall(r"told to stop after step (\d+)", said)

        more = str(int(step) + 5)
        with start(place, "--steps", more, "--pace-s", "0") as second:
            said, _ = second.communicate(timeout=PATIENCE_S)
        assert second.returncode == 0, said
        assert f"resumed at step {step}\n" in said
        assert re.findall(r"step (\d+): loss", said) == [str(int(step) + n) for n in range(1, 6)]
