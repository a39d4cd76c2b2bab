"""The documentation builds: pages made of the code are of this code, links lead somewhere, commands are commands."""

import ast
import importlib.util
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

from launch.cli import app
from pipeline.config import TrainSettings
from pipeline.recipe import read_settings, recipe_names
from pipeline.settings import check, merge, override
from shards.errors import UserError
from tests.command import ROOT, environment

DOCS = ROOT / "docs"
PAGES = sorted([*ROOT.glob("*.md"), *DOCS.glob("*.md"), *ROOT.glob("bench/*.md"), *ROOT.glob("examples/**/*.md")])
PACKAGES = ("shards", "pipeline", "launch")
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]


@pytest.mark.parametrize(
    ("command", "made"),
    [
        ("reference.py commands", "commands.md"),
        ("reference.py settings", "settings.md"),
        ("reference.py python", "python.md"),
        ("architecture_picture.py", "architecture.svg"),
    ],
)
def test_what_is_made_of_the_code_is_of_this_code(command, made):
    script, *arguments = command.split()
    done = subprocess.run(
        [sys.executable, DOCS / script, *arguments],
        capture_output=True, text=True, timeout=120, check=True, cwd=ROOT, env=environment(),
    )  # fmt: skip
    assert done.stdout == (DOCS / made).read_text(), "the code has changed: make docs"
    assert not done.stderr


# ---- links


def anchors(page: Path) -> set[str]:
    """Return the names of a page's headings, as forges make them."""
    headings = re.findall(r"^#+ (.*)$", prose(page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def prose(text: str) -> str:
    """Return a page without its blocks of code."""
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("name", NAMES)
def test_every_link_leads_somewhere(name):
    page = ROOT / name
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page.read_text())):
        if re.match(r"https?://", target):
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), f"{name}: {target}"
        assert not anchor or anchor in anchors(there), f"{name}: {target}"


def test_the_index_has_every_page_once():
    listed = re.findall(r"^\| \[([\w.]+)\]\(\1\) \|", (DOCS / "index.md").read_text(), re.MULTILINE)
    assert sorted([*listed, "index.md", "quickstart.md"]) == sorted(page.name for page in DOCS.glob("*.md"))


@pytest.mark.parametrize("name", NAMES)
def test_what_is_written_in_a_language_is_of_that_language(name):
    for language, text in re.findall(r"^```(python|toml|sh)\n(.*?)^```$", (ROOT / name).read_text(), re.M | re.S):
        if language == "toml":
            tomllib.loads(text)
        elif language == "python" and name != "docs/python.md":  # which has signatures
            ast.parse(text)
        elif language == "sh":
            subprocess.run(["bash", "-n"], input=text, text=True, check=True, timeout=10)


@pytest.mark.parametrize("name", NAMES)
def test_every_row_of_a_table_has_as_many_cells_as_its_head(name):
    for table in re.findall(r"(?:^\|.*\n)+", prose((ROOT / name).read_text()), re.MULTILINE):
        rows = [len(re.findall(r"(?<!\\)\|", row)) for row in table.splitlines()]
        assert set(rows) == {rows[0]}, f"{name}: {table.splitlines()[0]}"  # more would be dropped without a word


# ---- names of files


def test_the_picture_of_the_house_has_files_that_are_there():
    spec = importlib.util.spec_from_file_location("architecture_picture", DOCS / "architecture_picture.py")
    picture = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(picture)
    files = [(package, name) for package, parts in picture.HOUSE.items() for part in parts.values() for name in part]
    names = [*map("/".join, files), *(name for name, _ in picture.WAY)]
    assert len(names) > 50
    for name in names:
        assert (ROOT / name).is_file() if name.endswith(".py") else (ROOT / name).is_dir(), name


@pytest.mark.parametrize("name", [*NAMES, "docs/architecture.svg"])
def test_every_file_of_the_code_that_a_page_names_is_there(name):
    pattern = rf"(?<![\w/.-])((?:{'|'.join([*PACKAGES, 'tests', 'bench', 'examples'])})/[\w/]*\w\.(?:py|toml|c))\b"
    for found in re.findall(pattern, (ROOT / name).read_text()):
        assert (ROOT / found).is_file(), f"{name}: {found}"


def test_registries_are_where_the_page_on_architecture_has_them():
    rows = re.findall(r"\| `(\w+)` of `([\w/.]+)` \|", (DOCS / "architecture.md").read_text())
    assert len(rows) == 10
    for name, path in rows:
        assert re.search(rf"^(?:def )?{name}\b", (ROOT / path).read_text(), re.MULTILINE), name


# ---- errors


