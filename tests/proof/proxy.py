"""A proxy before an S3 server, which misbehaves when it is told to: python tests/proof/proxy.py PORT SERVER_PORT.

``POST /-/KIND/COUNT`` spoils that many answers from now on. ``GET /-/`` tells how many were spoiled so far, how many of
the objects that were to be in them were not read as they are since, and how many answers were sound since the last one
that was not.

error    500, and nothing else
reset    of the connection, before an answer
cut      half a body, then the connection ends
stall    half a body, then nothing more comes
flip     a bit of the body is another one; of objects, not of a list of names, which nothing can check
"""

import http.client
import random
import socket
import struct
import sys
import threading
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

KINDS = ("error", "reset", "cut", "stall", "flip")
STALLED = 30.0  # seconds; clients give up before
PASSED_ON = ("Content-Type", "Content-Range", "ETag", "Last-Modified", "Accept-Ranges")


class Proxy(ThreadingHTTPServer):
    """Passes requests on.

    Args:
        port: Of its own.
        server: Port of the server.

    Attributes:
        spoiled: Answers so far.
        owed: Paths of those of which no answer was sound since.
        sound: Answers since the proxy was started, or one was spoiled.
    """

    daemon_threads = True

    def __init__(self, port: int, server: int):
        super().__init__(("127.0.0.1", port), Handler)
        self.server, self.spoiled, self.owed, self.sound = server, 0, set[str](), 0
        self._kind, self._left, self._lock = "", 0, threading.Lock()

    def spoil(self, kind: str, count: int) -> None:
        """Spoil so many answers from now on."""
        with self._lock:
            self._kind, self._left = kind, count

    def counts(self) -> tuple[int, int, int]:
        """Return answers spoiled, objects that are owed, answers that were sound since."""
        with self._lock:
            return self.spoiled, len(self.owed), self.sound

    def next(self, path: str) -> str:
        """Return what is to happen to the answer to a request, or nothing."""
        with self._lock:
            if not self._left or (self._kind == "flip" and "list-type=" in path):
                self.owed.discard(path)
                self.sound += 1
                return ""
            self._left -= 1
            self.spoiled, self.sound = self.spoiled + 1, 0
            self.owed.add(path)
            return self._kind


class Handler(BaseHTTPRequestHandler):
    """One connection of a client."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_POST(self):
        _, _, kind, count = self.path.split("/")
        self.server.spoil(kind, int(count))
        self._send(200, {}, b"")

    def do_GET(self):
        if self.path == "/-/":
            return self._send(200, {}, b"%d %d %d" % self.server.counts())
        try:
            status, headers, body = self._ask()
        except OSError:
            return self._end(reset=True)  # as when the server itself is gone
        fault = self.server.next(self.path) if self.command == "GET" and status < 300 else ""
        if fault == "error":
            return self._send(500, {}, b"")
        if fault == "reset":
            return self._end(reset=True)
        if fault == "flip":
            at = random.randrange(len(body))
            body = body[:at] + bytes([body[at] ^ 1 << random.randrange(8)]) + body[at + 1 :]
        if fault not in ("cut", "stall"):
            return self._send(status, headers, body)
        self._send(status, headers, body[: len(body) // 2], len(body))
        if fault == "stall":
            threading.Event().wait(STALLED)
        return self._end()

    def do_HEAD(self):
        self.do_GET()

    def _ask(self) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.server.server, timeout=20)
        try:
            connection.request(self.command, self.path, headers=dict(self.headers))
            answer = connection.getresponse()
            headers = {name: answer.headers[name] for name in PASSED_ON if name in answer.headers}
            length = answer.headers["Content-Length"] if self.command == "HEAD" else None
            return answer.status, headers | ({"Content-Length": length} if length else {}), answer.read()
        except http.client.HTTPException as error:
            raise OSError(error) from None
        finally:
            connection.close()

    def _send(self, status: int, headers: dict[str, str], body: bytes, length: int | None = None) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body) if length is None else length)} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)
        self.wfile.flush()

    def _end(self, reset: bool = False) -> None:
        self.close_connection = True
        if reset:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()

    def handle(self):
        with suppress(OSError):  # the client went away, or was sent away
            super().handle()

    def finish(self):
        with suppress(OSError, ValueError):
            super().finish()

    def log_message(self, *_):
        pass


if __name__ == "__main__":
    Proxy(int(sys.argv[1]), int(sys.argv[2])).serve_forever()
