"""A data set in an S3 server, moto's, behind the proxy of proxy.py; both are processes that can be killed."""

import os
import subprocess
import sys
import urllib.request
from pathlib import Path

from launch.local import free_port
from tests.slurm.cluster import wait_for

BUCKET = "proof"
PORT = 17290  # of all proxies, one after the other; none that the system gives to clients
PROXY = Path(__file__).with_name("proxy.py")


class Storage:
    """The server, the proxy, and what is in the bucket; to be used in a ``with`` statement.

    Args:
        data: Folder of the data set.

    Attributes:
        url: Of the data set in the bucket.
        environment: That tells a process of Patchmill where the server is, and how long to wait for it.
    """

    def __init__(self, data: Path):
        self.url, self._data = f"s3://{BUCKET}/data", data
        self._before = 0  # answers that were spoiled by proxies which were killed
        self._processes: list[subprocess.Popen] = []
        self.environment = {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{PORT}",
            "AWS_ALLOW_HTTP": "true",
            "AWS_REGION": "us-east-1",
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "PATCHMILL_STORE_TIMEOUT_SECONDS": "5",
            "PATCHMILL_STORE_RETRY_SECONDS": "120",
        }

    def __enter__(self) -> "Storage":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def start(self) -> None:
        """Start the server, fill the bucket, and only then let anybody at it."""
        server = free_port()
        try:
            self._run("-m", "moto.server", "-H", "127.0.0.1", "-p", str(server))
            wait_for(lambda: _answers(f"http://127.0.0.1:{server}/"), 60, "moto to start")
            _ask(f"http://127.0.0.1:{server}/{BUCKET}", "PUT")
            for path in sorted(self._data.rglob("*")):
                if path.is_file():
                    name = path.relative_to(self._data).as_posix()
                    _ask(f"http://127.0.0.1:{server}/{BUCKET}/data/{name}", "PUT", path.read_bytes())
            self._run(str(PROXY), str(PORT), str(server))
            wait_for(lambda: _answers(self._proxy), 20, "the proxy to start")
        except BaseException:
            self._end()
            raise

    def kill(self) -> None:
        """Kill server and proxy: connections break off, and new ones are refused."""
        self._before = self.spoiled
        self._end()

    def spoil(self, kind: str, count: int) -> None:
        """Spoil so many answers from now on; kinds are the proxy's."""
        _ask(f"{self._proxy}{kind}/{count}", "POST")

    @property
    def spoiled(self) -> int:
        """Answers spoiled so far."""
        return self._before + self._counts()[0]

    @property
    def is_read(self) -> bool:
        """Whether each object of a spoiled answer was read as it is since, and anything since the server started."""
        _, owed, sound = self._counts()
        return not owed and sound > 0

    def _counts(self) -> tuple[int, int, int]:
        spoiled, owed, sound = map(int, _ask(self._proxy, "GET").split())
        return spoiled, owed, sound

    @property
    def _proxy(self) -> str:
        return f"http://127.0.0.1:{PORT}/-/"

    def _run(self, *arguments: str) -> None:
        self._processes.append(
            subprocess.Popen(
                [sys.executable, *arguments], env={**os.environ, "OMP_NUM_THREADS": "1"},
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            )
        )  # fmt: skip

    def _end(self) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.wait(30)
        self._processes = []


def _ask(url: str, method: str, data: bytes | None = None) -> bytes:
    request = urllib.request.Request(url, method=method, data=data, headers={"Content-Type": "application/x-tar"})
    with urllib.request.urlopen(request, timeout=30) as answer:
        return answer.read()


def _answers(url: str) -> bool:
    try:
        _ask(url, "GET")
    except OSError:
        return False
    return True
