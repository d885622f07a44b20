"""On what terms a state is filled from a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch

from ckptd.errors import ConfigError

Rename = Mapping[str, str] | Callable[[str], str]
MapLocation = str | torch.device | Mapping[str, str] | Callable[[Any, str], Any] | None


class Terms(NamedTuple):
    """What `Checkpointer.resume`, `ckptd.restore` and `ckptd.load` may be told.

    Attributes:
        strict: what is wanted and not there raises, instead of being listed in ``missing``.
        rename: turns the name of a module's tensor in the checkpoint into its name in the state: a
            function, or a mapping of whole names and of prefixes that end with a dot (the longest
            wins). Optimizer state follows its parameter.
        map_location: where tensors go that the state does not hold yet, as in ``torch.load``.
        trust_pickle: open stored pickles, which can run any code.
        select: patterns as in ``fnmatch`` for names of the state (``*`` goes over dots and slashes);
            what none of them fits is not wanted, and left as it is.
        dtype: floating tensors of modules, and plain ones, that are of this dtype in the state may be
            of another floating dtype in the checkpoint. Optimizer state keeps its own.
    """

    strict: bool = True
    rename: Rename | None = None
    map_location: MapLocation = None
    trust_pickle: bool = False
    select: str | Sequence[str] | None = None
    dtype: torch.dtype | None = None

    def check(self) -> None:
        """Check what types cannot say.

        Raises:
            ConfigError: naming the argument.
        """
        if self.dtype is not None and not (
            isinstance(self.dtype, torch.dtype) and self.dtype.is_floating_point
        ):
            raise ConfigError(f"dtype={self.dtype!r}: give a floating dtype such as torch.bfloat16")
        patterns = self._patterns()
        if not all(isinstance(pattern, str) and pattern for pattern in patterns or ()):
            raise ConfigError(f"select={self.select!r}: give patterns such as 'model.encoder.*'")

    def wants(self, *names: str) -> bool:
        """Tell whether one of these names of the same thing is selected."""
        patterns = self._patterns()
        return patterns is None or any(
            fnmatchcase(name, pattern) for name in names for pattern in patterns
        )

    def may_cast(self, stored: torch.dtype | None, live: torch.dtype) -> bool:
        """Tell whether a stored tensor may go into a live one of another dtype."""
        return stored is not None and stored.is_floating_point and live is self.dtype

    def _patterns(self) -> Sequence[str] | None:
        return (self.select,) if isinstance(self.select, str) else self.select
