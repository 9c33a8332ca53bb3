"""How a part declares its settings: a frozen dataclass beside its owner, whose fields carry key, default, meaning, bounds.

A setting is written once, as a field; the schema that YAML files are checked against is the sum of the parts. Reading the
files is miscc/config.py's.
"""

import dataclasses
import math
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

METADATA = "setting"
SCALARS: dict[Any, str] = {
    bool: "a truth value",
    int: "a whole number",
    float: "a number",
    str: "a text",
    type(None): "None",
}


class Setting(NamedTuple):
    """One setting.

    key: its name in YAML files and `--set`, dotted.
    default: its value where none is given.
    type: bool, int, float, str, or list: of numbers.
    meaning: shown to users.
    choices: all values that it may have; (): any.
    minimum, maximum, above, below: bounds of a number, or of each in a list; None: none.
    length: of a list; None: any.
    """

    key: str
    default: Any
    type: type
    meaning: str
    choices: tuple = ()
    minimum: float | None = None
    maximum: float | None = None
    above: float | None = None
    below: float | None = None
    length: int | None = None


def setting(
    key: str,
    default: Any,
    meaning: str,
    choices: tuple = (),
    minimum: float | None = 0,
    maximum: float | None = 10**9,
    above: float | None = None,
    below: float | None = None,
    length: int | None = None,
) -> Any:
    """A dataclass field that is a setting; its type is the field's annotation. The arguments are those of `Setting`."""
    bounds = {"minimum": minimum, "maximum": maximum, "above": above, "below": below, "length": length}
    metadata = {METADATA: {"key": key, "meaning": meaning, "choices": choices} | bounds}
    return dataclasses.field(default=default, metadata=metadata)


def settings_of(part: type) -> dict[str, Setting]:
    """{field: setting} of a part's dataclass; fields without a key are the part's own and no settings.

    A subclass that changes a default writes `nf: int = 32`: the rest is that of the field it inherits.
    """
    found, annotations = {}, typing.get_type_hints(part)
    for field in dataclasses.fields(part):
        # The class itself first, then those that it inherits from.
        declared = (getattr(base, "__dataclass_fields__", {}).get(field.name) for base in part.__mro__)
        metadata = next((one.metadata[METADATA] for one in declared if one and METADATA in one.metadata), None)
        if metadata is not None:
            kind = _plain_type(annotations[field.name])
            default: Any = field.default
            default = list(default) if kind is list else default
            found[field.name] = Setting(default=default, type=kind, **metadata)
    return found


def schema_of(parts: Iterable[type]) -> dict[str, Setting]:
    """{key: setting} of all parts together; where several declare a key, the first one's default holds.

    Raises ValueError where they disagree on anything else: such a setting belongs in a dataclass that they inherit.
    """
    schema: dict[str, Setting] = {}
    for part in parts:
        for one in settings_of(part).values():
            # Several parts may share a setting, not redefine it.
            known = schema.setdefault(one.key, one)
            if known._replace(default=one.default) != one:
                raise ValueError(f"{one.key}: {part.__qualname__} declares it otherwise than another part")

    # A group of keys cannot be a key, too.
    for key in schema:
        parents = {".".join(key.split(".")[:depth]) for depth in range(1, key.count(".") + 1)}
        if both := parents & set(schema):
            raise ValueError(f"{both.pop()}: is a setting and the group of {key}")
    return schema


def from_config(part: type, config: Mapping[str, Any]) -> Any:
    """The part's dataclass, filled from a nested configuration."""
    return part(**arguments_from(part, config))


def arguments_from(part: type, config: Mapping[str, Any]) -> dict[str, Any]:
    """{field: value} of the part's settings in a nested configuration; lists as tuples."""
    values = {name: lookup(config, one.key) for name, one in settings_of(part).items()}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def check_arguments(part: type, arguments: Mapping[str, Any]) -> None:
    """Raises ValueError where a value is not of its field's type, not finite, or none of its choices.

    Unknown names, and fields that hold more than one value, are left to the dataclass and its owner.
    """
    hints, declared = typing.get_type_hints(part), settings_of(part)
    for name, value in arguments.items():
        # A type or a union of types; whole numbers are numbers, too, truth values are not.
        hint = hints.get(name)
        kinds = typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)
        if not all(kind in SCALARS for kind in kinds):
            continue
        allowed = {*kinds, int} if float in kinds else set(kinds)
        if type(value) not in allowed or (isinstance(value, float) and not math.isfinite(value)):
            raise ValueError(f"{name} is {value!r:.80}, not {' or '.join(SCALARS[kind] for kind in kinds)}")

        choices = declared[name].choices if name in declared else ()
        if choices and value not in choices:
            raise ValueError(f"{name} is {value!r:.80}, not one of {', '.join(map(str, choices))}")


def lookup(config: Mapping[str, Any], key: str) -> Any:
    """The value of a dotted key: lookup(config, "TRAIN.NF")."""
    value: Any = config
    for name in key.split("."):
        value = value[name]
    return value


def _plain_type(annotation: Any) -> type:
    """int of `int | None`, list of `tuple[float, float]`."""
    (kind,) = [one for one in typing.get_args(annotation) if one is not type(None)][:1] or [annotation]
    if typing.get_origin(annotation) in (tuple, list):
        return list
    return kind
