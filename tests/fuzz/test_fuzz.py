"""Whatever stands in a file, only the contract's errors come of it: no crash, no hang, no memory without end, nothing
written elsewhere, no program started.

``make test`` tries a fifth of the inputs, ``make test-long`` all; ``PATCHMILL_FUZZ=100 pytest -m long tests/fuzz``
a hundred times as many, from another seed; ``-m slow`` ten times as many.
``guided.py`` goes by coverage. Inputs are drawn by a seed, not by hypothesis: of bytes that are damaged by what
a format means it knows no more, and a corpus of files says more in a review than its database.
"""

import json
import os
import secrets
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.command import ROOT, environment
from tests.fuzz.targets import CORPUS, MODULES

TIMES = float(os.environ.get("PATCHMILL_FUZZ", "1"))
OUTSIDE = Path("/tmp/outside-of-fuzz")
MOST = 400_000
"""Bytes of the corpus."""


def fuzz(names: tuple[str, ...], folder, times: float, seed: int, timeout: float) -> dict:
    """Try inputs on targets, and return how they ended."""
    command = [sys.executable, "-m", "tests.fuzz.worker", *names, "--folder", str(folder), "--times", str(times)]
    try:
        done = subprocess.run(
            [*command, "--seed", str(seed)], cwd=folder, timeout=timeout, capture_output=True, text=True,
            env=environment(PYTHONDONTWRITEBYTECODE="1"),
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        pytest.fail(f"{folder}/current hangs: {(error.stderr or b'')[-500:]!r}, seed {seed}")
    if done.returncode < 0:
        pytest.fail(f"{folder}/current: {signal.Signals(-done.returncode).name}, seed {seed}\n{done.stderr[-3000:]}")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    problems = [f"{each['input']}: {each['problem']}" for told in found.values() for each in told["found"]]
    assert not problems, f"seed {seed}\n" + "\n\n".join(problems)
    return found


@pytest.mark.timeout(300 + 300 * TIMES)
@pytest.mark.parametrize("share", [0.2, pytest.param(1.0, marks=pytest.mark.long)])
@pytest.mark.parametrize("names", MODULES.values(), ids=[module.rpartition("_")[2] for module in MODULES])
def test_what_stands_in_files_gives_nothing_but_the_errors_of_the_contract(names, share, tmp_path):
    found = fuzz(names, tmp_path, share * TIMES, 0 if TIMES == 1 else secrets.randbits(32), 250 + 250 * TIMES)
    for name, told in found.items():  # the good ones are read, and not all damage is lost on the way to the readers
        assert told["ends"]["read"] >= len([path for path in (CORPUS / name).iterdir() if "found" not in path.name])
        assert sum(told["ends"].values()) > told["ends"]["read"]


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("names", MODULES.values(), ids=[module.rpartition("_")[2] for module in MODULES])
def test_ten_times_as_much_from_another_seed(names, tmp_path):
    fuzz(names, tmp_path, 10, secrets.randbits(32), 3000)


@pytest.mark.parametrize(
    ("what", "told"),
    [
        ("os.kill(os.getpid(), 11)", "SIGSEGV"),
        ("exec('while True: pass')", "SIGPROF"),
        ("bytearray(1 << 34)", "MemoryError"),
        ("bytearray(400 << 20)", "MemoryError"),
        ("open('/tmp/outside-of-fuzz', 'w')", "EscapeError"),
        ("os.rename(folder / 'x', '/tmp/outside-of-fuzz')", "EscapeError"),
        ("__import__('subprocess').run('true')", "EscapeError"),
        ("os.truncate('../outside', 0)", "EscapeError"),
        ("pyarrow.OSFile(str(folder / '../beside'), 'wb').close()", "EscapeError"),
        ("pyarrow.OSFile('/tmp/outside-of-fuzz', 'wb').close()", "EscapeError"),
        ("1 / 0", "ZeroDivisionError"),
    ],
)
def test_what_is_looked_for_is_seen(what, told, tmp_path, request):
    """A target that does such a thing on its second input."""
    script = f"""
import os, sys
import pyarrow
from tests.fuzz import targets, worker
from tests.fuzz.target import Target
seen = []
def read(data, folder):
    seen.append(data)
    (folder / "x").write_bytes(data)
    if len(seen) > {len(list((CORPUS / "plan").iterdir())) * 2 + 1}:
        {what}
targets.target_of = lambda name: Target(read, lambda data, rng: data, 20)
worker.SECONDS = 1
sys.argv[1:] = ["plan", "--folder", {str(tmp_path)!r}]
worker.main()
"""
    request.addfinalizer(lambda: OUTSIDE.unlink(missing_ok=True))
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment(PYTHONDONTWRITEBYTECODE="1"),
        capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    ended = signal.Signals(-done.returncode).name if done.returncode < 0 else done.stdout
    assert told in ended, done.stderr
    assert done.returncode or (len(json.loads(done.stdout)["plan"]["found"]) == 1)


def test_the_corpus_is_small():
    assert sum(path.stat().st_size for path in CORPUS.rglob("*") if path.is_file()) < MOST


def test_every_target_has_one():
    assert sorted(path.name for path in CORPUS.iterdir()) == sorted(
        name for names in MODULES.values() for name in names
    )
    assert ROOT in CORPUS.parents
