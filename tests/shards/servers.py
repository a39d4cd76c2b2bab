"""A real web server with byte ranges on a free port, which misbehaves when it is told to."""

import random
import re
import socket
import struct
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class FaultServer(ThreadingHTTPServer):
    """After ``good`` right answers it gives ``bad`` ones as ``fault`` says, and then right ones for ever.

    Attributes:
        url: Of the folder.
        ranges: Set it to False for a server that answers every request with the whole file.
        fault: ``error`` (500), ``reset`` (of the connection, before an answer), ``silence`` (no answer), ``half body``
            (then the connection ends), ``reset inside``, ``stall`` (half a body, then nothing), ``short range``,
            ``wrong length`` (a range that is shorter than the answer says), or ``flip`` (in a range, one bit of every
            kilobyte is another, each time elsewhere).
        requests: Asked so far.
        paths: That they asked for.
        authorizations: Their headers of that name, or None.
        most: Requests that waited for an answer at one time.
        seconds: That each answer takes.
    """

    def __init__(self, folder: Path):
        super().__init__(("127.0.0.1", 0), partial(RangeHandler, directory=folder))
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.ranges, self.fault, self.good, self.bad, self.seconds = True, "", 0, 0, 0.0
        self.paths: list[str] = []
        self.authorizations: list[str | None] = []
        self.most = self._now = 0
        self._lock = threading.Lock()
        self.ended = threading.Event()

    @property
    def requests(self) -> int:
        """Asked so far."""
        return len(self.paths)

    @contextmanager
    def request(self, handler: BaseHTTPRequestHandler) -> Iterator[str]:
        """Note a request, and yield the fault that its answer has, or nothing."""
        with self._lock:
            self.paths.append(handler.path)
            self.authorizations.append(handler.headers.get("Authorization"))
            self._now += 1
            self.most = max(self.most, self._now)
            fault = self.fault if self.bad and not self.good else ""
            self.good, self.bad = max(0, self.good - 1), self.bad - bool(fault)
        self.ended.wait(self.seconds)
        with self._lock:  # before the answer: the client may have it, and ask again, before this thread goes on
            self._now -= 1
        yield fault


class RangeHandler(SimpleHTTPRequestHandler):
    """The standard file server, plus byte ranges; faults are as ``FaultServer`` says."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else the body of each answer waits 40 ms for the client to confirm the header

    def do_GET(self):
        with self.server.request(self) as fault:
            self._answer(fault)

    def _answer(self, fault: str) -> None:
        if fault == "error":
            return self.send_error(500)
        if fault == "reset":
            return self._reset()
        if fault == "silence":
            return self._stand_still()
        try:
            data = Path(self.translate_path(self.path)).read_bytes()
        except FileNotFoundError:
            return self.send_error(404)
        found = self.server.ranges and re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        start, stop = (int(found[1]), int(found[2]) + 1) if found else (0, len(data))
        if start >= len(data) > 0:
            return self.send_error(416)
        half = start + (stop - start) // 2
        if fault == "flip":
            data = bytearray(data)
            for at in range(start, stop, 1024):
                data[random.randrange(at, min(at + 1024, stop))] ^= 1 << random.randrange(8)
        part = data[start : half if fault == "short range" else stop]
        self.send_response(206 if found else 200)
        self.send_header("Last-Modified", self.date_time_string())
        self.send_header("ETag", f'"{zlib.crc32(data):08x}"')
        if found:
            self.send_header("Content-Range", f"bytes {start}-{start + len(part) - 1}/{len(data)}")
        part = data[start:half] if fault == "wrong length" else part
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        if fault not in ("half body", "reset inside", "stall"):
            self.wfile.write(part)
            return None
        self.wfile.write(part[: len(part) // 2])
        self.wfile.flush()
        self.close_connection = True
        if fault == "reset inside":
            return self._reset()
        return self._stand_still() if fault == "stall" else None

    def _reset(self) -> None:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True

    def _stand_still(self) -> None:
        self.server.ended.wait(60)
        self.close_connection = True

    def finish(self):
        with suppress(OSError):  # the connection was reset
            super().finish()

    def log_message(self, *_):
        pass


@contextmanager
def serve_faults(folder: Path) -> Iterator[FaultServer]:
    """Yield a server of ``folder``, at its attribute ``url``."""
    with FaultServer(folder) as server:
        threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
        yield server
        server.ended.set()
        server.shutdown()
