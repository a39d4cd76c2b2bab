"""Is everything here that pip cannot bring? Plain Python, run by ``make`` before anything is installed."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

# what is looked for -> (Debian's package, what it is needed for)
PACKAGES = {
    "Python >= 3.11": ("python3", "everything"),
    "the venv module": ("python3-venv", "the virtual environment"),
    "a C compiler (gcc)": ("gcc", "torch.compile and DeepSpeed's kernels"),
    "a C++ compiler (g++)": ("g++", "torch.compile and DeepSpeed's kernels"),
    "Python headers (Python.h)": ("python3-dev", "torch.compile and DeepSpeed's kernels"),
}
JPEG = ("libjpeg headers (jpeglib.h)", "libjpeg-dev")


def missing() -> list[str]:
    """Return the prerequisites that are not here, as named in ``PACKAGES``."""
    here = {
        "Python >= 3.11": sys.version_info >= (3, 11),
        "the venv module": _imports("venv") and _imports("ensurepip"),
        "a C compiler (gcc)": _runs(os.environ.get("CC", "gcc")),
        "a C++ compiler (g++)": _runs(os.environ.get("CXX", "g++")),
        "Python headers (Python.h)": (Path(sysconfig.get_path("include")) / "Python.h").is_file(),
    }
    return [name for name in PACKAGES if not here[name]]


def has_libjpeg_headers() -> bool:
    """Tell whether the C compiler finds jpeglib.h."""
    compiler = os.environ.get("CC", "gcc")
    if not _runs(compiler):
        return False
    source = "#include <stdio.h>\n#include <jpeglib.h>\n"
    done = subprocess.run([compiler, "-E", "-x", "c", "-"], input=source, capture_output=True, text=True, check=False)
    return done.returncode == 0


def main() -> int:
    """Print what is missing and how to get it; return 1 if it is impossible to go on."""
    lacking = missing()
    for name in lacking:
        package, purpose = PACKAGES[name]
        print(f"missing: {name}, needed for {purpose}; install it: apt-get install {package}", file=sys.stderr)
    if not has_libjpeg_headers():
        name, package = JPEG
        print(
            f"warning: {name} not found: going on without the native JPEG crop decoder, on the slower path; "
            f"for the faster one: apt-get install {package}, and run make again",
            file=sys.stderr,
        )
    return 1 if lacking else 0


def _imports(module: str) -> bool:
    try:
        __import__(module)
    except ImportError:
        return False
    return True


def _runs(program: str) -> bool:
    return shutil.which(program) is not None


if __name__ == "__main__":
    sys.exit(main())
