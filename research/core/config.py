# SPDX-License-Identifier: Apache-2.0
"""Configuration as frozen dataclasses: typed overrides, canonical JSON, and a hash.

An experiment is a tree of frozen dataclasses. Three things are done with it here:

* ``override`` changes one field by its dotted path, checked against the field's type;
* ``to_json`` / ``from_json`` write and read it, leaving out fields at their default, so that a field
  added later changes neither the file nor the hash of a run that has finished;
* ``config_hash`` names it by content.
"""

import ast
import dataclasses
import difflib
import enum
import functools
import hashlib
import importlib
import json
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any

from research.core.types import UserError

TYPE_KEY = "type"
MAX_LISTED = 12


class ConfigError(UserError):
    """A configuration that cannot be built, named by its path."""


@functools.cache
def field_types(cls: type) -> dict[str, Any]:
    """The resolved annotation of every field of a dataclass, by name."""
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def default_of(field: dataclasses.Field) -> Any:
    """A field's default value, or ``dataclasses.MISSING`` where it has none."""
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


# --- JSON ---------------------------------------------------------------------------------------


def to_json(value: Any) -> Any:
    """A plain JSON value for a dataclass tree. Fields equal to their default are left out."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        cls = type(value)
        record = {TYPE_KEY: f"{cls.__module__}:{cls.__qualname__}"}
        hints = field_types(cls)
        for field in dataclasses.fields(value):
            child = getattr(value, field.name)
            if child != default_of(field):
                if hints[field.name] is float and isinstance(child, int):
                    child = float(child)  # 1 and 1.0 are the same setting and must hash alike
                record[field.name] = to_json(child)
        return record
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, Mapping):
        return {str(key): to_json(child) for key, child in value.items()}
    if isinstance(value, tuple | list):
        return [to_json(child) for child in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ConfigError(
        f"A {type(value).__name__} ({value!r}) cannot stand in a configuration: use numbers, strings, "
        "tuples, mappings and frozen dataclasses."
    )


def from_json(record: Any, annotation: Any = Any) -> Any:
    """The inverse of ``to_json``: rebuilds the dataclass tree; ``annotation`` restores tuples and enums."""
    if isinstance(record, Mapping) and TYPE_KEY in record:
        cls = resolve(record[TYPE_KEY])
        hints = field_types(cls)
        unknown = sorted(set(record) - set(hints) - {TYPE_KEY})
        if unknown:
            raise ConfigError(
                f"{cls.__name__} has no field {unknown[0]!r}: the configuration was written by another "
                f"version of the code; the fields now are {', '.join(hints)}."
            )
        return cls(**{k: from_json(v, hints[k]) for k, v in record.items() if k != TYPE_KEY})
    for option in union_members(annotation):
        if isinstance(option, type) and issubclass(option, enum.Enum):
            return option(record)
    if isinstance(record, Mapping):
        return {key: from_json(child) for key, child in record.items()}
    if isinstance(record, list):
        inner = next((typing.get_args(m)[0] for m in union_members(annotation) if typing.get_args(m)), Any)
        return tuple(from_json(child, inner) for child in record)
    return record


def resolve(name: str) -> type:
    """The dataclass written as ``module:qualname``."""
    module_name, _, qualname = name.partition(":")
    try:
        found: Any = importlib.import_module(module_name)
        for part in qualname.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"The configuration names {name!r}, which cannot be imported ({error}): put the folder that holds it on "
            "PYTHONPATH."
        ) from error
    if not (isinstance(found, type) and dataclasses.is_dataclass(found)):
        raise ConfigError(f"The configuration names {name!r}, which is not a dataclass.")
    return found


def mapped(change: Callable[[Any], Any], value: Any) -> Any:
    """A tree of dataclasses, tuples and mappings in which each dataclass, its fields first, is what ``change`` makes of
    it. What does not change is the same object."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        old = {field.name: getattr(value, field.name) for field in dataclasses.fields(value) if field.init}
        new = {name: mapped(change, child) for name, child in old.items()}
        differing = {name: child for name, child in new.items() if child is not old[name]}
        return change(dataclasses.replace(value, **differing) if differing else value)
    if isinstance(value, tuple) and type(value) is tuple:
        new = tuple(mapped(change, child) for child in value)
        return new if any(a is not b for a, b in zip(new, value, strict=True)) else value
    if isinstance(value, Mapping):
        new = {key: mapped(change, child) for key, child in value.items()}
        return new if any(new[key] is not child for key, child in value.items()) else value
    return value


