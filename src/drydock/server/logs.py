"""A server's log: a heading for each start, the last lines, and what has appeared in it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO

BLOCK = 1 << 20
TAIL = 1 << 16


class Log:
    """One start's part of a log file, which is appended to.

    Parameters:
        path: the file; it need not be there yet.
        title: its heading.
    """

    def __init__(self, path: Path, title: str) -> None:
        self.path = path
        self.output: IO[bytes] = path.open("ab", buffering=0)
        self.output.write(f"==== {time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())} {title}\n".encode())
        self._began = self.position = self.output.tell()

    def tail(self, lines: int) -> str:
        """The last lines since the heading."""
        with self.path.open("rb") as file:
            file.seek(max(self._began, file.seek(0, 2) - TAIL))
            return "\n".join(file.read(TAIL).decode(errors="replace").splitlines()[-lines:])

    def skip(self) -> None:
        """Forget what has been written so far, for `appeared`."""
        self.position = self.path.stat().st_size

    def appeared(self, texts: Sequence[str]) -> bool:
        """Whether one of the texts is in what was written since `position`, which moves on behind it."""
        wanted = [text.encode() for text in texts]
        overlap = max(map(len, wanted)) - 1
        with self.path.open("rb") as file:
            end = file.seek(0, 2)
            while self.position < end:
                file.seek(self.position)
                block = file.read(BLOCK)
                ends = [block.index(text) + len(text) for text in wanted if text in block]
                if ends:
                    self.position += min(ends)
                    return True
                if self.position + len(block) >= end:
                    break
                # A text may begin at the end of this block.
                self.position += len(block) - overlap
        # Or it may not be written to its end yet.
        self.position = max(self.position, end - overlap)
        return False
