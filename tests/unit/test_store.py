"""The store never holds a blob under a hash that is not its own, whatever happens to its writers."""

from __future__ import annotations

import errno
import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from drydock import store as store_module
from drydock.errors import DrydockError, OutOfSpace
from drydock.store import Store, disk_errors


def names(store: Store) -> set[str]:
    return {path.name for path in store.blobs.iterdir()}


def test_a_blob_is_named_by_its_hash(tmp_path: Path) -> None:
    store = Store(tmp_path)
    assert store.put(b"hello") == hashlib.sha256(b"hello").hexdigest()
    assert names(store) == {hashlib.sha256(b"hello").hexdigest()}
    assert store.has(store.put(b"hello"), 5)
    assert not store.has(store.put(b"hello"), 6)


def test_a_writer_that_fails_leaves_nothing(tmp_path: Path) -> None:
    store = Store(tmp_path)

    def half() -> None:
        with store.writer() as blob:
            blob.write(b"half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        half()
    assert names(store) == set()
    assert list(store.tmp.iterdir()) == []


def test_adopting_a_file_of_another_hash_is_refused_and_removes_it(tmp_path: Path) -> None:
    store = Store(tmp_path)
    path = store.tmp / "download"
    path.write_bytes(b"not what was promised")
    with pytest.raises(DrydockError, match="hashes to sha256:"):
        store.adopt(path, "0" * 64)
    assert not path.exists()
    assert names(store) == set()


def test_a_killed_writer_is_swept_and_a_living_one_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path)
    code = (
        "import sys, time; from pathlib import Path; from drydock.store import Store\n"
        "with Store(Path(sys.argv[1])).writer() as blob, Store(Path(sys.argv[1])).scratch() as folder:\n"
        "    blob.write(b'x' * 4096); blob.flush(); (folder / 'work').touch(); print('writing', flush=True)\n"
        "    time.sleep(60)\n"
    )
    writers = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE)
        for _ in range(2)
    ]
    try:
        for writer in writers:
            assert writer.stdout
            assert writer.stdout.readline() == b"writing\n"
        writers[0].send_signal(signal.SIGKILL)
        writers[0].wait()
        assert len(list(store.tmp.iterdir())) == 4
        store.sweep()
        assert len(list(store.tmp.iterdir())) == 4, "what is only just made may be about to be locked"
        monkeypatch.setattr(store_module, "SETTLED", -1.0)
        store.sweep()
        assert len(list(store.tmp.iterdir())) == 2, "the dead writer's go, the living one's stay"
        assert names(store) == set()
    finally:
        for writer in writers:
            writer.kill()
            writer.wait()


def test_a_partial_download_survives_the_sweep(tmp_path: Path) -> None:
    store = Store(tmp_path)
    part = store.tmp / f"{'0' * 64}.part"
    part.touch()
    os.utime(part, (time.time() - 3600,) * 2)
    store.sweep()
    assert part.exists()


@pytest.mark.parametrize(("number", "kind", "words"), [
    (errno.ENOSPC, OutOfSpace, "no space left"),
    (errno.EDQUOT, OutOfSpace, "no space left"),
    (errno.EROFS, DrydockError, "DRYDOCK_STORE"),
])  # fmt: skip
def test_disk_faults_are_one_line(number: int, kind: type[DrydockError], words: str, tmp_path: Path) -> None:
    with pytest.raises(kind, match=words) as raised, disk_errors(tmp_path):
        raise OSError(number, os.strerror(number))
    assert "\n" not in str(raised.value)
    assert raised.value.exit_status == 2


def test_a_record_that_cannot_be_read_counts_as_none(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.write_record("layers", "key", {"digest": "x"})
    assert store.read_record("layers", "key") == {"digest": "x"}
    (tmp_path / "layers" / "key.json").write_text('{"dig')
    assert store.read_record("layers", "key") is None
