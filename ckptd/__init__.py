"""ckptd: a distributed training checkpoint daemon for PyTorch.

Names of the training side are loaded when they are first used, so that the daemon and the command
line run without torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ckptd.errors import (
    CheckpointError,
    CkptdError,
    ConfigError,
    LayoutError,
    SaveFailedError,
    StoreError,
    TornRestoreError,
)
from ckptd.version import __version__

_HOMES = {
    "Checkpoint": "ckptd.model.checkpoint",
    "Checkpointer": "ckptd.trainer.checkpointer",
    "Handle": "ckptd.trainer.handle",
    "PerRank": "ckptd.trainer.values",
    "RNGState": "ckptd.trainer.rng",
    "Resumed": "ckptd.trainer.filling",
    "load": "ckptd.trainer.loading",
    "restore": "ckptd.trainer.restoring",
    "errors": "ckptd.errors",
}

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "Checkpointer",
    "CkptdError",
    "ConfigError",
    "Handle",
    "LayoutError",
    "PerRank",
    "RNGState",
    "Resumed",
    "SaveFailedError",
    "StoreError",
    "TornRestoreError",
    "__version__",
    "load",
    "restore",
]

if TYPE_CHECKING:
    from ckptd.model.checkpoint import Checkpoint
    from ckptd.trainer.checkpointer import Checkpointer
    from ckptd.trainer.filling import Resumed
    from ckptd.trainer.handle import Handle
    from ckptd.trainer.loading import load
    from ckptd.trainer.restoring import restore
    from ckptd.trainer.rng import RNGState
    from ckptd.trainer.values import PerRank


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'ckptd' has no attribute {name!r}")
    module = import_module(_HOMES[name])
    return module if name == "errors" else getattr(module, name)
