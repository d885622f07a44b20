"""Types that several threads decode, made ready before there are any."""

from __future__ import annotations

from typing import Any

import msgspec


def make_ready(*types: Any) -> None:
    """Let msgspec look at types now: to be called where they are defined, as a module is imported.

    It looks at a type when it decodes one for the first time, and shows what it found to other
    threads before it is complete. Two first times at once end the process with a segmentation fault
    (seen with msgspec 0.22: a daemon that stored two first rank manifests).
    """
    for type_ in types:
        msgspec.json.Decoder(type_)