def texts(path: Path) -> Iterator[str]:
    """Yield what a file says, with "…" in the place of values."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.JoinedStr):
            said = "".join(each.value if isinstance(each, ast.Constant) else "…" for each in node.values)
            yield re.sub("…+", "…", said)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def test_the_page_on_troubles_quotes_what_the_code_says():
    said = "\n".join(text for package in PACKAGES for path in (ROOT / package).rglob("*.py") for text in texts(path))
    rows = re.findall(r"^\| (.*?) \| .* \| .* \|$", (DOCS / "troubleshooting.md").read_text(), re.MULTILINE)
    quoted = [found[1] for row in rows if (found := re.match(r"`([^`]{15,})`", row))]
    assert len(quoted) > 50
    assert [quote for quote in quoted if quote not in said] == []


# ---- commands

OPERATORS = {"|", ">", ">>", "<", "&&", "||", ";", "(", ")", "&"}


def commands(text: str) -> Iterator[list[str]]:
    """Yield the words of each ``patchmill`` command of a page's blocks of code, indented ones too."""
    blocks = re.findall(r"^```sh\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    blocks += ["\n".join(re.findall(r"^ {4}(.*)$", prose(text), re.MULTILINE))]
    blocks += re.findall(r"^\$ (.*)$", text, re.MULTILINE)  # with what they print below
    for line in "\n".join(blocks).replace("\\\n", " ").splitlines():
        if not re.search(r"\bpatchmill \w|launch\.cli \w", line):
            continue
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split, lexer.commenters = True, "#"
        words = list(lexer)
        start = next((i for i, word in enumerate(words) if word in ("patchmill", "launch.cli")), None)
        if start is None:
            continue
        end = next((i for i, word in enumerate(words) if i > start and word in OPERATORS), len(words))
        yield words[start + 1 : end]


def test_commands_are_found_in_a_page():
    page = "x\n\n    patchmill run plan.toml   # it\n\n```sh\ntorchrun -m launch.cli train X \\\n    a=1 | tee y\n```\n"
    assert list(commands(page)) == [["train", "X", "a=1"], ["run", "plan.toml"]]


def found(words: list[str]) -> tuple[typer.main.TyperCommand, list[str]]:
    """Return the command that words begin with, and its arguments."""
    command, rest = typer.main.get_command(app), list(words)
    while hasattr(command, "commands") and rest and not rest[0].startswith("-"):
        assert rest[0] in command.commands, words
        command = command.commands[rest.pop(0)]
    return command, rest


@pytest.mark.parametrize("name", [name for name in NAMES if name != "docs/commands.md"])
def test_every_command_of_a_page_is_one(name):
    for words in commands((ROOT / name).read_text()):
        command, rest = found(words)
        if not hasattr(command, "commands"):
            command.make_context(words[0], [each for each in rest if each != "..."])  # raises where it does not fit


@pytest.mark.parametrize("wrong", [["run"], ["run", "plan.toml", "--onyl", "x"], ["recipes", "--smoke=maybe"]])
def test_a_command_that_does_not_fit_is_seen(wrong):
    command, rest = found(wrong)
    with pytest.raises(Exception, match=r"Missing|No such|does not take"):
        command.make_context(wrong[0], rest)


@pytest.mark.parametrize("name", NAMES)
def test_every_command_within_a_line_has_its_options(name):
    for text in re.findall(r"`patchmill ([^`]*)`", prose((ROOT / name).read_text())):
        if text.startswith("COMMAND"):
            continue
        command, rest = found(text.split())
        if not hasattr(command, "commands"):
            known = {option for parameter in command.params for option in parameter.opts} | {"--help"}
            assert {word.partition("=")[0] for word in rest if word.startswith("--")} <= known, text


def check_settings(words: list[str]) -> None:
    """Check what a ``train`` or ``estimate`` sets, over the recipe that it names; a UserError if there is no such."""
    over = [word for word in words if re.match(r"[a-z_]+(\.\w+)*=", word)]
    if over and "--model" not in words:  # which has a model's arguments, not settings
        table, _ = read_settings(words[1] if words[1] in recipe_names() else "small_finetune")  # in CONFIG's place
        named = {"data": {"train": "TRAIN"}} | ({"init": "WEIGHTS"} if table.get("kind") == "finetune" else {})
        check(TrainSettings, override(merge(table, named), over), " ".join(words))


@pytest.mark.parametrize("name", NAMES)
def test_every_setting_of_a_command_is_one(name):
    text = (ROOT / name).read_text()
    within = [each.split() for each in re.findall(r"`patchmill ((?:train|estimate) [^`]*)`", prose(text))]
    for words in [*commands(text), *within]:
        if words[0] in ("train", "estimate"):
            check_settings(words)


@pytest.mark.parametrize("wrong", [["train", "small_pretrain", "optim.lrr=1"], ["estimate", "C", "global_batch=few"]])
def test_a_setting_that_does_not_fit_is_seen(wrong):
    with pytest.raises(UserError, match=r"lrr|few"):
        check_settings(wrong)


# ---- settings


@pytest.mark.parametrize("name", NAMES)
def test_settings_of_a_stage_that_a_page_shows_fit_each_other(name):
    rest = {"duration": "1 epoch", "global_batch": 8, "data": {"train": "a", "val": "b"}, "model": {"name": "vit_b16"}}
    for text in re.findall(r"^```toml\n(.*?)^```$", (ROOT / name).read_text(), re.MULTILINE | re.DOTALL):
        table = tomllib.loads(text)
        if table.keys() <= TrainSettings.model_fields.keys():  # else a plan, or a cluster's profile
            check(TrainSettings, merge(rest, table), name)


@pytest.mark.parametrize("name", NAMES)
def test_every_setting_of_a_stage_that_a_page_names_is_one(name):
    page = re.search(r"^## A training stage$.*?^## ", (DOCS / "settings.md").read_text(), re.MULTILINE | re.DOTALL)[0]
    tables = dict(re.findall(r"^### `\[+([\w.]+)\]+`$(.*?)(?=^##)", page, re.MULTILINE | re.DOTALL))
    known = {f"{table}.{key}" for table in tables for key in re.findall(r"^\| `(\w+)` \|", tables[table], re.MULTILINE)}
    assert len(known) > 80
    within = rf"`((?:{'|'.join(tables)})\.[a-z_]+(?:\.[a-z_]+)*)(?= ?=|`)"
    for found in re.findall(within, prose((ROOT / name).read_text())):
        assert found in known | tables.keys() or Path(found).suffix in (".json", ".safetensors", ".py"), found


# ---- other commands


def others(text: str, program: str) -> Iterator[list[str]]:
    """Yield the words behind another program's name, of a page's blocks of code and of what stands in backticks."""
    lines = re.findall(r"(?<!`)`([^`\n]+)`(?!`)", prose(text)) + re.findall(r"^ {4}(.*)$", prose(text), re.MULTILINE)
    for block in re.findall(r"^```sh\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        lines += block.splitlines()
    for line in lines:
        if found := re.match(rf"(?:\w+=\w+ )?{program} (.+)$", line):
            yield shlex.split(found[1], comments=True)


def test_other_commands_are_found_in_a_page():
    page = "`make a`\n\n    A=1 make b X=2   # it\n\n```sh\nmake c\nmakes d\n```\n"
    assert list(others(page, "make")) == [["a"], ["b", "X=2"], ["c"]]


@pytest.mark.parametrize("name", NAMES)
def test_every_target_of_make_is_one(name):
    makefile = (ROOT / "Makefile").read_text()
    for word in [word for words in others((ROOT / name).read_text(), "make") for word in words]:
        variable, equals, _ = word.partition("=")
        assert re.search(rf"^{variable} *\?=" if equals else rf"^{word}:", makefile, re.MULTILINE), word


@pytest.mark.parametrize("name", NAMES)
def test_every_script_has_its_options(name):
    for script, *rest in others((ROOT / name).read_text(), "python"):
        if script == "-m":
            assert importlib.util.find_spec(rest[0]), rest
        elif script != "-c":
            options = [word.strip("[]") for word in rest if word.strip("[]").startswith("--")]
            assert [each for each in options if f'"{each}"' not in (ROOT / script).read_text()] == [], script


@pytest.mark.parametrize("name", NAMES)
def test_every_mark_and_folder_of_pytest_is_there(name):
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]["markers"]
    marks = {"and", "not"} | {each.partition(":")[0] for each in known}
    for words in others((ROOT / name).read_text(), "pytest"):
        asked = words[words.index("-m") + 1] if "-m" in words else ""
        assert set(asked.split()) <= marks, words
        for word in words:
            assert word in ("-m", asked) or (ROOT / word).exists(), words


# ---- the quickstart


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_command_of_the_quickstart_runs(tmp_path):
    blocks = re.findall(r"^```sh\n(.*?)^```$", (DOCS / "quickstart.md").read_text(), re.MULTILINE | re.DOTALL)
    assert blocks[0].startswith("make ")  # has been run, or there would be no tests
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    bin = tmp_path / "bin"
    bin.mkdir()
    (bin / "patchmill").write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m launch.cli "$@"\n')
    (bin / "torchrun").write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m torch.distributed.run "$@"\n')
    for each in bin.iterdir():
        each.chmod(0o755)
    path = {"PATH": f"{bin}:{environment()['PATH']}"}
    done = subprocess.run(
        ["bash", "-ex"], input="\n".join(blocks[1:]), text=True, cwd=tmp_path, env=environment(**path),
        capture_output=True, timeout=1800,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    for made in ("sheet.png", "model.safetensors", "model.README.md", "report.html", "runs/clipart-smoke/report.html"):
        assert (tmp_path / made).stat().st_size > 0
