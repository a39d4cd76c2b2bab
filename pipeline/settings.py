"""How any table of settings is read, checked and written: TOML, ``key=value`` over it, errors with key and remedy."""

import difflib
import json
import re
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError

from shards.errors import UserError
from shards.urls import refuse_secrets


class Settings(BaseModel):
    """Base of every settings table: immutable, and unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Duration(str):
    """A length of training as users say it: ``"90 epochs"``, ``"1.5 epochs"``, ``"10_000 steps"``, ``"9 samples"``."""

    PATTERN = re.compile(r"^\s*([\d_]+(?:\.\d+)?)\s*(epoch|step|sample)s?\s*$")

    def samples(self, epoch: int | None, global_batch: int) -> int:
        """Return the length in samples, given the samples of an epoch, if anybody knows, and of a global batch."""
        number, unit = self._parts()
        if unit != "epoch":
            return round(number * {"step": global_batch, "sample": 1}[unit])
        if epoch is None:
            raise UserError(
                f"{self!r}: nobody knows the epoch of a stream; give duration, schedule, checkpoint.every and "
                "evaluate.every in steps or samples"
            )
        return round(number * epoch)

    def is_nothing(self) -> bool:
        """Tell whether it is of length 0, in whatever unit."""
        return self._parts()[0] == 0

    def _parts(self) -> tuple[float, str]:
        found = self.PATTERN.match(self)
        if found is None:  # it was not made by ``_checked``
            raise ValueError(f"{str(self)!r} is no duration")
        return float(found[1]), found[2]

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> Any:
        """Teach pydantic to check and build durations from strings."""
        from pydantic_core import core_schema

        return core_schema.no_info_after_validator_function(cls._checked, core_schema.str_schema())

    @classmethod
    def _checked(cls, text: str) -> "Duration":
        if not cls.PATTERN.match(text):
            raise ValueError('give a number and a unit, such as "30 epochs", "500 steps" or "100_000 samples"')
        return cls(text)


def _longer_than_nothing(value: Duration) -> Duration:
    if value.is_nothing():
        raise ValueError("must be longer than nothing")
    return value


Period = Annotated[Duration, AfterValidator(_longer_than_nothing)]


def _without_secrets(url: str) -> str:
    refuse_secrets(url)
    return url


Url = Annotated[str, AfterValidator(_without_secrets)]

View = Literal["resize", "center_crop", "resize_center_crop"]
"""What a model that is evaluated sees of an image: all, squeezed; its middle; or the middle of it all, squeezed."""


DEEPEST = 100
"""Levels of tables and lists in each other that are read."""

S = TypeVar("S", bound=Settings)


def read_toml(path: str | Path) -> dict[str, Any]:
    """Read a TOML file; a missing file or a syntax error is a UserError."""
    try:
        return _parsed(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"there is no settings file {path}; give the path of a TOML file") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder; give the path of a TOML file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid TOML: {error}; mend that line") from None


def _parsed(text: str) -> dict[str, Any]:
    too_deep = tomllib.TOMLDecodeError(f"tables and lists are nested deeper than {DEEPEST} levels")
    try:
        table = tomllib.loads(text)
    except RecursionError:  # as many brackets in brackets as Python has room for calls
        raise too_deep from None
    level: list[Any] = [table]
    for _ in range(DEEPEST):
        inner = (each.values() if isinstance(each, dict) else each for each in level)
        level = [value for values in inner for value in values if isinstance(value, (dict, list))]
    if level:  # whatever goes through a table calls itself for those in it
        raise too_deep
    return table


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Return ``base`` with the tables of ``over`` laid over it, key by key."""
    merged = dict(base)
    for key, value in over.items():
        both_tables = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge(merged[key], value) if both_tables else value
    return merged


