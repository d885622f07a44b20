"""What every test starts from."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# `ckptd`, `tests.fakes` and `tests.contracts` are found from wherever pytest is started.
sys.path.insert(0, str(Path(__file__).parent.parent))

from tests.fakes.s3_fixtures import bucket, moto, open_obstore, open_s3, proxy, waits  # noqa: F401

# The same examples in every run, however slow the machine: a change that passes does not fail the
# next one. `CKPTD_EXAMPLES=random` looks for new ones.
settings.register_profile(
    "same", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("random", deadline=None, print_blob=True)
settings.load_profile("random" if os.environ.get("CKPTD_EXAMPLES") == "random" else "same")


@pytest.fixture(autouse=True)
def _no_failpoints() -> Iterator[None]:
    """Disarm what a test armed."""
    from ckptd import failpoints

    yield
    failpoints.arm("")
