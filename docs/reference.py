"""Writes the pages of reference out of the code: python docs/reference.py commands > docs/commands.md.

Also ``settings`` and ``python``. ``make docs`` writes all three; a test holds them and the code together.
"""

import ast
import inspect
import json
import re
import sys
import types
import typing
from collections.abc import Iterator
from pathlib import Path

import typer
from pydantic import BaseModel, ByteSize
from pydantic_core import PydanticUndefined

from launch.cli import app
from launch.cluster import JobSettings, PodSettings
from launch.plan import PlanTable, StageTable
from launch.stages import KINDS
from pipeline.config import TrainSettings
from pipeline.settings import Duration

ROOT = Path(__file__).resolve().parent.parent
MADE = "<!-- made of the code by docs/reference.py: change it there, then `make docs` -->"

PUBLIC = {
    "Data sets and their samples": (
        "shards.dataset.Dataset", "shards.dataset.Sample", "shards.dataset.Rows", "shards.droplist.write_exclude",
        "shards.mixture.Mixture", "shards.storesettings.StoreSettings",
    ),
    "Batches": (
        "shards.loader.Loader", "shards.batch.Batch", "shards.processloader.ProcessLoader",
        "shards.evaluation.EvaluationLoader", "shards.evaluation.EvaluationBatch", "shards.stream.StreamLoader",
        "shards.cache.ChunkCache", "shards.ledger.new_segment",
    ),
    "Augmentation": (
        "shards.augment.Transform", "shards.augment.InceptionCrop", "shards.augment.Resize",
        "shards.augment.ResizeCrop", "shards.augment.CenterCrop", "shards.augment.ResizeCenterCrop",
        "shards.randaugment.RandAugment",
    ),
    "The order": ("shards.order.Shuffle", "shards.order.choose_shuffle", "shards.order.Order"),
    "Data sets made and checked": (
        "shards.build.build", "shards.index.index", "shards.verify.verify", "shards.audit.audit",
    ),
    "Models": (
        "pipeline.models.create_model", "pipeline.models.model_names", "pipeline.models.vit.VisionTransformer",
        "pipeline.models.axial.AxialTransformer", "pipeline.models.resnet.ResNet",
    ),
    "From batches to the device": (
        "pipeline.images.to_model_input", "pipeline.prefetch.pinned_array", "pipeline.prefetch.pin",
        "pipeline.prefetch.prefetched",
    ),
    "Training and weights": (
        "pipeline.recipe.recipe_names", "pipeline.recipe.read_settings", "pipeline.settings.override",
        "pipeline.settings.check", "pipeline.train.train", "pipeline.convert.convert.convert",
        "pipeline.convert.recognise.load_model",
    ),
    "Errors": (
        "shards.errors.PatchmillError", "shards.errors.UserError", "shards.errors.StoppedOnRequestError",
        "shards.decode.DecodeError",
    ),
}  # fmt: skip
"""What a program of yours may use, by heading; everything else may change without notice."""

EXPLAINED = {
    "masked_patch": "objectives", "mae": "objectives", "probe": "objectives", "evaluate": "objectives",
    "data": "streaming", "data.train": "mixtures", "data.store": "stores", "model": "models", "engine": "training",
    "guard": "training", "track": "training", "profile": "training", "checkpoint": "checkpoints",
}  # fmt: skip
"""Tables of a training stage, and the page that each is explained on."""


# ---- commands


def commands() -> Iterator[str]:
    """Yield the lines of the page of commands: each with its arguments and options, as ``--help`` has them."""
    yield from ("# Commands", "", MADE, "")
    yield "What `patchmill COMMAND --help` prints, on one page. Exit codes: 0 done, 2 your mistake, 75 stopped on"
    yield "request with everything saved, 1 anything else. stdout is for results, stderr for progress."
    for words, command in _commands(typer.main.get_command(app), ["patchmill"]):
        arguments = [each for each in command.params if not each.opts[0].startswith("-")]
        options = [each for each in command.params if each.opts[0].startswith("-")]
        shown = [_metavar(each) for each in arguments] + ["[options]"] * bool(options)
        yield from ("", f"## {' '.join(words)}", "", command.help, "", f"    {' '.join([*words, *shown])}", "")
        if command.params:
            yield from ("| | | default |", "|---|---|---|")
        for each in arguments:
            yield f"| `{_cell(_metavar(each))}` | {_cell(each.help)} | {_default(each)} |"
        hints = typing.get_type_hints(command.callback)
        for each in options:
            value = "" if each.is_flag else f" {_value(each, hints[each.name])}"
            yield f"| `{', '.join(each.opts)}{value}` | {_cell(each.help)} | {_default(each)} |"


def _commands(group: typing.Any, words: list[str]) -> Iterator[tuple[list[str], typing.Any]]:
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from _commands(command, [*words, name])
        elif not command.hidden:
            yield [*words, name], command


def _metavar(argument: typing.Any) -> str:
    name = argument.metavar or argument.name.upper() + ("..." if argument.nargs != 1 else "")
    return name if argument.required else f"[{name}]"