def check_types(value: Any, path: str = "") -> None:
    """Raises ConfigError naming the first field of a dataclass tree that is none of the choices of its annotation, or
    is a number or text where a part is needed. Annotations in forms not known here let all pass."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        for name, annotation in field_types(type(value)).items():
            child, where = getattr(value, name), f"{path}.{name}" if path else name
            if not _is_one_of(child, annotation):
                given = repr(child) if len(repr(child)) <= 80 else f"{repr(child)[:77]}..."
                raise ConfigError(f"{where} is {given}: it must be {_describe(union_members(annotation))}.")
            check_types(child, where)
    elif isinstance(value, Mapping):
        for key, child in value.items():
            check_types(child, f"{path}[{key!r}]")
    elif isinstance(value, tuple | list):
        for index, child in enumerate(value):
            check_types(child, f"{path}.{index}")


def _may_be(value: Any, member: Any) -> bool:
    origin, args = typing.get_origin(member), typing.get_args(member)
    if origin is typing.Literal:
        return value in args
    if member is type(None):
        return value is None
    if origin is tuple and args[-1] is Ellipsis:
        return isinstance(value, tuple | list) and all(_is_one_of(one, args[0]) for one in value)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return isinstance(value, Mapping) and all(_is_one_of(one, args[1]) for one in value.values())
    part = isinstance(member, type) and (dataclasses.is_dataclass(member) or getattr(member, "_is_protocol", False))
    return not (part and (value is None or isinstance(value, bool | int | float | str | type)))


def _is_one_of(value: Any, annotation: Any) -> bool:
    return any(_may_be(value, member) for member in union_members(annotation))


def short_types(record: Any) -> Any:
    """A JSON record with classes by name alone, without the module that holds them."""
    if isinstance(record, dict):
        return {
            k: v.rpartition(":")[2] if k == TYPE_KEY and isinstance(v, str) else short_types(v)
            for k, v in record.items()
        }
    return [short_types(child) for child in record] if isinstance(record, list) else record


def config_hash(value: Any, length: int = 12) -> str:
    """A hash of the configuration's content; classes count by name, so that moving one keeps the hash."""
    text = json.dumps(short_types(to_json(value)), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:length]


def differences(old: Any, new: Any, path: str = "") -> list[str]:
    """What differs between two JSON records, one "path: old -> new" each."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        found = []
        for key in sorted(set(old) | set(new)):
            inner = f"{path}.{key}" if path else key
            found += differences(old.get(key, "(default)"), new.get(key, "(default)"), inner)
        return found
    return [] if old == new else [f"{path}: {_short(old)} -> {_short(new)}"]


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 120 else f"{text[:80]} ... {text[-36:]}"


# --- overrides ----------------------------------------------------------------------------------


def override(config: Any, *assignments: str) -> Any:
    """``config`` with fields changed one after the other, e.g. ``override(experiment, "model.d_model=512")``.

    The path goes through dataclass fields, tuple indices and mapping keys; the text is read as the
    field's own type. Raises ConfigError naming what was given, what is allowed and the nearest name.
    """
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        if not equals or not path.strip():
            raise ConfigError(f"An override is written path=value; {assignment!r} is not.")
        config = _override(config, path.strip().split("."), text.strip(), path.strip(), Any)
    return config


def _override(config: Any, parts: list[str], text: str, path: str, annotation: Any) -> Any:
    if not parts:
        return parse(text, annotation, path, current=config)
    head, rest = parts[0], parts[1:]
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        hints = field_types(type(config))
        if head not in hints:
            raise ConfigError(_no_such(path, head, type(config).__name__, "field", list(hints)))
        changed = _override(getattr(config, head), rest, text, path, hints[head])
        return dataclasses.replace(config, **{head: changed})
    if isinstance(config, tuple):
        if not head.isdigit() or int(head) >= len(config):
            raise ConfigError(
                f"--set {path}: {head!r} is not an index into a tuple of {len(config)} (0 to {len(config) - 1} are)."
            )
        index = int(head)
        args = typing.get_args(annotation)
        inner = (args[0] if args[-1] is Ellipsis else args[index]) if args else Any
        return config[:index] + (_override(config[index], rest, text, path, inner),) + config[index + 1 :]
    if isinstance(config, Mapping):
        if head not in config:
            raise ConfigError(_no_such(path, head, "the mapping", "key", list(config)))
        return {**config, head: _override(config[head], rest, text, path, Any)}
    raise ConfigError(f"--set {path}: {head!r} lies below a {type(config).__name__}, which has no fields.")


def _no_such(path: str, given: str, owner: str, kind: str, names: list[str]) -> str:
    near = difflib.get_close_matches(given, names, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    listed = ", ".join(names[:MAX_LISTED]) + (", ..." if len(names) > MAX_LISTED else "")
    return f"--set {path}: {owner} has no {kind} {given!r}.{hint} It has: {listed}."


def union_members(annotation: Any) -> tuple[Any, ...]:
    """The members of a union annotation, or the annotation alone."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return typing.get_args(annotation)
    return (annotation,)


