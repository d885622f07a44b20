"""What `ckptd status` shows: an engine's state as JSON. No storage options, no secrets."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import msgspec

from ckptd.version import __version__

if TYPE_CHECKING:
    from ckptd.engine.clients import Client
    from ckptd.engine.jobs import Job
    from ckptd.engine.state import Engine


def report(engine: Engine, now: float) -> bytes:
    """Return a JSON object: version, pid, counters, and each job with its open steps."""
    tally = engine.tally
    body: dict[str, Any] = {
        "version": __version__,
        "pid": os.getpid(),
        "is_draining": engine.is_draining,
        "committed": tally.committed,
        "failed": tally.failed,
        "skipped": tally.skipped,
        "unknown": tally.unknown,
        "store_errors": tally.store_errors,
        "raw_bytes": tally.raw_bytes,
        "stored_bytes": tally.stored_bytes,
        "last_commit": tally.last_commit.short if tally.last_commit else None,
        "last_commit_age_s": None if tally.last_commit_at is None else now - tally.last_commit_at,
        "last_failure": tally.last_failure,
        "last_skip": tally.last_skip,
        "jobs": [_job(engine, job, now) for job in engine.jobs.values()],
        "kept": [_kept(client, now) for client in engine.memory.kept],
    }
    return msgspec.json.encode(body)


def _kept(client: Client, now: float) -> dict[str, Any]:
    """Return what a dead trainer left in memory."""
    arena = client.arena
    return {
        "root": client.hello.root,
        "attempt": client.hello.attempt,
        "rank": client.hello.rank,
        "steps": sorted(snapshot.handoff.step for snapshot in client.snapshots.values()),
        "bytes": arena.slots * arena.slot_bytes if arena else 0,
        "left_s": max(0.0, (client.kept_until or now) - now),
    }


def _job(engine: Engine, job: Job, now: float) -> dict[str, Any]:
    ranks = sorted(
        client.hello.rank
        for client in engine.clients.values()
        if client.is_here and client.job == (job.root, job.attempt)
    )
    return {
        "root": job.root,
        "attempt": job.attempt,
        "world_size": job.world_size,
        "ranks_here": ranks,
        "ranks_dead": sorted(job.dead),
        "newest": job.newest.short if job.newest else None,
        "open": [
            {
                "step": step.key.id.step,
                "sequence": step.sequence,
                "age_s": now - step.since,
                "parts": {str(rank): part.state for rank, part in sorted(step.parts.items())},
                "ending": step.doom.reason if step.doom else None,
            }
            for step in job.steps.values()
        ],
    }
