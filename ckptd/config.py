"""Settings of a daemon, and how they are read from an environment that the caller gives."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from ckptd.engine.lifetime import TRIM_S
from ckptd.errors import ConfigError


class DaemonConfig(msgspec.Struct, frozen=True):
    """How a daemon runs.

    Attributes:
        socket: absolute path of its socket.
        linger_s: how long to stay without clients after one vanished; None: for ever.
        trim_s: how long to keep buffers for the next snapshot when there is nothing to do.
        drain_s: how long a SIGTERM may take before the exit code says that work was left.
        workers: threads that code; None: half the cores of this process, four at most.
        nice: added to the niceness, so that training keeps its cores; above 0 disk requests are of
            the idle class too.
        metrics_address: ``host:port`` for Prometheus, None for none.
        log_level: debug, info, warning or error.
    """

    socket: str
    linger_s: float | None
    trim_s: float
    drain_s: float
    workers: int | None
    nice: int
    metrics_address: str | None
    log_level: str


def daemon_config(env: Mapping[str, str], *, socket: str, is_on_demand: bool) -> DaemonConfig:
    """Read a daemon's settings; see docs/operations.md for the variables.

    Raises:
        ConfigError: naming the variable that cannot be read.
    """
    return DaemonConfig(
        socket=socket,
        linger_s=_number(env, "CKPTD_LINGER_S", 600.0) if is_on_demand else None,
        trim_s=_number(env, "CKPTD_TRIM_S", TRIM_S),
        drain_s=_number(env, "CKPTD_DRAIN_S", 25.0),
        workers=int(_number(env, "CKPTD_WORKERS", 0)) or None,
        nice=int(_number(env, "CKPTD_NICE", 10)),
        metrics_address=env.get("CKPTD_METRICS") or None,
        log_level=_one_of(env, "CKPTD_LOG_LEVEL", "info", {"debug", "info", "warning", "error"}),
    )


def _number(env: Mapping[str, str], name: str, default: float) -> float:
    text = env.get(name, "")
    try:
        value = float(text) if text else default
    except ValueError:
        raise ConfigError(f"{name}={text!r}: write a number") from None
    if not 0 <= value < 1e9:
        raise ConfigError(f"{name}={text!r}: write a number that is not negative")
    return value


def _one_of(env: Mapping[str, str], name: str, default: str, allowed: set[str]) -> str:
    value = env.get(name, default).lower() or default
    if value not in allowed:
        raise ConfigError(f"{name}={value!r}: write one of {', '.join(sorted(allowed))}")
    return value
