"""The errors drydock reports to people; each one carries its exit status."""

from __future__ import annotations


class DrydockError(Exception):
    """A usage or environment error: one line that says what is wrong and what to do.

    The command line prints the message without a traceback and exits with `exit_status`.
    """

    exit_status = 2


class CheckFailed(DrydockError):
    """A check ran to its end and its answer is no (a drifted image, a failed tier)."""

    exit_status = 1


class OutOfSpace(DrydockError):
    """The disk that holds the store is full; nothing half written is left but downloads to resume."""
