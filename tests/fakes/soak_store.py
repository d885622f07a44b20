"""What a root must hold at every moment, whoever was killed."""

from __future__ import annotations

from ckptd.codec.records import decode_record
from ckptd.model import keys
from ckptd.model.keys import StepId
from ckptd.model.manifest import Outcome, RankManifest
from ckptd.pipeline.catalog import read_manifest
from ckptd.pipeline.commit import MAX_RECORD_BYTES
from ckptd.pipeline.verify import verify
from ckptd.store.local import LocalStore
from tests.fakes.trainers import assert_all_whole


class Ledger:
    """A root that is looked at again and again: what is there once never changes and never goes."""

    def __init__(self, root: str) -> None:
        self._root = root
        self._records: dict[StepId, bytes] = {}
        self._starts: dict[int, StepId | None] = {}
        self._verified: set[StepId] = set()

    @property
    def committed(self) -> list[StepId]:
        """What was committed when last looked, oldest first."""
        return sorted(id_ for id_, record in self._records.items() if record)

    @property
    def newest(self) -> StepId | None:
        return max(self.committed, default=None)

    def begin_attempt(self, ordinal: int, sees: StepId | None) -> None:
        """Note that an attempt starts, and what it must have seen committed when it did."""
        self._starts[ordinal] = sees

    def look(self) -> None:
        """Read the terminal records; verify the checkpoints that are new, with every byte."""
        store = LocalStore(self._root)
        try:
            found = {
                _step(entry.key): store.get(entry.key, max_bytes=MAX_RECORD_BYTES)
                for entry in store.list(keys.CHECKPOINTS)
            }
            for id_, record in self._records.items():
                assert found.get(id_) == record, f"the terminal record of {id_.short} changed"
            self._records = found
            for id_ in self.committed:
                if id_ not in self._verified:
                    assert verify(store, id_, is_data=True).damage == (), id_.short
                    self._verified.add(id_)
            self._check_line(store)
        finally:
            store.close()

    def check_all(self) -> None:
        """Verify everything once more."""
        self.look()
        store = LocalStore(self._root)
        try:
            assert assert_all_whole(store) == sorted(id_.step for id_ in self.committed)
        finally:
            store.close()

    def glance(self, worlds: dict[int, int]) -> tuple[StepId | None, StepId | None]:
        """Return the newest checkpoint, and the newest step that is one or lacks only its commit.

        `worlds` has the number of ranks of each attempt.
        """
        store = LocalStore(self._root)
        try:
            ended: dict[StepId, int] = {
                _step(entry.key): entry.bytes for entry in store.list(keys.CHECKPOINTS)
            }
            parts: dict[StepId, set[int]] = {}
            for entry in store.list(keys.RANKS):
                part = keys.parse_rank(entry.key)
                if part is not None and part[0] not in ended and _is_manifest(store, entry.key):
                    parts.setdefault(part[0], set()).add(part[1])
        finally:
            store.close()
        committed = [id_ for id_, size in ended.items() if size]
        whole = [id_ for id_, ranks in parts.items() if len(ranks) == worlds[id_.attempt]]
        return max(committed, default=None), max([*whole, *committed], default=None)

    def _check_line(self, store: LocalStore) -> None:
        """Check `previous`: in an attempt the one before, else what its start must have seen."""
        committed = self.committed
        for before, id_ in zip([None, *committed], committed, strict=False):
            said = read_manifest(store, id_).previous
            previous = None if said is None else StepId.parse(said)
            is_first = before is None or before.attempt != id_.attempt
            if not is_first:
                assert previous == before, f"{id_.short} follows {previous}, not {before}"
                continue
            assert previous is None or (previous in committed and previous < id_), id_.short
            least = self._starts.get(id_.attempt)
            assert least is None or (previous or (0, 0)) >= least, f"{id_.short} leads past {least}"


def _step(key: str) -> StepId:
    id_ = keys.parse_checkpoint(key)
    assert id_ is not None, key
    return id_


def _is_manifest(store: LocalStore, key: str) -> bool:
    data = store.get(key, max_bytes=MAX_RECORD_BYTES)
    return isinstance(decode_record(data, RankManifest | Outcome, key=key), RankManifest)
