"""One run on several nodes: node 0 goes through the plan, and tells the others what to start with it."""

import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import timedelta

from torch.distributed import TCPStore

from launch.start import Start
from shards.errors import PatchmillError, StoppedOnRequestError, UserError, error_of

JOIN = 600.0  # seconds that the nodes may be apart when they start
LEAVE = 30.0  # seconds that node 0 stays for the others to hear of the end
CONNECT = 5.0  # seconds that a connection may take
LOOK = 0.2


def address_of(endpoint: str) -> tuple[str, int]:
    """Return host and port.

    Raises:
        UserError: It is no ``HOST:PORT``.
    """
    host, _, port = endpoint.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise UserError(f"--rdzv-endpoint {endpoint!r} is no HOST:PORT; give node 0 and a free port of it: node0:29400")
    return host.strip("[]"), int(port)


class Leader:
    """What node 0 tells the others.

    Args:
        endpoint: ``HOST:PORT`` of this node.
        nodes: All of them.

    Raises:
        UserError: Something listens at that port.
    """

    def __init__(self, endpoint: str, nodes: int):
        self.address, port = address_of(endpoint)
        try:
            self._store = TCPStore("localhost", port, is_master=True, wait_for_workers=False)
        except RuntimeError as error:
            told = f"port {port} of --rdzv-endpoint cannot be had: {_first_line(error)}; give another"
            raise UserError(told) from None
        self._nodes, self._told = nodes, 0

    def tell(self, start: Start) -> None:
        """Have the other nodes start their part.

        Raises:
            StoppedOnRequestError: One of them was asked to stop meanwhile.
        """
        self.check()
        self._tell(start=asdict(start))

    def check(self) -> None:
        """Raise a StoppedOnRequestError where another node was asked to stop."""
        if self._store.check(["stop"]):
            node = self._store.get("stop").decode()
            raise StoppedOnRequestError(f"stopped between two stages, on request of node {node}")

    @contextmanager
    def heeding(self) -> Iterator[None]:
        """While this node works alone, give its process a SIGUSR1 when another node is asked to stop."""
        ended = threading.Event()

        def look() -> None:
            while not ended.wait(LOOK):
                if self._store.check(["stop"]):
                    os.kill(os.getpid(), signal.SIGUSR1)
                    return

        thread = threading.Thread(target=look, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def end(self, code: int) -> None:
        """Have the others end with this exit code."""
        self._tell(end=code)
        deadline = time.monotonic() + LEAVE
        while self._store.add("gone", 0) < self._nodes - 1 and time.monotonic() < deadline:
            time.sleep(LOOK)

    def _tell(self, **order: object) -> None:
        self._store.set(str(self._told), json.dumps(order))
        self._told += 1


def follow(endpoint: str, node: int, run: Callable[[Start], object], asked: Callable[[], bool]) -> None:
    """Do what node 0 tells this one, until it is through.

    Args:
        endpoint: ``HOST:PORT`` of node 0.
        node: This one.
        run: Starts this node's part of something, and waits for its end.
        asked: Tells whether this node was asked to stop, between two of them.

    Raises:
        PatchmillError: As at node 0; or it is gone, or never came.
        StoppedOnRequestError: This node was asked to stop before node 0 was there.
    """
    store, told = _join(endpoint, asked), 0
    try:
        while True:
            while not store.check([str(told)]):
                if asked():
                    store.set("stop", str(node))
                time.sleep(LOOK)
            order = json.loads(store.get(str(told)))
            told += 1
            if "end" in order:
                store.add("gone", 1)
                break
            run(Start(**order["start"]))
    except RuntimeError as error:
        raise PatchmillError(f"node 0 is gone: {_first_line(error)}; it may say why") from None
    if order["end"]:
        raise error_of(order["end"])(f"node 0 ended with exit code {order['end']}, and says why")


def _join(endpoint: str, asked: Callable[[], bool]) -> TCPStore:
    """Return the store of node 0, once it is there: the store's own way to wait hears no signals."""
    (host, port), deadline, told = address_of(endpoint), time.monotonic() + JOIN, False
    while True:
        try:
            socket.create_connection((host, port), timeout=CONNECT).close()
            return TCPStore(host, port, is_master=False, timeout=timedelta(seconds=JOIN))
        except (OSError, RuntimeError) as error:
            if asked():
                raise StoppedOnRequestError("stopped before node 0 was there; run again to go on") from None
            if time.monotonic() > deadline:
                raise PatchmillError(f"node 0 does not answer at {endpoint}: {_first_line(error)}") from None
            if not told:
                print(f"waiting for node 0 at {endpoint}", file=sys.stderr, flush=True)
                told = True
        time.sleep(LOOK)


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
