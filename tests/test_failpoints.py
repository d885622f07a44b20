from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from ckptd import failpoints
from ckptd.errors import ConfigError


def test_an_unarmed_point_does_nothing() -> None:
    failpoints.hit("commit.put")


def test_an_armed_point_raises_once() -> None:
    failpoints.arm("commit.put=raise")
    failpoints.hit("chunk.put")
    with pytest.raises(OSError, match=r"commit\.put"):
        failpoints.hit("commit.put")
    failpoints.hit("commit.put")


def test_a_point_may_wait_for_its_turn() -> None:
    failpoints.arm("commit.put=raise@3")
    failpoints.hit("commit.put")
    failpoints.hit("commit.put")
    with pytest.raises(OSError, match="failpoint"):
        failpoints.hit("commit.put")


def test_several_points_are_armed_at_once_and_replace_those_before() -> None:
    failpoints.arm("a=raise")
    failpoints.arm("b=raise;c=raise@1;")
    failpoints.hit("a")
    for name in "bc":
        with pytest.raises(OSError, match="failpoint"):
            failpoints.hit(name)


@pytest.mark.parametrize(
    "spec",
    ["a", "a=", "=kill", "a=explode", "a=kill@x", "a=kill@-1", "a=kill@0", "a=kill@²", "a=1"],
)
def test_what_does_not_parse_is_refused_and_arms_nothing(spec: str) -> None:
    failpoints.arm("b=raise")
    with pytest.raises(ConfigError, match="CKPTD_FAILPOINTS"):
        failpoints.arm(f"c=raise;{spec}")
    failpoints.hit("c")
    with pytest.raises(OSError, match="failpoint b"):
        failpoints.hit("b")


@pytest.mark.parametrize(
    ("action", "number"), [("kill", signal.SIGKILL), ("abort", signal.SIGABRT)]
)
def test_a_point_ends_its_process(action: str, number: int) -> None:
    script = (
        "import resource; resource.setrlimit(resource.RLIMIT_CORE, (0, 0))\n"
        f"from ckptd import failpoints; failpoints.arm('a={action}@2')\n"
        "failpoints.hit('a'); print('once', flush=True); failpoints.hit('a'); print('twice')"
    )
    found = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert found.returncode == -number
    assert found.stdout == "once\n"
