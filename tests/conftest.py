"""What every test starts from."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# `ckptd`, `tests.fakes` and `tests.contracts` are found from wherever pytest is started.
sys.path.insert(0, str(Path(__file__).parent.parent))


@pytest.fixture(autouse=True)
def _no_failpoints() -> Iterator[None]:
    """Disarm what a test armed."""
    from ckptd import failpoints

    yield
    failpoints.arm("")
