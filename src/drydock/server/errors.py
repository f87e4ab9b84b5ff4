"""What can be wrong with a server; where it has a log, the text ends with the log's last lines."""

from __future__ import annotations


class ServerError(Exception):
    """The server did not do what it must."""


class FlagError(ServerError):
    """The engine's own parser refuses the flags; no server was started."""


class NoAnswer(ServerError, TimeoutError):
    """A request had no complete answer by its deadline."""


class NoConnection(ServerError, ConnectionError):
    """The server was not there to answer: it ended, was stopped, or broke the connection."""
