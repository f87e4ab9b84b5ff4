"""What pytest's side and its watchdog say to each other: lines of JSON over a socket, and three signals."""

from __future__ import annotations

import json
import signal
from typing import Any

OUT = signal.SIGRTMAX - 6
"""To pytest: leave what you are in, it is over its budget. The kernel sends it too when the watchdog dies."""
DUMP = signal.SIGRTMAX - 5
"""To pytest: faulthandler writes every thread's stack.

Neither is one of the last: qemu, which keeps two for itself, has no 63 and 64 (to send one is EINVAL there).
"""
WAKE = signal.SIGURG
"""To pytest: nothing, but a call that blocks is left for a moment, in which Python runs handlers that are due.

One that a process ignores which has no handler of it, as pytest's has none at its very end.
"""


def pack(message: dict[str, Any]) -> bytes:
    """A message as its line."""
    return json.dumps(message, separators=(",", ":")).encode() + b"\n"


class Lines:
    """Messages out of the bytes of a stream."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[dict[str, Any]]:
        """The messages that these bytes complete."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        return [json.loads(line) for line in lines]
