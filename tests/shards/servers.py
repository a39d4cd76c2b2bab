"""A real web server with byte ranges on a free port, which misbehaves when it is told to."""

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class FaultServer(ThreadingHTTPServer):
    """After ``good`` right answers it gives ``bad`` ones as ``fault`` says, and then right ones for ever.

    Attributes:
        requests: Asked so far.
        fault: ``error`` (500), ``half body`` (and the connection ends) or ``short range``.
    """

    def __init__(self, folder: Path):
        super().__init__(("127.0.0.1", 0), partial(RangeHandler, directory=folder))
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.fault, self.good, self.bad, self.requests = "", 0, 0, 0
        self._lock = threading.Lock()

    def next_fault(self) -> str:
        """Return the fault of the answer whose turn it is, or nothing."""
        with self._lock:
            self.requests += 1
            if self.good:
                self.good -= 1
                return ""
            if self.bad:
                self.bad -= 1
                return self.fault
            return ""


class RangeHandler(SimpleHTTPRequestHandler):
    """The standard file server, plus byte ranges; faults are as ``FaultServer`` says."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        fault = self.server.next_fault()
        if fault == "error":
            return self.send_error(500)
        try:
            with open(self.translate_path(self.path), "rb") as file:
                data = file.read()
        except FileNotFoundError:
            return self.send_error(404)
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        start, stop = (int(found[1]), int(found[2]) + 1) if found else (0, len(data))
        part = data[start : stop - (stop - start) // 2 if fault == "short range" else stop]
        self.send_response(206 if found else 200)
        if found:
            self.send_header("Content-Range", f"bytes {start}-{start + len(part) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        if fault == "half body":
            self.wfile.write(part[: len(part) // 2])
            self.close_connection = True
        else:
            self.wfile.write(part)

    def log_message(self, *_):
        pass


@contextmanager
def serve_faults(folder: Path) -> Iterator[FaultServer]:
    """Yield a server of ``folder``, at its attribute ``url``."""
    with FaultServer(folder) as server:
        threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
        yield server
        server.shutdown()
