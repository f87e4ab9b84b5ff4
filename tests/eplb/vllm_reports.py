"""What vLLM's workers are told and asked through /collective_rpc."""

# contract: vllm
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from checks import Report

from drydock.server import Server


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
