"""The environment of other projects, which `make peers` makes: what is in it, and running scripts there."""

import json
import subprocess
import sys
from functools import cache
from pathlib import Path

VENV = Path(__file__).parents[1] / ".venv-peers"
PYTHON = VENV / "bin/python"


@cache
def is_installed(*modules: str) -> bool:
    """Tell whether the peers' environment is there and has these modules."""
    if not PYTHON.exists():
        return False
    find = "import sys; from importlib.util import find_spec; sys.exit(not all(map(find_spec, sys.argv[1:])))"
    return subprocess.run([PYTHON, "-c", find, *modules], check=False, capture_output=True).returncode == 0


def run_script(python: Path, script: str, *arguments: object) -> dict:
    """Run a script of this folder in a process of its own; returns the JSON of its last line."""
    path = Path(__file__).with_name(script)
    done = subprocess.run([python, path, *map(str, arguments)], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{path.name} {' '.join(map(str, arguments))} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])