def _value(option: typing.Any, hint: typing.Any) -> str:
    """Return what stands for an option's value: its choices, or what it is."""
    if typing.get_origin(hint) is typing.Literal:
        return "\\|".join(typing.get_args(hint))
    kinds = [each for each in (typing.get_args(hint) or (hint,)) if each is not type(None)]
    names = {int: "N", float: "X", Path: "PATH"}
    return option.metavar or names.get(kinds[0], "TEXT")


def _default(parameter: typing.Any) -> str:
    found = parameter.default
    return "" if found is None or found is False or found == [] or callable(found) else f"`{found}`"


# ---- settings


def settings() -> Iterator[str]:
    """Yield the lines of the page of settings: those of stages, plans and clusters, table by table."""
    yield from ("# Settings", "", MADE, "")
    yield "Every key of a plan, of its stages, and of a cluster's profile. An unknown key is an error that names the"
    yield 'nearest one. A length is text with a unit: `"10 steps"`, `"2 epochs"`, `"1_000_000 samples"`. Which settings'
    yield "of a training stage may change when a run goes on: [checkpoints.md](checkpoints.md)."
    yield from ("", "## A plan", "", "What `patchmill run` and `patchmill submit` read: [plans.md](plans.md).")
    yield from _table("", PlanTable, 3)
    yield from _table("[[stage]]", StageTable, 3)
    yield from ("", "## A training stage", "")
    kinds = [f"`{name}`" for name, kind in KINDS.items() if kind.settings is TrainSettings]
    yield f"What `patchmill train` reads, and `set` of the stages {', '.join(kinds)}."
    yield from _table("", TrainSettings, 3)
    yield from ("", "## Other stages", "")
    yield "`set` of a stage of each kind: mostly the options of its command, which [commands.md](commands.md) explains."
    for name, kind in KINDS.items():
        if kind.settings is not TrainSettings:
            yield from _table(f'kind = "{name}"', kind.settings, 3)
    yield from ("", "## A cluster's profile", "", "What `--cluster` reads: [cluster.md](cluster.md).")
    yield from _table("", JobSettings, 3)
    yield from (
        "",
        "## A profile of Kubernetes",
        "",
        "What `patchmill manifest` reads: [launchers.md](launchers.md#kubernetes).",
    )
    yield from _table("", PodSettings, 3)


def _table(name: str, model: type[BaseModel], level: int, path: str = "") -> Iterator[str]:
    """Yield one table of settings, then the tables that it holds."""
    fields, tables = [], []
    for key, field in model.model_fields.items():
        inner = list(dict.fromkeys(_models(field.annotation)))
        many = inner and typing.get_origin(field.annotation) is not None and type(None) not in _args(field.annotation)
        tables += [(key, each, many) for each in inner if each is not StageTable]
        if not inner or _others(field.annotation):
            fields.append((key, field))
    if name:
        yield from ("", f"{'#' * level} `{name}`")
    yield from ("", _prose(inspect.getdoc(model).partition("\nRaises:")[0].strip()), "")
    if page := EXPLAINED.get(name.strip("[]")):
        yield from (f"More: [{page}.md]({page}.md).", "")
    if fields:
        yield from ("| key | value | default | |", "|---|---|---|---|")
    for key, field in fields:
        needed = field.default is PydanticUndefined and field.default_factory is None
        default = "*needed*" if needed else _shown(field.get_default(call_default_factory=True))
        yield f"| `{key}` | {_kind(field.annotation)} | {default} | {_cell(field.description or '')} |"
    for key, each, many in tables:
        where = f"{path}{key}"
        yield from _table(f"[[{where}]]" if many else f"[{where}]", each, level, f"{where}.")


def _args(annotation: typing.Any) -> tuple:
    return typing.get_args(annotation)


