"""Is everything here that pip cannot bring? Plain Python, run by ``make`` before anything is installed."""

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

# what is looked for -> Debian's package of it, and what happens without it; None: nothing does
PREREQUISITES = {
    "Python >= 3.11": ("python3", None),
    "Python's venv module": ("python3-venv", None),
    "C compiler (gcc)": ("gcc", "no native JPEG crop decoder, decoding takes the slower path; no torch.compile"),
    "C++ compiler (g++)": ("g++", "no torch.compile on CPU"),
    "Python headers (Python.h)": ("python3-dev", "no torch.compile"),
    "libjpeg headers (jpeglib.h)": ("libjpeg-dev", "no native JPEG crop decoder, decoding takes the slower path"),
    "libaio headers (libaio.h)": ("libaio-dev", "no offloading to NVMe"),
}


def missing() -> list[str]:
    """Return the keys of ``PREREQUISITES`` that are not here."""
    compiler = os.environ.get("CC", "gcc")
    here = {
        "Python >= 3.11": sys.version_info >= (3, 11),
        "Python's venv module": all(importlib.util.find_spec(name) for name in ("venv", "ensurepip")),
        "C compiler (gcc)": shutil.which(compiler) is not None,
        "C++ compiler (g++)": shutil.which(os.environ.get("CXX", "g++")) is not None,
        "Python headers (Python.h)": (Path(sysconfig.get_path("include")) / "Python.h").is_file(),
    }
    here["libjpeg headers (jpeglib.h)"] = here["C compiler (gcc)"] and _compiles(compiler, "<stdio.h>", "<jpeglib.h>")
    here["libaio headers (libaio.h)"] = here["C compiler (gcc)"] and _compiles(compiler, "<libaio.h>")
    return [name for name in PREREQUISITES if not here[name]]


def main() -> int:
    """Say what is missing, how to get it, and what is lost without it; return 1 where it is impossible to go on."""
    lacking = missing()
    for name in lacking:
        package, loss = PREREQUISITES[name]
        if loss is None:
            print(f"missing: {name}; cannot go on, install it: apt-get install {package}", file=sys.stderr)
        else:
            print(f"warning: {name} missing: {loss}; to have it: apt-get install {package}", file=sys.stderr)
    return 1 if any(PREREQUISITES[name][1] is None for name in lacking) else 0


def _compiles(compiler: str, *headers: str) -> bool:
    source = "".join(f"#include {header}\n" for header in headers)
    done = subprocess.run([compiler, "-E", "-x", "c", "-"], input=source, capture_output=True, text=True, check=False)
    return done.returncode == 0


if __name__ == "__main__":
    sys.exit(main())
