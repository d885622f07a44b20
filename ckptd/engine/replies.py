"""What an engine answers, and how it reads what it was told."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from ckptd.engine.events import Drop, Effect, Send
from ckptd.engine.steps import Closed
from ckptd.errors import ProtocolError
from ckptd.model.keys import StepId
from ckptd.wire import messages as say


def refuse(client: int, reason: str, kind: str = ProtocolError.__name__) -> Iterator[Effect]:
    """Yield a refusal and the end of the connection. `kind` names a class of `errors`."""
    yield Send(client, say.Refused(kind, reason))
    yield Drop(client)


def finished(sequence: int, closed: Closed) -> say.Finished:
    """Return the final word on one save of a step."""
    verdict = closed.verdict_on(sequence)
    assert verdict.state != "waiting"
    return say.Finished(
        closed.step,
        sequence,
        verdict.state,
        verdict.kind,
        verdict.reason,
        verdict.fqn,
        verdict.ranks,
    )


def without_memory(message: say.Lent | say.Ceded) -> say.Lent | say.Ceded:
    """Return what is said in its place where there is no descriptor to send beside it."""
    return say.Lent(message.arena) if isinstance(message, say.Lent) else say.Ceded()


def decode_values(data: bytes) -> dict[str, object]:
    """Read the values of a handoff.

    Raises:
        ProtocolError: they are not a JSON object.
    """
    try:
        return msgspec.json.decode(data, type=dict[str, object])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError(f"values that are not a JSON object: {error}") from None


def parse_id(text: str | None) -> StepId | None:
    """Read the step id in a message.

    Raises:
        ProtocolError: it is none.
    """
    try:
        return None if text is None else StepId.parse(text)
    except ValueError as error:
        raise ProtocolError(str(error)) from None
