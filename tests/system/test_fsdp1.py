from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.system
HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two ranks saw."""
    folder = tmp_path_factory.mktemp("fsdp1")
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        str(HERE / "fsdp1_worker.py"), str(folder / "root"), str(folder),
    ]  # fmt: skip
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, env=env, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


def test_state_that_is_no_tensor_comes_from_the_rank_that_had_the_parameter(rows) -> None:
    for row in rows:
        steps = row["steps"]
        assert {n: s for n, s in steps.items() if not n.startswith("unused")} == dict.fromkeys(
            ("a.weight", "a.bias", "b.weight", "b.bias"), 2
        )


def test_a_unit_that_never_had_a_gradient_is_not_missing(rows) -> None:
    assert all(row["missing"] == [] and row["same"] for row in rows)


def test_a_rank_that_holds_nothing_of_what_is_selected_goes_along(rows) -> None:
    assert all(row["bias"] for row in rows)
