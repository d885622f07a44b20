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
        """Give the steps beyond `after`; what the caller does until the next one is that step.

        The last one is saved with ``wait``, so it is committed when the loop ends.
        """
        if self._preemption.ask():
            log.warning("preempted before the first step: there is nothing new to save")
            return
        left = (step for step in steps if after is None or step > after)
        step = next(left, None)
        while step is not None:
            yield step
            if self._preemption.ask():
                self._save_and_stop(step)
                return
            following = next(left, None)
            if self._is_saved(step, is_last=following is None):
                # Nothing comes after the last one: it is neither left out nor left behind.
                self._save(step, metrics=self._metrics(), wait=following is None)
            step = following

    def _is_saved(self, step: int, *, is_last: bool) -> bool:
        every = self._every
        return every is not None and (is_last or (step > 0 and step % every == 0))

    def _save_and_stop(self, step: int) -> None:
        """Save, and wait for the commit as long as there is time."""
        left_s = self._preemption.grace_left_s()
        try:
            self._save(step, metrics=self._metrics(), wait=True, deadline_s=left_s)
        except SaveUnknownError as error:  # it was handed off: all that could be done in time
            log.warning("preempted, and not known to be committed when the time was up: %s", error)
            return
        log.warning("preempted (%s): step %d is saved", self._preemption.reason, step)
