"""The house rule: launch -> pipeline -> shards, never back; and no torch in shards."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FORBIDDEN = {
    "shards": {"pipeline", "launch", "torch", "deepspeed", "accelerate"},
    "pipeline": {"launch"},
    "launch": set(),
}


def imported(path: Path) -> set[str]:
    """Return the top-level names that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import: write the whole name"
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("package", FORBIDDEN)
def test_packages_import_in_one_direction(package):
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    for path in files:
        wrong = imported(path) & FORBIDDEN[package]
        assert not wrong, f"{path.relative_to(ROOT)} imports {wrong}"


def test_the_walk_sees_imports(tmp_path):
    file = tmp_path / "x.py"
    file.write_text("def f():\n    from launch.plan import read_plan\nimport torch.nn as nn\n")
    assert imported(file) == {"launch", "torch"}
