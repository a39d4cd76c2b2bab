"""Which settings, code and libraries made a run."""

import json
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pipeline.config import TrainSettings
from pipeline.settings import dump_toml
from shards.atomic import write_text

LIBRARIES = (
    "torch",
    "deepspeed",
    "accelerate",
    "numpy",
    "safetensors",
    "simplejpeg",
    "opencv-python-headless",
    "pillow",
)

SNAPSHOT = "commit.diff"
"""File beside the packages of a snapshot: the commit that it was taken of, and in the lines below the difference."""
_snapshot = Path(__file__).parents[1] / SNAPSHOT


def note(out: Path, settings: TrainSettings, deepspeed: dict[str, Any] | None) -> None:
    """Save the resolved settings, DeepSpeed's, and the code's commit and difference from it, in a stage's folder."""
    write_text(out / "resolved.toml", dump_toml(settings.model_dump(mode="json")))
    if deepspeed is None:
        (out / "deepspeed.json").unlink(missing_ok=True)  # of another engine, before
    else:
        write_text(out / "deepspeed.json", json.dumps(deepspeed, indent=1) + "\n")
    write_text(out / "code.diff", f"commit {commit()}\n{diff()}")


def of(settings: TrainSettings, model: dict[str, Any], classes: list[str]) -> dict[str, Any]:
    """Return what a checkpoint says of where it comes from, as plain JSON values."""
    noted = {"settings": settings.model_dump(mode="json"), "model": model, "classes": classes}
    return {**noted, "versions": versions(), "commit": commit()}


def versions() -> dict[str, str | None]:
    """Return the versions of Python, Patchmill and the libraries that touch the numbers; None for a missing one."""
    return {
        "python": platform.python_version(),
        "patchmill": version("patchmill"),
        **{n: _version(n) for n in LIBRARIES},
    }


def _version(library: str) -> str | None:
    try:
        return version(library)
    except PackageNotFoundError:  # it goes without simplejpeg
        return None


def commit() -> str | None:
    """Return the commit of the code that runs, with ``+`` where the working tree differs; None outside a checkout."""
    if _snapshot.exists():
        return _snapshot.read_text(encoding="utf-8").partition("\n")[0] or None
    head = _git("rev-parse", "HEAD")
    return head and head.strip() + ("+" if diff() else "")


def diff() -> str:
    """Return the working tree's difference from the commit."""
    if _snapshot.exists():
        return _snapshot.read_text(encoding="utf-8").partition("\n")[2]
    return _git("diff", "HEAD", "--", "*.py", "*.toml") or ""


def _git(*arguments: str) -> str | None:
    here = Path(__file__).parent
    try:
        done = subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None
