from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.fakes.engines import Bench


@pytest.fixture
def bench() -> Iterator[Bench]:
    yield Bench()
