"""The settings of a Checkpointer, checked once."""

from __future__ import annotations

import signal
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

from ckptd.errors import ConfigError
from ckptd.units import MIB
from ckptd.wire.address import socket_path


class Options(NamedTuple):
    """See `Checkpointer`. `url` is normalised."""

    url: str
    daemon: bool | str
    compression: Literal["auto", "zstd", "none"]
    on_busy: Literal["wait", "skip"]
    busy_timeout_s: float
    slots: int | Literal["auto"]
    storage_options: dict[str, object]
    commit_timeout_s: float
    meeting_timeout_s: float
    allow_pickle: bool
    overlap: bool = False
    stop_signals: Sequence[str] = ("SIGTERM", "SIGUSR1")
    chunk_bytes: int = 32 * MIB
    plan_timeout_s: float = 10.0
    settle_timeout_s: float = 15.0

    def check_daemon(self, env: Mapping[str, str]) -> None:
        """Check now, and not with the second save, that a daemon's socket can be used.

        Raises:
            ConfigError: what is wrong with its place.
        """
        if self.daemon is True:
            socket_path(self.url, self.storage_options, env)

    def check(self) -> None:
        """Check what types cannot say.

        Raises:
            ConfigError: naming the argument.
        """
        choices = {
            "compression": (self.compression, ("auto", "zstd", "none")),
            "on_busy": (self.on_busy, ("wait", "skip")),
        }
        for name, (value, allowed) in choices.items():
            if value not in allowed:
                raise ConfigError(f"{name}={value!r}: write one of {', '.join(allowed)}")
        for name in ("busy_timeout_s", "commit_timeout_s", "meeting_timeout_s"):
            seconds = getattr(self, name)
            if not isinstance(seconds, (int, float)) or not 0 < seconds < 1e7:
                raise ConfigError(f"{name}={seconds!r}: write seconds, more than 0")
        if not self.daemon and self.daemon is not False:
            raise ConfigError(f"daemon={self.daemon!r}: write True, False or the path of a socket")
        if self.slots != "auto" and not (type(self.slots) is int and 1 <= self.slots <= 64):
            raise ConfigError(f"slots={self.slots!r}: write 'auto' or a number from 1 to 64")
        for name in self.stop_signals:
            if name not in signal.Signals.__members__ or name in ("SIGKILL", "SIGSTOP"):
                raise ConfigError(
                    f"stop_signals={self.stop_signals!r}: write names of signals that can be heard, "
                    "such as ('SIGTERM',)"
                )
        if self.url.startswith("memory://") and self.daemon is not False:
            raise ConfigError("memory:// lives in this process: it goes with daemon=False only")
