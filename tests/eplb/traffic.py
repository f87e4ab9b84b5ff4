"""Requests to a server: many at once, and streams whose every token has its time."""

# contract: vllm
from __future__ import annotations

import http.client
import json
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from checks import Report, require

from drydock.server import Server


def complete_all(server: Server, prompts: Sequence[str], *, max_tokens: int, at_once: int = 16) -> list[str]:
    """Greedy completions, in the order of the prompts, `at_once` in flight."""

    def one(prompt: str) -> str:
        text: str = server.complete(prompt, max_tokens=max_tokens, temperature=0.0, ignore_eos=True)["text"]
        return text

    with ThreadPoolExecutor(at_once) as pool:
        return list(pool.map(one, prompts))


def stream(
    server: Server, prompt: str, *, max_tokens: int, timeout: float = 60.0
) -> Iterator[tuple[str, float]]:
    """A greedy completion: each piece of text as it comes, with the seconds a reader waited for it.

    Raises:
        OSError: no connection, or silence for `timeout` seconds.
    """
    body = {
        "model": server.model, "prompt": prompt, "max_tokens": max_tokens,
        "temperature": 0.0, "ignore_eos": True, "stream": True,
    }  # fmt: skip
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=timeout)
    last = time.monotonic()
    try:
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        for line in connection.getresponse():
            if line.startswith(b"data: {"):
                last, before = time.monotonic(), last
                yield json.loads(line[6:])["choices"][0]["text"], last - before
    finally:
        connection.close()


def check_stall(gaps: Sequence[float], budget: float) -> None:
    """No reader waited longer than `budget` seconds for the next token."""
    require(max(gaps) <= budget, "stall within its budget", f"{max(gaps):.2f} s between tokens, not {budget}")


def rpc(server: Server, method: str, *arguments: Any) -> None:
    """Call a method of every worker; the API returns the first engine's answer only, so none is returned."""
    server.request("/collective_rpc", {"method": method, "args": list(arguments)}, timeout=120.0)


def reports(server: Server, folder: Path, ranks: int) -> list[Report]:
    """What every rank's `EplbProbe` reports at this moment, by rank, each at a step of its own.

    Raises:
        LookupError: not every rank reported.
    """
    for file in folder.glob("rank-*.json"):
        file.unlink()
    rpc(server, "eplb_report", str(folder))
    found = [folder / f"rank-{rank}.json" for rank in range(ranks)]
    if missing := [file.name for file in found if not file.exists()]:
        raise LookupError(f"{', '.join(missing)}: not written, though /collective_rpc was answered")
    return [json.loads(file.read_text()) for file in found]


def settled(server: Server, folder: Path, ranks: int, timeout: float = 60.0) -> list[Report]:
    """What the ranks report when they stand still, all after the same step.

    Raises:
        TimeoutError: they go on stepping for `timeout` seconds.
    """
    deadline = time.monotonic() + timeout
    before: list[int] = []
    while time.monotonic() < deadline:
        found = reports(server, folder, ranks)
        now = [report["steps"] for report in found]
        if now == before:
            return found
        before = now
        time.sleep(1.0)
    raise TimeoutError(f"the ranks did not come to rest in {timeout:.0f} s, and are at steps {before}")
