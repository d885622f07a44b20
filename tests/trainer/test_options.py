from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from ckptd.errors import ConfigError
from ckptd.model.keys import MAX_STEP
from ckptd.trainer.arguments import check_step, numbers_of
from ckptd.trainer.options import Options

GOOD = Options("/root", True, "auto", "wait", 60.0, "auto", {}, 600.0, 300.0, False)


def test_the_defaults_are_fine() -> None:
    GOOD.check()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("compression", "zstd"), ("compression", "none"), ("on_busy", "skip"), ("slots", 1),
        ("slots", 64), ("busy_timeout_s", 0.01), ("commit_timeout_s", 5), ("daemon", False),
        ("daemon", "/run/ckptd.sock"),
    ],
)  # fmt: skip
def test_what_is_allowed(field: str, value: object) -> None:
    GOOD._replace(**{field: value}).check()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("compression", "gzip"), ("compression", None), ("on_busy", "drop"), ("on_busy", ""),
        ("slots", 0), ("slots", -1), ("slots", 65), ("slots", 2.0), ("slots", True),
        ("slots", "two"), ("busy_timeout_s", 0), ("busy_timeout_s", -1.0),
        ("busy_timeout_s", math.nan), ("busy_timeout_s", math.inf), ("busy_timeout_s", "5"),
        ("busy_timeout_s", None), ("commit_timeout_s", 0), ("meeting_timeout_s", 1e7),
        ("daemon", None), ("daemon", ""),
    ],
)  # fmt: skip
def test_what_is_refused_by_the_name_of_the_argument(field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=field):
        GOOD._replace(**{field: value}).check()


@pytest.mark.parametrize("daemon", [True, "/run/ckptd.sock"])
def test_memory_goes_with_no_daemon_elsewhere(daemon: object) -> None:
    with pytest.raises(ConfigError, match="memory://"):
        GOOD._replace(url="memory://x", daemon=daemon).check()
    GOOD._replace(url="memory://x", daemon=False).check()


@pytest.mark.parametrize("step", [0, 1, MAX_STEP])
def test_steps_that_are_steps(step: int) -> None:
    check_step(step, after=None)
    check_step(step, after=step)


@pytest.mark.parametrize("step", [-1, MAX_STEP + 1, 1.0, True, "1", None, np.int64(1)])
def test_steps_that_are_none(step: object) -> None:
    with pytest.raises(ConfigError, match="whole number"):
        check_step(step, after=None)


def test_steps_only_grow() -> None:
    with pytest.raises(ConfigError, match="step 4 after step 5"):
        check_step(4, after=5)


def test_metrics_become_plain_floats() -> None:
    found = numbers_of({
        "a": 1, "b": 2.5, "c": np.float32(0.5), "d": torch.tensor([3.0]), "e": np.array(4),
        "f": True, "g": -math.inf,
    })  # fmt: skip
    assert found == {"a": 1.0, "b": 2.5, "c": 0.5, "d": 3.0, "e": 4.0, "f": 1.0, "g": -math.inf}
    assert {type(value) for value in found.values()} == {float}
    assert math.isnan(numbers_of({"x": math.nan})["x"])
    assert numbers_of({}) == {}


@pytest.mark.parametrize(
    "metrics",
    [
        {"loss": "1.5"}, {"loss": b"1"}, {"loss": None}, {"loss": [1.0]}, {"loss": {}},
        {"loss": torch.ones(2)}, {"loss": 10**400}, {"loss": 1j},
    ],
)  # fmt: skip
def test_a_metric_that_is_no_number_is_refused_by_name(metrics: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="'loss'") as caught:
        numbers_of(metrics)
    assert len(str(caught.value)) < 200


def test_a_metric_without_a_name_is_refused() -> None:
    with pytest.raises(ConfigError, match="3"):
        numbers_of({3: 1.0})
