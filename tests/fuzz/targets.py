"""The targets by name. One module a package: those of ``shards`` do without torch, which takes seconds to import."""

from importlib import import_module
from pathlib import Path

from tests.fuzz.target import Target

CORPUS = Path(__file__).parent / "corpus"
MODULES = {
    "tests.fuzz.targets_shards": ("tar", "image", "manifest"),
    "tests.fuzz.targets_sources": ("source",),
    "tests.fuzz.targets_pipeline": ("npz", "safetensors", "torch", "checkpoint", "plan", "settings", "profile"),
    "tests.fuzz.targets_folders": ("zero", "transformers", "run", "ledger"),
}


def target_of(name: str) -> Target:
    """Return a target by its name."""
    module = next(module for module, names in MODULES.items() if name in names)
    return import_module(module).TARGETS[name]
