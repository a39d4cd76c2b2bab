"""A web server with byte ranges on a free port, in a process of its own, that counts what it sends."""

import multiprocessing
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple


class Server(NamedTuple):
    """A server that runs: its address, and the bytes of all bodies that it has sent."""

    url: str
    sent: "multiprocessing.sharedctypes.Synchronized"


@contextmanager
def serve(folder: Path) -> Iterator[Server]:
    """Serve a folder until the end of the block."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    sent = context.Value("q", 0)
    process = context.Process(target=_serve, args=(folder, there, sent), daemon=True)
    process.start()
    try:
        yield Server(f"http://127.0.0.1:{here.recv()}", sent)
    finally:
        process.terminate()
        process.join()


def _serve(folder: Path, ready: Connection, sent: "multiprocessing.sharedctypes.Synchronized") -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, directory=folder)) as server:
        server.sent = sent
        ready.send(server.server_port)
        server.serve_forever()


class _Handler(SimpleHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        path = Path(self.translate_path(self.path))
        if not path.is_file():
            return self.send_error(404)
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            start, stop = (int(asked[1]), min(size, int(asked[2]) + 1)) if asked else (0, size)
            self.send_response(206 if asked else 200)
            if asked:
                self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{size}")
            self.send_header("Content-Length", str(stop - start))
            self.end_headers()
            self.wfile.flush()
            at = start
            while at < stop and (done := os.sendfile(self.connection.fileno(), file.fileno(), at, stop - at)):
                at += done
        with self.server.sent.get_lock():
            self.server.sent.value += at - start

    def log_message(self, *_: object) -> None:
        pass
