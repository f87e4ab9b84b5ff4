"""Carry a built image to a machine without network, in parts, leaving out what that machine already holds.

A lent GPU machine may take 60 MB a time and have no registry in reach, yet hold gigabytes of the same CUDA
libraries. So it is asked once what it has (`probe`), the image is packed as the difference (`pack`), and put
together there bit for bit (`unpack`), every file by its hash; `drydock verify --full` then judges it as any
other image. What drydock itself needs there is an archive of its own (`tools`), for that machine's Python.

    target:  python3 carry.py probe FOLDER... > have.json.gz
    here:    tools/carry.py tools TOOLS.tar.gz --python 3.12
    here:    tools/carry.py pack h100-vllm have.json.gz OUT [--near FOLDER] [--after IMAGE]
    target:  python3 carry.py unpack STORE PART... [--wait SECONDS]

`unpack` needs the zstandard module, all else is the standard library, since the target has no drydock yet.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, BinaryIO

SMALLEST = 16 << 10
"""Bytes from which a file of the target is worth knowing: below, the name costs as much as the content."""
PATCHED = 1 << 20
"""Bytes from which a file that differs from the target's of the same name is sent as the difference."""
LEVEL = 12
CARRIED, INDEX = "carried", "index.json"
"""Folder in the store, with one for each image that is being put together, and what in it says of whose bytes."""
WINDOW = 29
"""log2 of how many bytes back a repetition is found; a target has to hold so much in memory."""


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hashes(paths: list[Path]) -> dict[Path, str]:
    """sha256 of files, in threads: hashing runs outside Python's lock."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(paths, pool.map(sha256, paths), strict=True))


def files(folder: Path, smallest: int = 0) -> Iterator[Path]:
    for parent, _, names in os.walk(folder):
        for name in names:
            path = Path(parent, name)
            if not path.is_symlink() and path.stat().st_size >= smallest:
                yield path


def probe(folders: list[Path]) -> None:
    """Write what the folders hold, sha256 -> path, to standard output as gzipped JSON."""
    found = hashes([path for folder in folders for path in files(folder, SMALLEST)])
    sys.stdout.buffer.write(
        gzip.compress(json.dumps({digest: str(path) for path, digest in found.items()}).encode())
    )


class Parts(io.RawIOBase):
    """A stream written into files `part-000`, `part-001` and so on, of at most `size` bytes."""

    def __init__(self, folder: Path, size: int) -> None:
        self.folder, self.size, self.count, self.left = folder, size, 0, 0
        self.file: BinaryIO | None = None
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob("part-*"):
            old.unlink()

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        view, done = memoryview(data), 0
        while done < len(view):
            if not self.left:
                if self.file:
                    self.file.close()
                self.file = (self.folder / f"part-{self.count:03}").open("wb")
                self.count, self.left = self.count + 1, self.size
            step = view[done : done + self.left]
            self.file.write(step)  # type: ignore[union-attr]  # opened above when nothing was left
            done, self.left = done + len(step), self.left - len(step)
        return done

    def close(self) -> None:
        if self.file:
            self.file.close()
        super().close()


def pack(
    image: str, have: Path, out: Path, near: Path | None, size: int, after: list[str], level: int
) -> None:
    """Write the parts of an image that a target lacks.

    Parameters:
        after: images that were put together there before this one, whose layers it has.
        have: what `probe` wrote there.
        near: a folder with files that the target has too, to make differences against (wheels of another
            Python, unpacked, hold nearly the same libraries).
        size: bytes of a part.
        level: zstd's.
    """
    import zstandard

    from drydock.oci import read_image
    from drydock.project import open_store, project_root
    from drydock.unpack import folder, unpack

    began = time.monotonic()
    store = open_store(project_root())
    built = read_image(store, image)
    unpack(store, built.layers)
    known: dict[str, str] = json.loads(gzip.decompress(have.read_bytes()))
    sources = _sources(known, near)
    there = {folder(store, layer) for name in after for layer in read_image(store, name).layers}
    roots = sorted({folder(store, layer) for layer in built.layers} - there)
    all_files = hashes([path for root in roots for path in files(root)])
    index: list[dict[str, Any]] = []
    # Images hold much twice (a library for two releases of CUDA, modules beside their bytecode), hundreds of MB apart.
    parameters = zstandard.ZstdCompressionParameters.from_level(
        level, window_log=WINDOW, enable_ldm=True, threads=os.cpu_count() or 1
    )
    compressor = zstandard.ZstdCompressor(compression_params=parameters)
    with Parts(out, size) as parts, compressor.stream_writer(parts, closefd=False) as stream, tarfile.open(
        fileobj=stream, mode="w|", format=tarfile.GNU_FORMAT
    ) as tar:  # fmt: skip
        for record in ("images", "layers"):
            for path in sorted((store.root / record).glob("*.json")):
                if record == "layers" or path.stem == image:
                    tar.add(path, f"{record}/{path.name}")
        for path in _in_order(roots):
            member = tar.gettarinfo(path, str(path.relative_to(store.root)))
            if not member.isreg():
                tar.addfile(member)
                continue
            digest = all_files[path]
            row = {"path": member.name, "sha256": digest, "mode": member.mode, "mtime": member.mtime}
            if digest in known and member.size >= SMALLEST:
                index.append({**row, "from": known[digest]})
            elif member.size >= PATCHED and path.name in sources:
                source, there = sources[path.name]
                patch = _patch(source.read_bytes(), path.read_bytes(), level)
                name = f"{CARRIED}/{image}/{len(index)}"
                _add(tar, name, patch)
                index.append({**row, "from": there, "patch": name})
            else:
                with path.open("rb") as file:
                    tar.addfile(member, file)
        _add(tar, f"{CARRIED}/{image}/{INDEX}", json.dumps(index).encode())
    total = sum(path.stat().st_size for path in all_files)
    lent = sum((store.root / row["path"]).stat().st_size for row in index)
    sent = sum(path.stat().st_size for path in out.glob("part-*"))
    print(
        f"{image}: {total / 1e9:.2f} GB, of which the target has {lent / 1e9:.2f} GB or nearly; "
        f"{sent / 1e6:.0f} MB in {parts.count} parts, {time.monotonic() - began:.0f} s"
    )


def _in_order(roots: list[Path]) -> list[Path]:
    """All that is in folders, and they: a folder before what is in it, then files of one kind and name together."""
    folders: list[Path] = []
    rest: list[Path] = []
    for root in roots:
        for parent, below, names in os.walk(root):
            below.sort()
            folders.append(Path(parent))
            rest += [Path(parent, name) for name in names]
            rest += [Path(parent, name) for name in below if Path(parent, name).is_symlink()]
    return [*folders, *sorted(rest, key=lambda path: (path.suffix, path.name, path))]


def _sources(known: dict[str, str], near: Path | None) -> dict[str, tuple[Path, str]]:
    """File name -> a file here, and where the target has the same one."""
    local = hashes(list(files(near, PATCHED))) if near else {}
    return {path.name: (path, known[digest]) for path, digest in local.items() if digest in known}


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def _patch(source: bytes, target: bytes, level: int) -> bytes:
    """The target in terms of the source: zstd with the source as its dictionary, as `zstd --patch-from` does."""
    import zstandard

    parameters = zstandard.ZstdCompressionParameters.from_level(
        level,
        window_log=max(len(source), len(target)).bit_length(),
        enable_ldm=True,
        threads=os.cpu_count() or 1,
    )
    dictionary = zstandard.ZstdCompressionDict(source, dict_type=zstandard.DICT_TYPE_RAWCONTENT)
    return zstandard.ZstdCompressor(dict_data=dictionary, compression_params=parameters).compress(target)


def tools(out: Path, python: str, platform: str) -> None:
    """Write what drydock depends on, as locked and by its hashes, installed for another machine's Python.

    Parameters:
        python: that Python's version, as `3.12`.
        platform: uv's name of the machine, as `x86_64-manylinux_2_28`.

    Raises:
        SystemExit: uv cannot, and has said why.
    """
    from uv import find_uv_bin

    root = Path(__file__).parents[1]
    target = ("--python-version", python, "--python-platform", platform, "--quiet")
    with tempfile.TemporaryDirectory() as name:
        needed, site = Path(name, "needed.txt"), Path(name, "site")
        for command in (
            # Of the whole lock, what drydock itself needs; uv resolves and builds, which is not done there.
            ["compile", "pyproject.toml", "--constraint", "lock/drydock.txt", "--no-emit-package", "uv",
             "--output-file", needed],
            # The hashes are the lock's: of the index's own a replaced wheel would have the right one.
            ["install", "--target", site, "--no-deps", "--require-hashes", "--only-binary", ":all:",
             "--requirement", needed, "--constraint", "lock/drydock.txt"],
        ):  # fmt: skip
            done = subprocess.run(
                [find_uv_bin(), "pip", *command, *target], cwd=root, stdout=subprocess.DEVNULL
            )
            if done.returncode:
                sys.exit(f"carry: uv ended with status {done.returncode}")
        with tarfile.open(out, "w:gz", compresslevel=6) as tar:
            tar.add(site, ".")
    print(f"what drydock needs for Python {python} on {platform}: {out.stat().st_size / 1e6:.0f} MB")


def unpack(store: Path, parts: list[Path], wait: float) -> None:
    """Put the image together in a store, and check every file that did not travel by its hash.

    Parameters:
        wait: seconds for which a part may be still to come, whole, under its name (`mv` puts it there so).

    Raises:
        SystemExit: a part is missing or cut off, or a file came out with another hash; the line names it.
    """
    import zstandard

    began = time.monotonic()
    store.mkdir(parents=True, exist_ok=True)
    indexes: list[Path] = []
    with _Joined(sorted(parts), wait) as stream:
        decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 31)
        reader = decompressor.stream_reader(stream, read_across_frames=True)
        try:
            with tarfile.open(fileobj=reader, mode="r|") as tar:
                tar.extractall(store, _noted(tar, indexes), filter="fully_trusted")
        except (tarfile.TarError, zstandard.ZstdError, EOFError) as error:
            sys.exit(f"carry: a part is missing or cut off ({error}): send them all again")
    if not indexes:
        sys.exit("carry: the parts end before their index: send them all again")
    index_file = store / indexes[-1]
    index = json.loads(index_file.read_text())

    def make(row: dict[str, Any]) -> str | None:
        source = Path(row["from"]).read_bytes()
        data = source
        if "patch" in row:
            dictionary = zstandard.ZstdCompressionDict(source, dict_type=zstandard.DICT_TYPE_RAWCONTENT)
            data = zstandard.ZstdDecompressor(dict_data=dictionary, max_window_size=1 << 31).decompress(
                (store / row["patch"]).read_bytes()
            )
        if hashlib.sha256(data).hexdigest() != row["sha256"]:
            return f"{row['path']} does not come out of {row['from']}: probe the target again"
        path = store / row["path"]
        path.write_bytes(data)
        path.chmod(row["mode"])
        os.utime(path, (row["mtime"], row["mtime"]))
        return None

    # A few at a time, the slow ones first: each is held whole in memory.
    index.sort(key=lambda row: "patch" not in row)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        wrong = [text for text in pool.map(make, index) if text]
    if wrong:
        sys.exit(f"carry: {wrong[0]} ({len(wrong)} of {len(index)} files)")
    shutil.rmtree(index_file.parent)
    print(f"{len(index)} files from this machine's own, all by their hash; {time.monotonic() - began:.0f} s")


def _noted(tar: tarfile.TarFile, indexes: list[Path]) -> Iterator[tarfile.TarInfo]:
    """All that is in the tar; the index among it is put on the list."""
    for member in tar:
        if Path(member.name).match(f"{CARRIED}/*/{INDEX}"):
            indexes.append(Path(member.name))
        yield member


class _Joined(io.RawIOBase):
    """Files read one after another, each as soon as it is there."""

    def __init__(self, parts: list[Path], wait: float) -> None:
        self.parts = list(parts)
        self.wait = wait
        self.file: IO[bytes] | None = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while True:
            if self.file is None:
                if not self.parts:
                    return 0
                self.file = self._next().open("rb")
            if count := self.file.readinto(buffer):  # type: ignore[attr-defined]
                return int(count)
            self.file.close()
            self.file = None

    def _next(self) -> Path:
        part, deadline = self.parts.pop(0), time.monotonic() + self.wait
        while not part.exists():
            if time.monotonic() >= deadline:
                sys.exit(f"carry: {part} is not there: send it")
            time.sleep(0.1)
        return part


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(required=True, dest="command")
    ask = commands.add_parser("probe")
    ask.add_argument("folders", nargs="+", type=Path)
    make = commands.add_parser("pack")
    make.add_argument("image")
    make.add_argument("have", type=Path)
    make.add_argument("out", type=Path)
    make.add_argument("--near", type=Path)
    make.add_argument("--after", action="append", default=[], metavar="IMAGE")
    make.add_argument("--megabytes", type=int, default=60)
    make.add_argument("--level", type=int, default=LEVEL, help="zstd's: how hard to compress")
    ours = commands.add_parser("tools")
    ours.add_argument("out", type=Path)
    ours.add_argument("--python", default="3.12")
    ours.add_argument("--platform", default="x86_64-manylinux_2_28")
    put = commands.add_parser("unpack")
    put.add_argument("store", type=Path)
    put.add_argument("parts", nargs="+", type=Path)
    put.add_argument(
        "--wait", type=float, default=0.0, metavar="SECONDS", help="for a part that is still to come"
    )
    options = parser.parse_args()
    if options.command == "probe":
        probe(options.folders)
    elif options.command == "pack":
        size = options.megabytes * 10**6
        pack(options.image, options.have, options.out, options.near, size, options.after, options.level)
    elif options.command == "tools":
        tools(options.out, options.python, options.platform)
    else:
        unpack(options.store, options.parts, options.wait)


if __name__ == "__main__":
    main()
