"""A server that speaks just enough of OpenAI's API, with a fault to plant; run by the harness as a real engine is.

Also what stands for other people's servers, see `Foreign`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import mmap
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

kept_mapped: list[Any] = []
BEGIN, END = "fake: weights begin to load", "fake: weights have loaded"


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fake", allow_abbrev=False)
    parser.add_argument("--model")
    parser.add_argument("--name")
    parser.add_argument("--host")
    parser.add_argument("--port", type=int)
    parser.add_argument("--max-model-len", type=int, default=2048)
    parser.add_argument("--reuse-port", action="store_true")
    parser.add_argument("--fault", action="append", default=[])
    return parser


def parse(flags: list[str]) -> dict[str, Any]:
    """What the launcher asks; a parser that hangs, crashes or is missing can be planted too."""
    parser = make_parser()

    def refuse(words: str) -> None:
        raise SystemExit(words)

    parser.error = refuse  # type: ignore[method-assign,assignment]
    values = vars(parser.parse_args(flags))
    if "parser-hangs" in values["fault"]:
        print("fake: parses", flush=True)
        time.sleep(600)
    if "parser-crashes" in values["fault"]:
        os.kill(os.getpid(), signal.SIGSEGV)
    if "no-engine" in values["fault"]:
        import engine_that_is_not_there  # noqa: F401
    if "parser-raises" in values["fault"]:
        raise TypeError("--this requires --that")
    return values


class Handler(BaseHTTPRequestHandler):
    server: Listener

    def log_message(self, *_: object) -> None:
        pass

    def answer(self, document: object, status: int = 200) -> None:
        data = json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self) -> None:
        self.do_POST()

    def do_POST(self) -> None:
        size = int(self.headers.get("Content-Length", 0))
        body = json.loads(self.rfile.read(size)) if size else {}
        faults = self.server.faults
        path = self.path
        if "503" in faults:
            self.answer({"error": "still loading"}, 503)
        elif "200" in faults:
            self.answer({})
        elif "hang" in faults or path == "/hang":
            time.sleep(600)
        elif "drip" in faults or path == "/drip":
            self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
            with contextlib.suppress(OSError):
                while True:
                    self.wfile.write(b" ")
                    time.sleep(0.05)
        elif path == "/exit":
            os._exit(7)
        elif path == "/exit-held":
            # A child that has the connection open, as a forked worker has: the client sees no end of it.
            if os.fork() == 0:
                time.sleep(600)
            os._exit(7)
        elif path == "/break":
            self.close_connection = True
        elif path == "/text":
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"plain words")
        elif path == "/big":
            self.answer("x" * 3_000_000)
        elif path == "/echo":
            self.answer(body)
        elif path == "/meet":
            # Answered when as many requests as this one says are here together.
            self.server.meeting.acquire()
            self.server.present += 1
            self.server.meeting.notify_all()
            met = self.server.meeting.wait_for(lambda: self.server.present >= body["together"], 30)
            self.server.meeting.release()
            self.answer(body, 200 if met else 500)
        elif path == "/reload":
            if body.get("whole") is False:
                print("fake: some weights were left out", flush=True)
            self.answer({"success": body.get("success", True)})
        elif path == "/v1/completions":
            if "late-log" in faults:
                tell_of_loading(slow=False)
            name = body.get("model") if "echo" in faults else self.server.name
            if body.get("model") != name:
                self.answer({"error": f"the model {body.get('model')} does not exist"}, 404)
            elif not isinstance(body.get("prompt"), str):
                self.answer({"error": "prompt must be text"}, 400)
            elif "choices" in body:
                self.answer({"model": name, "choices": body["choices"]})
            else:
                text = body["prompt"][::-1][: body.get("max_tokens")]
                self.answer({"model": name, "choices": [{"text": text, "finish_reason": "length"}]})
        else:
            self.answer({"error": f"no path {path}"}, 404)


class Listener(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = (
        128  # of 5, as it is otherwise, some of many at once are lost and come again much later
    )

    def __init__(self, port: int, *, name: str, faults: list[str], reuse_port: bool) -> None:
        self.name = name
        self.faults = faults
        self.present = 0
        self.meeting = threading.Condition()
        self.allow_reuse_port = reuse_port
        super().__init__(("127.0.0.1", port), Handler)

    def server_bind(self) -> None:
        if self.allow_reuse_port:  # Python 3.11 does not know it
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        super().server_bind()


class Foreign(contextlib.ExitStack):
    """Somebody else's server on a port that is held for another, in this process."""

    def __init__(self, port: int, *, name: str = "another-model", faults: tuple[str, ...] = ()) -> None:
        super().__init__()
        listener = Listener(port, name=name, faults=list(faults), reuse_port=True)
        thread = threading.Thread(target=listener.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        self.callback(thread.join)
        self.callback(listener.server_close)
        self.callback(listener.shutdown)


def leave(*, group: bool = True, environment: bool = False, title: bool = False) -> None:
    """Start a process that outlives everything: a double fork into a session of its own."""
    if os.fork():
        os.wait()
        return
    if group:
        os.setsid()
    if os.fork():
        os._exit(0)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    # The token, by which the tests find it, stays in the command line where it leaves the environment.
    token = os.environ["FAKE_TOKEN"]
    variables = {} if environment else dict(os.environ)
    script = "import time; time.sleep(600)"
    if title:
        # As setproctitle does: the title is written over the arguments and the environment behind them.
        script = (
            "import ctypes, os, time\n"
            "fields = open('/proc/self/stat').read().rpartition(')')[2].split()\n"
            "start, end = int(fields[45]), int(fields[48])\n"
            f"title = b'FAKE::Worker {token}'\n"
            "ctypes.memmove(start, title.ljust(end - start, b'\\0'), end - start)\n"
            "time.sleep(600)\n"
        )
    os.execve(sys.executable, [sys.executable, "-I", "-S", "-c", script, token], variables)


def main() -> None:
    values = make_parser().parse_args()
    faults: list[str] = values.fault
    print("fake: begins", flush=True)
    if "exit-3" in faults:
        print("fake: no such device", flush=True)
        sys.exit(3)
    if "exit-0" in faults:
        sys.exit(0)
    if "segv" in faults:
        os.kill(os.getpid(), signal.SIGSEGV)
    if mapped := os.environ.get("FAKE_MAPS"):
        with Path(mapped).open("wb+") as file:
            file.write(b"load")
            file.flush()
            kept_mapped.append(mmap.mmap(file.fileno(), 4))
    if told := os.environ.get("FAKE_SEMAPHORE"):
        lock = multiprocessing.get_context("spawn").Lock()
        kept_mapped.append(lock)
        Path(told).write_text(f"/dev/shm/sem.{lock._semlock.name[1:]}")
        # Its tracker would remove it at the end; SGLang kills that with the rest of itself.
        os.kill(resource_tracker._resource_tracker._pid, signal.SIGKILL)
    if "leave-files" in faults:
        Path(tempfile.gettempdir(), "folder").mkdir()
        socket.socket(socket.AF_UNIX).bind(f"{tempfile.gettempdir()}/socket")
    if "child" in faults:
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    if "ignore-sigterm" in faults:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    else:
        signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    if "leave-group" in faults:
        leave()
    if "leave-environment" in faults:
        leave(environment=True)
    if "leave-title" in faults:
        leave(title=True)
    if "never-bind" in faults:
        time.sleep(600)
    if "log" in faults:
        line = b"fake: the same line again and again\n" * 30_000
        for _ in range(100):
            os.write(1, line)
    listener = Listener(values.port, name=values.name, faults=faults, reuse_port=values.reuse_port)
    if "late-log" not in faults:
        tell_of_loading("slow" in faults)
    if "exit-after-load" in faults:
        sys.exit(0)
    listener.serve_forever(0.05)


def tell_of_loading(slow: bool) -> None:
    print(BEGIN, flush=True)
    time.sleep(0.6 if slow else 0)
    print(END, flush=True)
    time.sleep(0.6 if slow else 0)


if __name__ == "__main__":
    main()
