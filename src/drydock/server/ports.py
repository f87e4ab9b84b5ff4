"""A port that stays ours: chosen by the kernel, held, and who listens on it."""

from __future__ import annotations

import contextlib
import socket
from pathlib import Path

HOST = "127.0.0.1"
LISTEN = "0A"
ADDRESSES = {
    "0100007F", "00000000", "0" * 32, "0" * 16 + "FFFF00000100007F",
}  # fmt: skip
"""127.0.0.1 and the wildcards that cover it, as /proc/net/tcp and tcp6 write them on a little-endian machine."""


def hold() -> socket.socket:
    """A socket on a port of 127.0.0.1 that nobody has, and nobody is given while it is open.

    It never listens, so a server that sets SO_REUSEADDR, as they all do, has the port beside it. The kernel
    gives the port to nobody who asks for any port, whatever the options: only a process that names it, and sets
    SO_REUSEADDR too, can have it, which is why readiness looks at who listens.
    """
    held = socket.socket()
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    held.bind((HOST, 0))
    return held


def listeners(port: int) -> set[int]:
    """The inode numbers of the sockets that get connections to this port of 127.0.0.1."""
    found = set()
    for name in ("tcp", "tcp6"):
        with contextlib.suppress(FileNotFoundError):  # a kernel without IPv6
            for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]:
                fields = line.split()
                address, _, number = fields[1].partition(":")
                if fields[3] == LISTEN and int(number, 16) == port and address in ADDRESSES:
                    found.add(int(fields[9]))
    return found
