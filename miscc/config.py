"""Reads YAML files and `--set`, and checks them against a given schema. Parsing of YAML is in yaml_reader.py.

Keys and spelling are those of SSA-GAN, AttnGAN and SEMA, so that their released files load as they are. A setting is
declared beside the part that uses it, see miscc/settings.py; those that all commands have are declared here.
"""

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from easydict import EasyDict

from miscc.errors import ConfigError, shown
from miscc.settings import Setting, arguments_from, setting, settings_of
from miscc.yaml_reader import LeadingZeroError, read_yaml_text

Schema = Mapping[str, Setting]


@dataclass(frozen=True)
class RunSettings:
    """What every command has: a name, a device, a seed."""

    name: str = setting("CONFIG_NAME", "", "name of the experiment; part of the run directory's name")
    gpu: int | None = setting("GPU_ID", None, "number of the GPU; -1: CPU; empty: a GPU if there is one", minimum=-1)
    cuda: bool = setting("CUDA", True, "False: use the CPU even if there is a GPU")
    seed: int = setting(
        "SEED", 100, "of every random draw: order, captions, crops, noise, initial weights", maximum=2**32 - 1
    )
    resume: bool = setting("RESTORE", False, "continue the newest run of this configuration (the same as --resume)")


@dataclass(frozen=True)
class OutputSettings:
    """Settings of commands that write runs."""

    output_dir: str = setting("OUTPUT_DIR", "output", "where the numbered run directories go")


class Config(EasyDict):
    """A whole configuration, read as cfg.TRAIN.NF. The schema checks its values, and their types, when it is made."""

    if TYPE_CHECKING:

        def __getattr__(self, key: str) -> Any: ...


# -- reading -------------------------------------------------------------------------------------------------------


def read_given(
    path: str | Path, overrides: Iterable[tuple[str, str]], schema: Schema, skip_unknown: bool = False
) -> dict[str, Any]:
    """The settings in a YAML file and in `--set` pairs, as {key: value}, converted to their types.

    skip_unknown: leave out keys that the schema lacks, for a command that reads another command's file.
    Raises ConfigError for a missing or broken file, an unknown key (with the nearest name), or a value of another type.
    """
    # `--set` over the file. Text settings are taken as typed: "1e3" stays a name.
    given = read_yaml(path, schema)
    for key, text in overrides:
        is_text = key in schema and schema[key].type is str
        given[key] = text if is_text else _parse_override(key, text)
    return {key: _convert(key, value, schema) for key, value in given.items() if key in schema or not skip_unknown}


