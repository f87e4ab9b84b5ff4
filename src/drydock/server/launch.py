"""Asks an engine's own parser about the flags, says what it said, and becomes the engine's server.

A program, `python -P launch.py VERDICT PARSER MODULE FLAGS...`, in one process, because importing an engine's
parser takes seconds that a server should not pay twice. VERDICT is the handle of a pipe that gets one line of JSON:
{"accepted": {name: value}}, {"refused": reason} or {"broken": reason}. PARSER is `module:function`, see
`drydock.server.engines`. MODULE then runs as `python -m MODULE FLAGS...` does, or nothing when it is empty.
"""

from __future__ import annotations

import importlib
import json
import os
import runpy
import sys
import traceback
from pathlib import Path


def _judge(parser: str, flags: list[str]) -> dict[str, object]:
    # drydock need not be installed where the engine is, and the engine's processes need not see it.
    home = str(Path(__file__).resolve().parents[2])
    sys.path.append(home)
    try:
        module, _, function = parser.partition(":")
        return {"accepted": getattr(importlib.import_module(module), function)(flags)}
    except ImportError as error:
        return {"broken": _line(error)}
    except SystemExit as error:
        ended = f"the parser ended by itself (status {error.code}), as for --help or --version"
        return {"refused": error.code if isinstance(error.code, str) else ended}
    except Exception as error:
        return {"refused": _line(error)}
    finally:
        sys.path[:] = [path for path in sys.path if path is not home]


def _line(error: Exception) -> str:
    return "".join(traceback.format_exception_only(error)).strip()


def main(verdict: int, parser: str, module: str, flags: list[str]) -> int:
    # The engine's processes must not keep the pipe open.
    os.set_inheritable(verdict, False)
    sys.argv = [module or "flags", *flags]
    said = _judge(parser, flags)
    with os.fdopen(verdict, "w") as file:
        file.write(json.dumps(said, default=repr) + "\n")
    if "accepted" not in said:
        return 2
    if module:
        # As `__main__`, named by its module, so that the processes which multiprocessing spawns find it.
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4:]))
