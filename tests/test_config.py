from __future__ import annotations

import pytest

from ckptd.config import daemon_config
from ckptd.errors import ConfigError


def test_an_empty_environment_gives_the_defaults() -> None:
    config = daemon_config({}, socket="/run/ckptd/x", is_on_demand=True)
    assert (config.socket, config.linger_s, config.drain_s) == ("/run/ckptd/x", 600.0, 25.0)
    assert (config.workers, config.nice, config.metrics_address) == (None, 10, None)
    assert config.trim_s == 60.0
    assert config.log_level == "info"


def test_a_service_never_leaves_for_lack_of_clients() -> None:
    env = {"CKPTD_LINGER_S": "5"}
    assert daemon_config(env, socket="/s", is_on_demand=False).linger_s is None
    assert daemon_config(env, socket="/s", is_on_demand=True).linger_s == 5.0


def test_every_setting_comes_from_the_environment_that_was_given() -> None:
    env = {
        "CKPTD_DRAIN_S": "1.5", "CKPTD_TRIM_S": "2", "CKPTD_WORKERS": "3", "CKPTD_NICE": "0",
        "CKPTD_METRICS": "127.0.0.1:9400", "CKPTD_LOG_LEVEL": "DEBUG",
    }  # fmt: skip
    config = daemon_config(env, socket="/s", is_on_demand=True)
    assert (config.drain_s, config.trim_s, config.workers, config.nice) == (1.5, 2.0, 3, 0)
    assert (config.metrics_address, config.log_level) == ("127.0.0.1:9400", "debug")


def test_the_process_environment_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CKPTD_DRAIN_S", "7")
    assert daemon_config({}, socket="/s", is_on_demand=True).drain_s == 25.0


@pytest.mark.parametrize("name", ["CKPTD_LINGER_S", "CKPTD_DRAIN_S", "CKPTD_WORKERS", "CKPTD_NICE"])
@pytest.mark.parametrize("text", ["x", "-1", "nan", "inf", "1e10", "1,5", "5s"])
def test_a_number_that_is_none_is_refused_by_the_name_of_its_variable(name: str, text: str) -> None:
    with pytest.raises(ConfigError, match=name):
        daemon_config({name: text}, socket="/s", is_on_demand=True)


def test_an_unknown_log_level_is_refused_with_those_there_are() -> None:
    with pytest.raises(ConfigError, match=r"CKPTD_LOG_LEVEL.*warning"):
        daemon_config({"CKPTD_LOG_LEVEL": "loud"}, socket="/s", is_on_demand=True)


@pytest.mark.parametrize("name", ["CKPTD_DRAIN_S", "CKPTD_METRICS", "CKPTD_LOG_LEVEL"])
def test_an_empty_variable_is_as_none(name: str) -> None:
    plain = daemon_config({}, socket="/s", is_on_demand=True)
    assert daemon_config({name: ""}, socket="/s", is_on_demand=True) == plain