def parse(text: str, annotation: Any, path: str, current: Any = None) -> Any:
    """Reads ``text`` as a value of the annotated type. Raises ConfigError with what is allowed."""
    members = union_members(annotation)
    if type(None) in members and text.lower() in ("none", "null"):
        return None
    for member in members:
        try:
            return _parse_as(text, member, current)
        except (ValueError, OverflowError):
            continue
    if dataclasses.is_dataclass(current):
        names = ", ".join(f.name for f in dataclasses.fields(current))
        raise ConfigError(f"--set {path}: this is a whole {type(current).__name__}; set one of its fields ({names}).")
    raise ConfigError(f"--set {path}: {text!r} is not {_describe(members)}.")


def _parse_as(text: str, member: Any, current: Any) -> Any:
    origin = typing.get_origin(member)
    if origin is typing.Literal:
        for choice in typing.get_args(member):
            if text == str(choice):
                return choice
        raise ValueError(text)
    if isinstance(member, type) and issubclass(member, enum.Enum):
        return member(text)
    if member is bool:
        return {"true": True, "false": False}[text.lower()] if text.lower() in ("true", "false") else _bad(text)
    if member is int:
        number = float(text) if any(c in text for c in ".eE") else int(text)
        return int(number) if number == int(number) else _bad(text)
    if member is float:
        return float(text)
    if member is str:
        return text
    if origin is tuple or member is tuple:
        return _parse_tuple(text, typing.get_args(member))
    if member is Any and not dataclasses.is_dataclass(current):
        return type(current)(text) if isinstance(current, int | float | str) else _bad(text)
    raise ValueError(text)


def _parse_tuple(text: str, args: tuple[Any, ...]) -> tuple:
    value = ast.literal_eval(text if text[:1] in "([" else f"({text},)") if text else ()
    inner = args[0] if args else Any
    if inner in (int, float, str):
        if not all(isinstance(v, int | float if inner is float else inner) for v in value):
            raise ValueError(text)
        return tuple(inner(v) for v in value)
    raise ValueError(text)


def _bad(text: str) -> typing.NoReturn:
    raise ValueError(text)


def _describe(members: tuple[Any, ...]) -> str:
    words = []
    for member in members:
        if typing.get_origin(member) is typing.Literal:
            words.append("one of " + ", ".join(str(c) for c in typing.get_args(member)))
        elif isinstance(member, type) and issubclass(member, enum.Enum):
            words.append("one of " + ", ".join(str(c.value) for c in member))
        elif member is type(None):
            words.append("none")
        else:
            words.append(_word(member))
    return " or ".join(words)


def _word(member: Any) -> str:
    plain = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    origin, args = typing.get_origin(member), typing.get_args(member)
    if member in plain:
        return plain[member]
    if origin is tuple and args[-1] is Ellipsis:
        return f"a tuple, as in (a, b), of {_describe(union_members(args[0]))}"
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return f"a mapping, as in {{name: ...}}, to {_describe(union_members(args[1]))}"
    return getattr(member, "__name__", str(member))
