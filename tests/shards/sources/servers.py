"""Real servers for the tests of sources: S3 (moto's) and HTTP with ranges, on free ports."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import obstore

from tests.shards.servers import serve_faults


class AnswerHandler(BaseHTTPRequestHandler):
    """Answers with the status that the path names, or in a way that few servers do."""

    protocol_version = "HTTP/1.1"
    body = b"a body"

    def do_GET(self):
        name = unquote(urlsplit(self.path).path).rpartition("/")[2]
        if name.isdigit():
            self.send_response(int(name))
            self.send_header("Content-Length", str(len(self.body)))
            self.end_headers()
            self.wfile.write(self.body)
        elif name == "loop":
            self.send_response(302)
            self.send_header("Location", "/loop")
            self.send_header("Content-Length", "0")
            self.end_headers()
        elif name == "close":
            self.send_response(200)
            self.send_header("Connection", "close")
            self.end_headers()
            self.wfile.write(self.body)
        else:
            self.send_response(200)
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            self.wfile.write(b"%x\r\n%s\r\n" % (len(self.body), self.body))
            whole = name == "chunked"
            if name == "cut twice":
                whole = self.server.cuts == 0
                self.server.cuts -= 1
            if whole:
                self.wfile.write(b"0\r\n\r\n")
            self.close_connection = True

    def log_message(self, *_):
        pass


@contextmanager
def answering() -> Iterator[str]:
    """Yield the URL of a web server of ``AnswerHandler``."""
    with ThreadingHTTPServer(("127.0.0.1", 0), AnswerHandler) as server:
        server.cuts = 2
        threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@contextmanager
def serve(folder: Path) -> Iterator[str]:
    """Yield the URL of a web server that serves ``folder``."""
    with serve_faults(folder) as server:
        yield server.url


def upload(folder: Path, url: str) -> str:
    """Copy all files below ``folder`` to a bucket's prefix; return its URL."""
    store = obstore.store.from_url(url, client_options={"allow_http": True})
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            obstore.put(store, path.relative_to(folder).as_posix(), path)
    return url