def _models(annotation: typing.Any) -> Iterator[type[BaseModel]]:
    """Yield the tables that a setting may hold."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for each in _args(annotation):
        yield from _models(each)


def _others(annotation: typing.Any) -> bool:
    """Return whether a setting that may hold tables may be something else, too."""
    plain = [each for each in _args(annotation) if each is not type(None)]
    return any(not list(_models(each)) and isinstance(_bare(each), type) for each in plain)


def _bare(annotation: typing.Any) -> typing.Any:
    while typing.get_origin(annotation) is typing.Annotated:
        annotation = _args(annotation)[0]
    return annotation


def _kind(annotation: typing.Any) -> str:
    """Return in words what a setting takes."""
    annotation = _bare(annotation)
    origin, inside = typing.get_origin(annotation), _args(annotation)
    if origin is typing.Literal:
        return ", ".join(f"`{json.dumps(each)}`" for each in inside)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_kind(each) for each in inside if each is not type(None))
    if origin is dict:
        return "table"
    if origin is tuple and ... not in inside:
        return f"{len(inside)} of: {_kind(inside[0])}"
    if origin in (list, tuple):
        return "tables" if list(_models(annotation)) else f"list of: {_kind(inside[0])}"
    words = {bool: "`true`, `false`", int: "whole number", float: "number", str: "text", Duration: "length"}
    return words.get(annotation) or ("bytes" if annotation is ByteSize else "value")


def _shown(value: typing.Any) -> str:
    return "" if value is None or value in ({}, [], ()) else f"`{json.dumps(value)}`"


# ---- Python


def python() -> Iterator[str]:
    """Yield the lines of the page of the Python interface: signatures and docstrings, from the source alone."""
    yield from ("# From Python", "", MADE, "")
    yield "What a program of yours may use; everything else may change without notice. How it goes together:"
    yield "[loader.md](loader.md). Errors are one line that says what is wrong, the value, and what to do."
    for heading, names in PUBLIC.items():
        yield from ("", f"## {heading}")
        for name in names:
            yield from _documented(name)


def _documented(name: str) -> Iterator[str]:
    module, _, own = name.rpartition(".")
    path = ROOT / f"{module.replace('.', '/')}.py"
    path = path if path.exists() else path.with_suffix("") / "__init__.py"
    nodes = ast.parse(path.read_text(encoding="utf-8")).body
    (node,) = [each for each in nodes if isinstance(each, ast.ClassDef | ast.FunctionDef) and each.name == own]
    yield from ("", f"### {own}", "", f"`from {module} import {own}`", "")
    if isinstance(node, ast.FunctionDef):
        yield from _function(node, own)
        return
    members = {each.name: each for each in node.body if isinstance(each, ast.FunctionDef)}
    fields = [_field(each) for each in node.body if isinstance(each, ast.AnnAssign) and each.target.id[0] != "_"]
    if (init := members.get("__init__")) and "Made by" not in ast.get_docstring(node):
        yield from _code(own, _arguments(init))
    elif fields:
        yield from _code(own, fields)
    yield from _docstring(node)
    for name, each in members.items():
        decorators = {ast.unparse(decorator).rpartition(".")[2] for decorator in each.decorator_list}
        if name[0] == "_" or decorators & {"setter", "field_validator", "model_validator"}:
            continue
        yield from ("", f"#### {own}.{name}", "")
        if decorators & {"property", "cached_property"}:
            yield from _docstring(each)
        else:
            yield from _function(each, f"{own}.{name}")


def _function(node: ast.FunctionDef, name: str) -> Iterator[str]:
    yield from _code(name, _arguments(node), f" -> {ast.unparse(node.returns)}" if node.returns else "")
    yield from _docstring(node)


def _arguments(node: ast.FunctionDef) -> list[str]:
    """Return the arguments of a function as they are written, without ``self``."""
    given = node.args
    plain = [each for each in given.args if each.arg not in ("self", "cls")]
    defaults = [None] * (len(given.args) - len(given.defaults)) + given.defaults
    written = list(map(_argument, plain, defaults[len(given.args) - len(plain) :]))
    if given.vararg or given.kwonlyargs:
        written.append(f"*{_argument(given.vararg, None)}" if given.vararg else "*")
    written += map(_argument, given.kwonlyargs, given.kw_defaults)
    return written + ([f"**{_argument(given.kwarg, None)}"] if given.kwarg else [])


def _argument(argument: ast.arg, default: ast.expr | None) -> str:
    return ast.unparse(argument) + (f" = {ast.unparse(default)}" if default else "")


def _field(node: ast.AnnAssign) -> str:
    """Return a field of a class as an argument; of a setting its default alone."""
    setting = isinstance(node.value, ast.Call) and ast.unparse(node.value.func) == "Field"
    default = node.value.args[0] if setting else node.value
    return f"{ast.unparse(node.target)}: {ast.unparse(node.annotation)}" + (
        f" = {ast.unparse(default)}" if default else ""
    )


def _code(name: str, arguments: list[str], returns: str = "") -> Iterator[str]:
    """Yield a signature, an argument a line where it is long."""
    text = f"{name}({', '.join(arguments)}){returns}"
    if len(text) > 100:
        text = "\n".join([f"{name}(", *(f"    {each}," for each in arguments), f"){returns}"])
    yield from ("```python", text, "```", "")


def _docstring(node: ast.AST) -> Iterator[str]:
    """Yield a docstring of Google's form as Markdown."""
    section = None
    for line in (ast.get_docstring(node) or "").splitlines():
        if found := re.fullmatch(r"(Args|Attributes|Returns|Raises|Yields):", line):
            section = found[1]
            yield from (f"*{section}:*" if section != "Args" else "*Arguments:*", "")
        elif section and (found := re.fullmatch(r"    (\*{0,2}\w+): (.*)", line)) and section != "Returns":
            yield f"* `{found[1]}`: {_prose(found[2])}"
        elif section:
            yield _prose(f"  {line.strip()}" if line.startswith("      ") else line.strip())
        else:
            yield _prose(line)
    yield ""


def _prose(text: str) -> str:
    return text.replace("``", "`")


def _cell(text: str) -> str:
    return _prose(text).replace("|", "\\|")


if __name__ == "__main__":
    lines = "\n".join({"commands": commands, "settings": settings, "python": python}[sys.argv[1]]())
    print(re.sub(r"\n{3,}", "\n\n", lines).strip())
