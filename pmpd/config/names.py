"""The names of a cell's fields, for messages: what is near one that is not there, and what a field takes.

Knows neither files nor the command line.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from difflib import get_close_matches
from enum import Enum
from functools import cache
from types import NoneType
from typing import Any, Union, get_args, get_origin, get_type_hints

from pmpd.config.schema import Config

WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


@cache
def fields() -> dict[str, Any]:
    """The type of every field by its dotted name, groups included; of hardware those of every kind."""
    return dict(_below(Config, "", ()))


def near(name: str, also: Iterable[str] = ()) -> list[str]:
    """Fields that may be meant by ``name``, at most three: one beside it, its namesakes elsewhere, or one like it.

    Args:
        also: other names that may be meant.
    """
    parent, _, leaf = name.rpartition(".")
    known = [*fields(), *also]
    beside = {field.rpartition(".")[2]: field for field in known if field.rpartition(".")[0] == parent}
    if like := get_close_matches(leaf, beside, n=1):
        return [beside[like[0]]]
    namesakes = [field for field in known if field.endswith(f".{leaf}") and ".target." not in field]
    return namesakes[:3] or [like for like in get_close_matches(name, known, n=1) if not name.startswith(f"{like}.")]


def did_you_mean(names: Iterable[str]) -> str:
    """The end of a message that offers ``names``; nothing without one."""
    found = list(names)
    return f"; did you mean {' or '.join(found)}?" if found else ""


def nearest(value: object, choices: Iterable[str]) -> list[str]:
    """The choice that may be meant by ``value``, if one is like it."""
    return get_close_matches(str(value), list(choices), n=1)


def is_open(name: str) -> bool:
    """Whether a field takes keys of the user's."""
    return get_origin(_bare(fields().get(name))) is dict


def holds_groups(name: str) -> bool:
    """Whether what such a field holds has fields itself: OmegaConf adds none from the command line."""
    return is_open(name) and dataclasses.is_dataclass(get_args(_bare(fields()[name]))[1])


def takes(name: str, value: object) -> str | None:
    """What a field, or an element of one (``task.metrics[0]``), takes, in words; ``value`` is what it was given."""
    kind = _type_of(name)
    if kind is None:
        return None
    bare = _bare(kind)
    words = _words(bare) + (", or null" if bare is not kind else "")
    choices = [c.name for c in bare] if isinstance(bare, type) and issubclass(bare, Enum) else []
    return words + did_you_mean(nearest(value, choices))


def strangers(value: object, name: str = "") -> list[str]:
    """Dotted names of what a cell's objects hold beside their fields: added by force, and read by nothing."""
    if isinstance(value, dict):
        held, found = value, []
    elif dataclasses.is_dataclass(value):
        held = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        found = [name + key for key in vars(value) if key not in held]
    else:
        return []
    return found + [stranger for key, below in held.items() for stranger in strangers(below, f"{name}{key}.")]


def _below(kind: type, prefix: str, inside: tuple[type, ...]) -> Iterable[tuple[str, Any]]:
    for owner in (kind, *kind.__subclasses__()):
        for name, hint in get_type_hints(owner).items():
            yield prefix + name, hint
            bare = _bare(hint)
            if dataclasses.is_dataclass(bare) and inside.count(bare) < 2:  # a scheduler may hold another
                yield from _below(bare, f"{prefix}{name}.", (*inside, bare))  # type: ignore[arg-type]


def _bare(hint: Any) -> Any:
    """A type without the None of an Optional."""
    if get_origin(hint) is not Union:
        return hint
    [kind] = [arg for arg in get_args(hint) if arg is not NoneType]
    return kind


def _type_of(name: str) -> Any:
    whole, bracket, _ = name.partition("[")
    if bracket:
        items = get_args(_bare(fields().get(whole)))
        return items[0] if items else None
    parent = name.rpartition(".")[0]
    return get_args(_bare(fields()[parent]))[1] if is_open(parent) else fields().get(name)


def _words(kind: Any) -> str:
    if isinstance(kind, type) and issubclass(kind, Enum):
        return f"one of {', '.join(c.name for c in kind)}"
    if get_origin(kind) is list:
        return f"a list such as [A,B], each {_words(get_args(kind)[0])}"
    if get_origin(kind) is dict or dataclasses.is_dataclass(kind):
        return "names and values such as {A: 1}"
    return WORDS.get(kind, "another type")


__all__ = ["did_you_mean", "fields", "holds_groups", "is_open", "near", "nearest", "strangers", "takes"]
