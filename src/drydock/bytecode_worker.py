"""Compiles the Python files of archives to unchecked-hash .pyc; runs under the image's own Python.

Standard library only, and started by path: the image's Python knows nothing of drydock. Reads one JSON
job a line from standard input, {"archive", "sources": {member: installed path}, "output"}, and answers each
with one line, {"compiled", "skipped"}. Every job runs in a process forked from the same pristine state, so
that no archive's bytes depend on what was compiled before it.
"""

import gc
import json
import os
import sys
import tarfile
import warnings
import zipfile
from collections.abc import Iterator
from importlib._bootstrap_external import _code_to_hash_pyc  # type: ignore[attr-defined]
from importlib.util import source_hash
from typing import Any


def read_sources(job: dict[str, Any]) -> Iterator[tuple[str, bytes]]:
    """Yield (installed path, source bytes) for each source of the job."""
    wanted = job["sources"]
    if zipfile.is_zipfile(job["archive"]):
        with zipfile.ZipFile(job["archive"]) as archive:
            for member, path in wanted.items():
                yield path, archive.read(member)
        return
    with tarfile.open(job["archive"]) as archive:
        for member, path in wanted.items():
            stream = archive.extractfile(member)
            assert stream is not None
            yield path, stream.read()


def compile_job(job: dict[str, Any]) -> dict[str, int]:
    compiled = skipped = 0
    with zipfile.ZipFile(job["output"], "w", zipfile.ZIP_STORED) as output:
        for path, source in read_sources(job):
            try:
                code = compile(source, "/" + path, "exec", dont_inherit=True, optimize=0)
            except (SyntaxError, ValueError, RecursionError):
                # Templates and files for other versions of Python: they are shipped and never imported.
                skipped += 1
                continue
            output.writestr(zipfile.ZipInfo(path), _code_to_hash_pyc(code, source_hash(source), False))
            compiled += 1
    return {"compiled": compiled, "skipped": skipped}


def main() -> None:
    warnings.simplefilter("ignore")
    # Each job's process ends after one archive; collecting its garbage only costs time.
    gc.disable()
    for line in sys.stdin:
        job = json.loads(line)
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            status = 1
            try:
                os.write(writer, json.dumps(compile_job(job)).encode())
                status = 0
            except BaseException as error:
                said = {"error": f"{type(error).__name__}: {error}", "errno": getattr(error, "errno", None)}
                os.write(writer, json.dumps(said).encode())
            finally:
                os._exit(status)
        os.close(writer)
        with os.fdopen(reader, "rb") as answer:
            answered = answer.read().decode()
        os.waitpid(child, 0)
        try:
            print(answered or '{"error": "the compiler was killed"}', flush=True)
        except BrokenPipeError:
            # The builder is gone, and with it everybody who could be told.
            os._exit(1)


if __name__ == "__main__":
    main()
