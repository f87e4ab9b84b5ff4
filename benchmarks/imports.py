"""How long an engine takes to import in its image, with the image's bytecode and without any.

Without: PYTHONPYCACHEPREFIX names an empty folder, so that Python looks for bytecode there and never beside
the sources, and PYTHONDONTWRITEBYTECODE keeps that folder empty. Every module is then compiled from its
source, the standard library's too, as in an image built without bytecode; what such an image would also
spend on writing what it compiled is not counted. Nothing is written in either case, and both begin with a run
that is not counted, so that the page cache holds what they read.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from argparse import Namespace
from pathlib import Path
from typing import cast

from common import Document, Parser, main, say

from drydock.definition import Image
from drydock.errors import DrydockError
from drydock.oci import read_image
from drydock.project import open_store, project_root
from drydock.runtime import RESULTS, Choice, Task, choose
from drydock.tiers.device import device_for

INSIDE = """
import json, os, pathlib, subprocess, sys, tempfile, time

module, runs, target = sys.argv[1], int(sys.argv[2]), sys.argv[3]
empty = tempfile.mkdtemp()
both = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
environments = {"with": both, "without": {**both, "PYTHONPYCACHEPREFIX": empty}}
# Through vars: some modules answer to every name, or import what is asked of them.
count = '''
import os, sys, types
modules = [vars(module) for module in list(sys.modules.values()) if isinstance(module, types.ModuleType)]
files = {spec.cached for spec in (module.get("__spec__") for module in modules) if spec and spec.cached}
print(len(files), sum(map(os.path.exists, files)))
'''
seconds, facts = {"with": [], "without": []}, {}
for run in range(runs + 1):
    for name, environment in environments.items():
        code = f"import {module}" + ("" if run else count)
        began = time.monotonic()
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
        ended = time.monotonic()
        if done.returncode:
            sys.stderr.write(done.stderr)
            sys.exit(done.returncode)
        if run:
            seconds[name].append(ended - began)
            print(f"run {run} of {runs}, {name} bytecode: {ended - began:.2f} s", file=sys.stderr, flush=True)
        else:
            modules, cached = done.stdout.split()[-2:]
            facts[name] = {"modules": int(modules), "modules-with-bytecode": int(cached)}
left = sum(len(files) for _, _, files in os.walk(empty))
pathlib.Path(target).write_text(json.dumps({"seconds": seconds, "facts": facts, "written": left}))
"""
"""What runs in the image: imports in processes of their own, the two cases in turn."""


def measure(arguments: Namespace) -> Document:
    if arguments.runs < 1:
        raise DrydockError(f"--runs {arguments.runs}: it takes one at least")
    if not all(part.isidentifier() for part in arguments.module.split(".")):
        raise DrydockError(f"--module {arguments.module!r} is not the name of a module")
    root = project_root()
    image = Image.named(root, arguments.image)
    kind = image.definition.accelerator.kind
    store = open_store(root)
    built = read_image(store, image.name)
    runtime = choose(cast(Choice, arguments.runtime))
    runtime.prepare(store, built)
    say(f"{image.name} in {runtime.name}: {arguments.module}, {arguments.runs} runs each after a warm-up")
    with tempfile.TemporaryDirectory(prefix="drydock-benchmark-") as results:
        task = Task(
            command=(
                "python",
                "-c",
                INSIDE,
                arguments.module,
                str(arguments.runs),
                f"{RESULTS}/imports.json",
            ),
            checkout=root,
            results=Path(results),
            accelerator=kind if device_for(kind).here() else "none",
        )
        status = runtime.run(store, built, task)
        if status:
            raise DrydockError(
                f"importing {arguments.module} in {image.name} ended with status {status}: see above"
            )
        found = json.loads((Path(results) / "imports.json").read_text())
    cases = {
        name: {
            "median-seconds": round(statistics.median(seconds), 3),
            "seconds": [round(value, 3) for value in seconds],
            **found["facts"][name],
        }
        for name, seconds in found["seconds"].items()
    }
    medians = {name: statistics.median(seconds) for name, seconds in found["seconds"].items()}
    return {
        "image": image.name,
        "digest": f"sha256:{built.digest}",
        "runtime": runtime.name,
        "module": arguments.module,
        "with-bytecode": cases["with"],
        "without-bytecode": cases["without"],
        "bytecode-written": found["written"],
        "ratio": round(medians["without"] / medians["with"], 2),
        "notes": {"without-bytecode": " ".join((__doc__ or "").split("\n\n")[1].split())},
    }


def table(document: Document) -> str:
    lines = [f"{document['image']} in {document['runtime']}: import {document['module']}"]
    for name in ("with-bytecode", "without-bytecode"):
        case = document[name]
        cached = f"{case['modules-with-bytecode']} of {case['modules']} modules had bytecode"
        lines.append(
            f"{name.replace('-', ' '):<18} {case['median-seconds']:>7.2f} s  "
            f"median of {len(case['seconds'])}; {cached}"
        )
    lines.append(f"{'ratio':<18} {document['ratio']:>7.2f}")
    return "\n".join([*lines, "", document["notes"]["without-bytecode"]])


def _parser() -> Parser:
    parser = Parser(prog="imports.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("image", metavar="IMAGE", help="a built image, as `drydock images` lists them")
    parser.add_argument("--module", default="vllm.entrypoints.openai.api_server", help="what to import")
    parser.add_argument("--runs", type=int, default=5, metavar="N", help="counted runs of each kind")
    parser.add_argument("--runtime", choices=("auto", "docker", "chroot"), default="auto")
    return parser


if __name__ == "__main__":
    main(_parser(), measure, table)
