"""What an engine answers, and how it reads what it was told."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from ckptd.engine.events import Drop, Effect, Send
from ckptd.errors import ProtocolError
from ckptd.pipeline.commit import Verdict
from ckptd.wire import messages as say


def refuse(client: int, reason: str, kind: str = ProtocolError.__name__) -> Iterator[Effect]:
    """Yield a refusal and the end of the connection. `kind` names a class of `errors`."""
    yield Send(client, say.Refused(kind, reason))
    yield Drop(client)


def finished(step: int, sequence: int, verdict: Verdict) -> say.Finished:
    """Return the final word on a step."""
    assert verdict.state != "waiting"
    return say.Finished(
        step, sequence, verdict.state, verdict.kind, verdict.reason, verdict.fqn, verdict.ranks
    )


def decode_values(data: bytes) -> dict[str, object]:
    """Read the values of a handoff.

    Raises:
        ProtocolError: they are not a JSON object.
    """
    try:
        return msgspec.json.decode(data, type=dict[str, object])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError(f"values that are not a JSON object: {error}") from None