def flat(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the values of a nested table by dotted key."""
    found: dict[str, Any] = {}
    for key, value in table.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found


def override(table: dict[str, Any], assignments: list[str]) -> dict[str, Any]:
    """Lay ``key.sub=value`` assignments over a table; values are TOML, and a bare word is a string."""
    for text in assignments:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise UserError(f"{text!r} is not a setting; write key=value, such as optim.lr=1e-3")
        try:
            parsed = _parsed(f"x = {value}")["x"]
        except tomllib.TOMLDecodeError:
            parsed = value
        table = merge(table, nested(key, parsed))
    return table


def nested(key: str, value: Any) -> dict[str, Any]:
    """Return the table that has a value at a dotted key alone."""
    if key.count(".") >= DEEPEST:
        raise UserError(f"setting {key[:40]}... is of more than {DEEPEST} parts; no setting has so many")
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def check(kind: type[S], table: dict[str, Any], where: str) -> S:
    """Build settings of type ``kind`` from a table; a UserError of one line names key, value and remedy."""
    try:
        return kind.model_validate(table)
    except ValidationError as error:
        first = min(
            error.errors(), key=lambda each: each["type"] != "extra_forbidden"
        )  # a typo may hide what is missing
        path = [part for part in first["loc"] if not str(part).startswith("|")]  # tags of what may have several types
        key = ".".join(map(str, path))
        if first["type"] == "extra_forbidden":
            known = list(_table_of(kind, path[:-1]).model_fields)
            hint = nearest(str(path[-1]), known)
            raise UserError(
                f"unknown setting {key} in {where}{hint}; the settings there are: {', '.join(known)}"
            ) from None
        if first["type"] == "missing":
            raise UserError(f"setting {key} is missing in {where}; add it") from None
        reason = first["msg"].removeprefix("Value error, ")
        if not key:
            raise UserError(f"settings in {where} do not fit each other: {reason}") from None
        value = "" if isinstance(first["input"], dict) else f" = {first['input']!r}"
        raise UserError(f"setting {key}{value} in {where} does not fit: {reason}") from None


def nearest(word: str, known: Sequence[str], most: int = 1) -> str:
    """Return ``" (did you mean X?)"`` for the known words nearest to ``word``, at most so many, or nothing.

    Capitals and whatever is no letter or digit do not count, so that ViT-B/16 is vit_b16 and nothing else. Of several,
    those that begin with the word come first.
    """
    bare = {re.sub(r"[\W_]", "", each.lower()): each for each in known}
    asked = re.sub(r"[\W_]", "", word.lower())
    near = difflib.get_close_matches(asked, bare, n=most, cutoff=0.5)
    begun = sorted((each for each in bare if most > 1 and asked and each.startswith(asked)), key=len)
    close = [asked] if asked in bare else list(dict.fromkeys([*begun, *near]))[:most]
    return f" (did you mean {' or '.join(repr(bare[each]) for each in close)}?)" if close else ""


def dump_toml(table: dict[str, Any]) -> str:
    """Write a nested table of plain values as TOML; ``None`` is left out, since TOML has no null."""
    lines: list[str] = []
    for key, value in table.items():
        if value is not None and not isinstance(value, dict):
            lines.append(f"{_toml_key(key)} = {_toml_value(value)}")

    def sub(prefix: str, inner: dict[str, Any]) -> None:
        lines.append(f"\n[{prefix}]")
        for key, value in inner.items():
            if value is not None and not isinstance(value, dict):
                lines.append(f"{_toml_key(key)} = {_toml_value(value)}")
        for key, value in inner.items():
            if isinstance(value, dict):
                sub(f"{prefix}.{_toml_key(key)}", value)

    for key, value in table.items():
        if isinstance(value, dict):
            sub(_toml_key(key), value)
    return "\n".join(lines) + "\n"


def _toml_key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else json.dumps(key)


def _toml_value(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_toml_value(item) for item in value) + "]"
    if isinstance(value, dict):
        pairs = (f"{_toml_key(key)} = {_toml_value(item)}" for key, item in value.items() if item is not None)
        return "{ " + ", ".join(pairs) + " }"
    return json.dumps(value, ensure_ascii=False)  # TOML's strings, numbers and booleans read as JSON's


def _table_of(kind: type[BaseModel], path: list) -> type[BaseModel]:
    named = False  # the next part is no setting, but the name of one of several tables
    for part in path:
        if isinstance(part, str) and not named:  # a number is a place in a list of tables
            annotation = kind.model_fields[part].annotation
            kind, named = next(_tables_in(annotation)), get_origin(annotation) is dict
        else:
            named = False
    return kind


def _tables_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _tables_in(inner)
