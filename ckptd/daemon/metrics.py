"""An engine's counters for Prometheus."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ckptd.engine.state import Engine
from ckptd.errors import ConfigError

if TYPE_CHECKING:
    from prometheus_client.core import Metric


class EngineCollector:
    """Reads an engine's tally when a scrape asks; nothing is counted twice."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics as they are now."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily  # noqa: PLC0415

        tally = self._engine.tally
        steps = CounterMetricFamily("ckptd_steps", "Steps that got their verdict", labels=["state"])
        for state in ("committed", "failed", "skipped", "unknown"):
            steps.add_metric([state], getattr(tally, state))
        yield steps
        yield CounterMetricFamily(
            "ckptd_store_errors", "Store operations that failed", value=tally.store_errors
        )
        yield CounterMetricFamily(
            "ckptd_raw_bytes", "Bytes taken from slots", value=tally.raw_bytes
        )
        yield CounterMetricFamily("ckptd_stored_bytes", "Bytes stored", value=tally.stored_bytes)
        if tally.last_commit_at is not None:
            age = GaugeMetricFamily(
                "ckptd_last_commit_age_seconds", "Time since a checkpoint was last committed"
            )
            age.add_metric([], time.monotonic() - tally.last_commit_at)
            yield age


@contextmanager
def serve_metrics(address: str | None, engine: Engine) -> Iterator[None]:
    """Serve ``/metrics`` on ``host:port`` while the block runs; nothing if `address` is None.

    Raises:
        ConfigError: if the address cannot be used.
    """
    if address is None:
        yield
        return
    from prometheus_client import CollectorRegistry, start_http_server  # noqa: PLC0415

    host, _, port = address.rpartition(":")
    registry = CollectorRegistry()
    registry.register(EngineCollector(engine))
    try:
        server, thread = start_http_server(int(port), addr=host or "127.0.0.1", registry=registry)
    except (OSError, ValueError) as error:
        raise ConfigError(f"metrics cannot be served on {address}: {error}") from None
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
