"""How many arenas the C library keeps in a process that reads a remote store by many threads."""

import os
import platform
import subprocess
import sys

import pytest

from shards.workers import cores

COUNT = """
import ctypes, sys
from threading import Barrier, Thread
from shards.store import open_store

open_store("http://127.0.0.1:9/nothing")
together = Barrier(int(sys.argv[1]))
def allocate():
    together.wait()
    kept = [bytes(100_000) for _ in range(5)]
    together.wait()
threads = [Thread(target=allocate) for _ in range(together.parties)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
libc = ctypes.CDLL(None)
libc.fopen.restype, libc.fopen.argtypes = ctypes.c_void_p, [ctypes.c_char_p] * 2
libc.malloc_info.argtypes, libc.fclose.argtypes = [ctypes.c_int, ctypes.c_void_p], [ctypes.c_void_p]
file = libc.fopen(sys.argv[2].encode(), b"w")
libc.malloc_info(0, file)
libc.fclose(file)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no such arenas")
@pytest.mark.parametrize("asked", [None, 3 * cores() + 2])
def test_there_is_one_a_core_unless_the_environment_says_otherwise(asked, tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "MALLOC_ARENA_MAX"}
    if asked:
        environment["MALLOC_ARENA_MAX"] = str(asked)
    command = [sys.executable, "-c", COUNT, str(3 * cores() + 4), str(tmp_path / "info.xml")]
    subprocess.run(command, env=environment, check=True, timeout=60)
    arenas = (tmp_path / "info.xml").read_text().count("<heap nr=")
    assert arenas == asked if asked else arenas <= max(2, cores())
