"""Getting ready for the first save, while training begins."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping

import numpy as np

from ckptd.errors import CkptdError
from ckptd.model.tensor import Layout
from ckptd.plan.split import whole_share
from ckptd.shm.arena import round_up
from ckptd.trainer.agreement import Agreement
from ckptd.trainer.flatten import flatten
from ckptd.trainer.layouts import fingerprints, predicted_layout
from ckptd.trainer.link import Link
from ckptd.trainer.options import Options
from ckptd.trainer.recall import claim
from ckptd.trainer.snapshots import Snapshots

log = logging.getLogger("ckptd.trainer")


class Preparation:
    """Agrees with the other ranks who writes what, and reserves slots of the size that follows.

    `start` and `join` belong to the training thread; the work is done on one of its own.
    """

    def __init__(self, options: Options, agreement: Agreement, snapshots: Snapshots) -> None:
        self._options = options
        self._agreement = agreement
        self._snapshots = snapshots
        self._thread: threading.Thread | None = None
        self._link: Link | None = None

    def heir_of(self, link: Link) -> None:
        """Take an arena over that a dead trainer left, rather than make one beside it."""
        self._link = link

    def start(self, state: Mapping[str, object]) -> None:
        """Begin for a state; what was begun before is ended first.

        Raises:
            LayoutError: the state cannot be stored.
        """
        self.join()
        flat = flatten(state, allow_pickle=self._options.allow_pickle)
        layout = predicted_layout(state, flat)
        known: dict[str, int] = {}
        if not self._agreement.is_planned:  # one rank has nobody to compare itself with
            names = (leaf.fqn for leaf in flat.leaves)
            known = dict(zip(names, fingerprints(flat.leaves), strict=True))
        rows = [known.get(held.tensor.fqn, 0) for held in layout.held]
        self._agreement.prepare(layout, np.array(rows, "<u8").tobytes())
        if self._link is not None:
            self._snapshots.expect()
        self._thread = threading.Thread(
            target=self._reserve, args=(layout,), name="ckptd-prepare", daemon=True
        )
        self._thread.start()

    def join(self) -> None:
        """Wait until the thread has ended, if there is one."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _reserve(self, layout: Layout) -> None:
        self._take_over()
        self._agreement.wait_planned(self._options.plan_timeout_s)
        agreed = self._agreement.planned(layout)
        plan, share = (agreed.plan, agreed.share) if agreed else (None, whole_share(layout))
        try:
            cut = self._snapshots.cut(layout, plan, share)
            self._snapshots.reserve(
                cut.packed.slot_bytes, is_faulted=True, is_pinned=cut.is_on_cuda
            )
            self._snapshots.lay_out(cut)
        except CkptdError as error:
            log.error("slots could not be reserved ahead: %s", error)  # noqa: TRY400 - save raises it

    def _take_over(self) -> None:
        """Ask the daemon for the arena of a dead trainer, once. How large it must be shows later."""
        link, self._link = self._link, None
        if link is not None:
            slots = self._options.slots if isinstance(self._options.slots, int) else 1
            arena = None
            try:
                arena = claim(link, slots, round_up(1), self._options.busy_timeout_s)
            finally:
                self._snapshots.take_over(arena)
