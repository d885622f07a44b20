"""What an engine has done so far, for status and metrics."""

from __future__ import annotations

from dataclasses import dataclass

from ckptd.model.keys import StepId
from ckptd.pipeline.commit import Verdict


@dataclass
class Tally:
    """Counters since the start. `last_commit_at` is on the engine's own clock."""

    committed: int = 0
    failed: int = 0
    skipped: int = 0
    unknown: int = 0
    store_errors: int = 0
    raw_bytes: int = 0
    stored_bytes: int = 0
    last_commit: StepId | None = None
    last_commit_at: float | None = None
    last_failure: str = ""
    last_skip: str = ""

    def count(self, verdict: Verdict, step: StepId, now: float) -> None:
        """Count a final verdict."""
        if verdict.state == "committed":
            self.committed += 1
            self.last_commit, self.last_commit_at = step, now
            return
        if verdict.state == "skipped":  # chosen, so it does not hide what failed
            self.skipped += 1
            self.last_skip = verdict.reason
            return
        self.last_failure = verdict.reason
        if verdict.state == "unknown":
            self.unknown += 1
        else:
            self.failed += 1
