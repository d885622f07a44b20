"""The loop that saves and stops by itself."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping

from ckptd.errors import ConfigError, SaveUnknownError
from ckptd.trainer.preempting import Preemption

log = logging.getLogger("ckptd.trainer")

Metrics = Callable[[], Mapping[str, float]]


class Stepping:
    """What `Checkpointer.steps` does between two steps.

    Args:
        preemption: asked once before the first step and once after each, so all ranks ask alike.
        save: `Checkpointer.save` without the state.
        every: save the steps that are multiples of this, and the last one; None: save none of them.
        metrics: called for what goes with each save.

    Raises:
        ConfigError: `every` is no number of steps.
    """

    def __init__(
        self,
        preemption: Preemption,
        save: Callable[..., object],
        every: int | None,
        metrics: Metrics | None,
    ) -> None:
        if every is not None and not (type(every) is int and every > 0):
            raise ConfigError(f"every={every!r}: give a number of steps, 1 or more, or None")
        self._preemption = preemption
        self._save = save
        self._every = every
        self._metrics = metrics or dict

    def walk(self, steps: Iterable[int], after: int | None) -> Iterator[int]:
        """Give the steps beyond `after`; what the caller does until the next one is that step."""
        if self._preemption.ask():
            log.warning("preempted before the first step: there is nothing new to save")
            return
        last = saved = None
        for step in steps:
            if after is not None and step <= after:
                continue
            yield step
            last = step
            if self._preemption.ask():
                self._save_and_stop(step)
                return
            if self._every is not None and step > 0 and step % self._every == 0:
                self._save(step, metrics=self._metrics())
                saved = step
        if self._every is not None and last is not None and last != saved:
            self._save(last, metrics=self._metrics())

    def _save_and_stop(self, step: int) -> None:
        """Save, and wait for the commit as long as there is time."""
        left_s = self._preemption.grace_left_s()
        try:
            self._save(step, metrics=self._metrics(), wait=True, deadline_s=left_s)
        except SaveUnknownError as error:  # it was handed off: all that could be done in time
            log.warning("preempted, and not known to be committed when the time was up: %s", error)
            return
        log.warning("preempted (%s): step %d is saved", self._preemption.reason, step)
