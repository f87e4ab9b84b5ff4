"""Nothing of a server is left when it is stopped."""

from __future__ import annotations

import socket

import pytest

from drydock.server import Server


@pytest.mark.stops_the_server
def test_stopping_leaves_no_process_and_no_port(server: Server) -> None:
    assert server.survivors(), "a running server must be seen, or the check below proves nothing"
    with socket.create_connection(("127.0.0.1", server.port), timeout=5):
        pass
    assert server.stop() == {}, "the server had to be killed"
    assert server.survivors() == {}
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", server.port), timeout=5)
