"""Debian's docker-registry on loopback: a registry that others wrote, for tests."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest


@contextlib.contextmanager
def debian_registry(folder: Path) -> Iterator[str]:
    """Run it with its storage in a folder; its host and port. Skips where it is not installed, or fails as CI wants."""
    program = shutil.which("docker-registry")
    if not program:
        if os.environ.get("DRYDOCK_REQUIRE_DOCKER"):
            pytest.fail("DRYDOCK_REQUIRE_DOCKER is set, and docker-registry is not installed")
        pytest.skip("docker-registry is not installed (a Debian package)")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        host = f"127.0.0.1:{free.getsockname()[1]}"
    settings = {
        "version": 0.1,
        "storage": {"filesystem": {"rootdirectory": str(folder / "registry")}},
        "http": {"addr": host},
    }
    # JSON is YAML.
    (folder / "registry.yml").write_text(json.dumps(settings))
    command = [program, "serve", str(folder / "registry.yml")]
    with (folder / "registry.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 20
        while True:
            try:
                httpx.get(f"http://{host}/v2/", trust_env=False)
                break
            except httpx.TransportError:
                assert time.monotonic() < deadline, (folder / "registry.log").read_text()[-2000:]
                time.sleep(0.05)
        yield host
    finally:
        process.terminate()
        process.wait()
