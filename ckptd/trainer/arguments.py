"""What `save` is given besides the state, checked."""

from __future__ import annotations

from collections.abc import Mapping

from ckptd.errors import ConfigError
from ckptd.model.keys import MAX_STEP


def check_step(step: int, *, after: int | None) -> None:
    """Check a step; `after` is the one saved last, None before the first save.

    Raises:
        ConfigError: it is no step, or not a later one.
    """
    if type(step) is not int or not 0 <= step <= MAX_STEP:
        raise ConfigError(f"step {step!r}: give a whole number from 0 to {MAX_STEP}")
    if after is not None and step < after:
        raise ConfigError(
            f"step {step} after step {after}: steps only grow. To go back, resume an older step "
            "with a new Checkpointer"
        )


def numbers_of(metrics: Mapping[str, object]) -> dict[str, float]:
    """Return metrics as plain floats, since tensors and numpy scalars do not travel.

    Raises:
        ConfigError: naming the metric that is no number.
    """
    return {_name(name, value): _number(name, value) for name, value in metrics.items()}


def _name(name: object, value: object) -> str:
    if not isinstance(name, str):
        raise _refusal(name, value)
    return str(name)


def _number(name: object, value: object) -> float:
    if isinstance(value, (str, bytes)):
        raise _refusal(name, value)
    if hasattr(value, "detach"):  # a tensor that requires a gradient would warn
        value = value.detach()
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError, RuntimeError):  # of a tensor with many elements
        raise _refusal(name, value) from None


def _refusal(name: object, value: object) -> ConfigError:
    return ConfigError(f"metric {name!r} is {value!r:.80}: metrics are names and numbers")
