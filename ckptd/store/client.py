"""What a remote store needs of a service: single requests, each tried once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, Protocol

from ckptd.errors import ConfigError
from ckptd.store.base import Buffer, Entry

REQUEST_TIMEOUT_S = 30.0
RETRY_S = 180.0


class Limits(NamedTuple):
    """How long one request may take, and how long one call may try again.

    A request of n bytes has `request_timeout_s` and the time that n bytes take at
    `slowest_bytes_s`; no new attempt starts later than `retry_s` after the first, or after
    `attempts`.
    """

    request_timeout_s: float = REQUEST_TIMEOUT_S
    slowest_bytes_s: int = 512 << 10
    retry_s: float = RETRY_S
    attempts: int = 6

    def timeout_s(self, count: int) -> float:
        """Return the whole deadline of a request that moves `count` bytes."""
        return self.request_timeout_s + count / self.slowest_bytes_s


class Page(NamedTuple):
    """Part of a listing; `after` asks for the next one, None ends it."""

    entries: list[Entry]
    after: str | None


class ObjectClient(Protocol):
    """Objects below one prefix of a service; `key` is relative to that.

    All methods may be called from any thread, send one request, end within `Limits.timeout_s` and
    raise errors of `ckptd.errors` that name the key.
    """

    def put(self, key: str, data: Buffer, *, if_absent: bool) -> bool:
        """Create an object, or with `if_absent` False replace it.

        Returns:
            False where the service says that it knows no condition; nothing was stored then.

        Raises:
            ObjectExistsError: `if_absent`, and there is one.
        """

    def get(self, key: str, *, max_bytes: int) -> bytes:
        """See `Store.get`."""

    def read_into(self, key: str, offset: int, out: memoryview) -> int:
        """See `Store.read_into`; `out` is not empty."""

    def size(self, key: str) -> int:
        """Return the length of an object.

        Raises:
            ObjectNotFoundError: there is none.
        """

    def page(self, prefix: str, after: str | None) -> Page:
        """Return a page of what is below `prefix`, names that are no keys included."""

    def delete(self, key: str) -> None:
        """See `Store.delete`."""

    def now_s(self) -> float:
        """See `Store.now_s`."""

    def renew(self) -> None:
        """Look for credentials anew."""

    @property
    def is_versioned(self) -> bool:
        """Whether an answer has shown that the service keeps what is deleted."""

    def close(self) -> None:
        """See `Store.close`."""


def split_options(options: Mapping[str, object]) -> tuple[Limits, dict[str, object]]:
    """Part the settings of `Limits` from those of the service.

    Raises:
        ConfigError: a limit is no number above zero.
    """
    rest = dict(options)
    chosen: dict[str, float] = {}
    for name in Limits._fields:
        if name in rest:
            value = rest.pop(name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 0:
                raise ConfigError(f"storage_options[{name!r}] must be a number above zero")
            if name == "attempts" and value != int(value):
                raise ConfigError("storage_options['attempts'] must be a whole number")
            chosen[name] = int(value) if name == "attempts" else value
    return Limits()._replace(**chosen), rest  # type: ignore[arg-type]
