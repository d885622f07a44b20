from __future__ import annotations

import pytest

from tests.fakes.engines import Bench


@pytest.fixture
def bench() -> Bench:
    return Bench()