def read_yaml(path: str | Path, schema: Schema) -> dict[str, Any]:
    """A settings file as {"TRAIN.NF": 64, ...}. Raises ConfigError when it is missing or not a mapping."""
    path = Path(path)
    if not path.is_file():
        known = ", ".join(sorted(str(p) for p in Path("cfg").glob("*.yml"))) or "none in cfg/"
        raise ConfigError(f"{path}: no such settings file (there are: {known})")

    # An empty file changes nothing; anything but a mapping is no settings file.
    try:
        content = path.read_text(encoding="utf-8")
        document = read_yaml_text(content)
    except (ConfigError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from None
    if document is None:
        return {}
    if not isinstance(document, Mapping):
        raise ConfigError(f"{path}: must hold KEY: value lines, but holds a {type(document).__name__}")

    # A group whose lines are all commented out, `TRAIN:` alone, holds nothing.
    groups = {key.rsplit(".", depth)[0] for key in schema for depth in range(1, key.count(".") + 1)}
    given = {key: value for key, value in flatten(document).items() if value not in (None, {}) or key not in groups}

    # Texts as they are spelled: 1.10 is a name, not 1.1.
    spelled = flatten(read_yaml_text(content, numbers=False))
    return given | {key: spelled[key] for key in given if key in schema and schema[key].type is str}


def resolve(given: Mapping[str, Any], schema: Schema, defaults: Mapping[str, Any], parts: Iterable[type]) -> Config:
    """The whole configuration: what is given over the defaults of the system over those of the schema.

    parts: the dataclasses that are in use; each checks its values, and fills those that it derives from others.
    Returns a nested Config with every key of the schema. Raises ConfigError for a value out of bounds.
    """
    values = {key: one.default for key, one in schema.items()} | dict(defaults) | dict(given)

    # Bounds of single values first: parts may rely on them.
    for key, one in schema.items():
        _check_bounds(one, values[key])
    config = nest(values)

    # Then each part checks values against each other, and may fill some in.
    for part in parts:
        filled = part(**arguments_from(part, config))
        for name, one in settings_of(part).items():
            value = getattr(filled, name)
            values[one.key] = list(value) if isinstance(value, tuple) else value
        config = nest(values)
    return config


def without_effect(given: Mapping[str, Any], schema: Schema, used: Iterable[str]) -> list[str]:
    """Keys that are set but that nothing reads, because they belong to another command or system.

    used: the keys that are read. A key that has its default, as in many original files, is not named.
    """
    used = set(used)
    return [key for key, value in given.items() if key not in used and value not in (schema[key].default, None)]


# -- forms ---------------------------------------------------------------------------------------------------------


def flatten(tree: Mapping, prefix: str = "") -> dict[str, Any]:
    """{"TRAIN": {"NF": 64}} -> {"TRAIN.NF": 64}. An empty mapping is a value.

    Raises ConfigError for a key that is there both nested and dotted.
    """
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        is_group = isinstance(value, Mapping) and bool(value)
        below = flatten(value, f"{prefix}{name}.") if is_group else {f"{prefix}{name}": value}
        if twice := flat.keys() & below.keys():
            raise ConfigError(f"{shown(min(twice))} is given twice; keep one")
        flat |= below
    return flat


def nest(values: Mapping[str, Any]) -> Config:
    """{"TRAIN.NF": 64} -> Config with cfg.TRAIN.NF == 64."""
    tree: dict[str, Any] = {}
    for key, value in values.items():
        *groups, last = key.split(".")
        node = tree
        for group in groups:
            node = node.setdefault(group, {})
        node[last] = value
    return Config(tree)


def to_plain(cfg: Mapping) -> dict:
    """The settings as plain nested dicts, for YAML and checkpoints."""
    return {name: to_plain(value) if isinstance(value, Mapping) else value for name, value in cfg.items()}


def to_yaml(cfg: Mapping) -> str:
    """The settings as YAML text."""
    return yaml.safe_dump(to_plain(cfg), sort_keys=False, default_flow_style=None)


# -- checks --------------------------------------------------------------------------------------------------------


def _check_bounds(one: Setting, value: Any) -> None:
    """Raises ConfigError where a value is none of the choices, or lies outside the bounds."""
    if one.choices and value not in one.choices:
        choices = (repr(choice) if choice == "" or "," in str(choice) else str(choice) for choice in one.choices)
        raise ConfigError(f"{one.key}: must be one of {', '.join(choices)}, not {shown(value)}")
    if one.type is list:
        inside = all(0 <= number and (one.below is None or number < one.below) for number in value)
        if len(value) != one.length or not inside:
            raise ConfigError(f"{one.key}: must be two numbers from 0 to below {one.below:g}, not {shown(value)}")
        return
    if one.type not in (int, float) or value is None:
        return

    # Numbers.
    if one.above is not None and value <= one.above:
        empty = ", or empty" if one.default is None else ""
        raise ConfigError(f"{one.key}: must be greater than {one.above:g}{empty}, not {shown(value)}")
    if one.minimum is not None and value < one.minimum:
        least = "must not be negative, but is" if one.minimum == 0 else f"must be at least {one.minimum:g}, not"
        raise ConfigError(f"{one.key}: {least} {shown(value)}")
    if one.below is not None and value >= one.below:
        raise ConfigError(f"{one.key}: must be below {one.below:g}, not {shown(value)}")
    if one.maximum is not None and value > one.maximum:
        raise ConfigError(f"{one.key}: must be at most {one.maximum:,}, not {shown(value)}")


def _parse_override(key: str, text: str) -> Any:
    try:
        return read_yaml_text(text)
    except LeadingZeroError as error:
        raise ConfigError(f"--set {shown(key)}: {error}") from None
    except ConfigError:
        raise ConfigError(f"--set {shown(key)}: cannot read {shown(text)} as a value") from None


def _convert(key: str, value: Any, schema: Schema) -> Any:
    """A value as its setting's type. Raises ConfigError for an unknown key or another type."""
    if key not in schema:
        near = difflib.get_close_matches(key, schema, n=1, cutoff=0.5)
        same_end = [known for known in schema if known.split(".")[-1] == key.split(".")[-1]]
        hint = (same_end or near or [""])[0]
        raise ConfigError(
            f"{key if len(key) < 80 else shown(key)}: no such setting; "
            + (f"did you mean {hint}?" if hint else "`python main.py --dry-run` prints a system's")
        )
    one = schema[key]

    # Empty: allowed where there is a meaning for it.
    if value is None or (value == "" and one.type is not str):
        if one.default is None:
            return None
        if one.type is str:
            return ""
        raise ConfigError(f"{key}: has no value; give {TYPE_NAMES[one.type]}, for example {one.default}")

    converted = _as_type(value, one.type)
    if converted is None:
        example = "" if one.default is None else f", for example {one.default!r}"
        raise ConfigError(f"{key}: must be {TYPE_NAMES[one.type]}{example}, not {shown(value)}")
    return converted


def _as_type(value: Any, kind: type) -> Any:
    """The value as this type, None if it is not one. YAML 1.1 reads 1e-4 as a string: converted here."""
    if kind is bool:
        return value if isinstance(value, bool) else None
    if kind is int:
        # Also "8" in quotes, and 8.0.
        if isinstance(value, str) and re.fullmatch(r"\s*[-+]?[0-9]{1,18}\s*", value):
            return int(value)
        whole = isinstance(value, float) and value.is_integer()
        return int(value) if whole or (isinstance(value, int) and not isinstance(value, bool)) else None
    if kind is float:
        try:
            number = None if isinstance(value, (bool, list)) else float(value)
        except (TypeError, ValueError, OverflowError):
            return None
        return number if number is not None and number == number and abs(number) != float("inf") else None
    if kind is list:
        items = [_as_type(item, float) for item in value] if isinstance(value, (list, tuple)) else [None]
        return None if None in items else items

    # A text: no path or name holds a NUL, or characters that UTF-8 cannot write.
    text = str(value) if isinstance(value, (str, int, float)) and not isinstance(value, bool) else None
    return None if text is None or "\0" in text or re.search("[\ud800-\udfff]", text) or len(text) > 4096 else text


TYPE_NAMES = {
    bool: "True or False",
    int: "a whole number",
    float: "a number",
    str: "a text",
    list: "a list of numbers",
}
