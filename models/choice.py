"""Which system a settings file means, and which settings a system's parts declare."""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from miscc.config import Config, Schema, read_given, resolve
from miscc.errors import ConfigError
from miscc.settings import arguments_from, from_config, schema_of, setting
from models import SYSTEMS
from models.settings import NumStagesSettings


@dataclass(frozen=True)
class SystemChoice(NumStagesSettings):
    """Keys that show which system a file means, as the authors' own files do not name it; and `loss`, which those have, too."""

    name: str = setting("GAN.NAME", "", "the system; empty: found from the other keys")
    dcgan: bool = setting("GAN.B_DCGAN", False, "AttnDCGAN instead of AttnGAN")
    num_stages: int = 1
    loss: str = setting("loss", "hinge", "adversarial loss; there is no other", ("hinge",))


@dataclass(frozen=True)
class ChosenSystem:
    """The system of a configuration, with its settings.

    name: as in GAN.NAME.
    networks: {part: arguments of its network}.
    objective: the objective's dataclass, `System.Settings`.
    text: what the system makes of the text encoder, `System.TextSettings`.
    """

    name: str
    networks: dict[str, dict[str, Any]]
    objective: Any
    text: Any


def chosen_system(config: Mapping[str, Any]) -> ChosenSystem:
    """The system that a resolved configuration names, and its settings in it."""
    name = config["GAN"]["NAME"]
    system = SYSTEMS[name]
    networks = {part: arguments_from(network.Settings, config) for part, network in system.NETWORKS.items()}
    return ChosenSystem(name, networks, from_config(system.Settings, config), from_config(system.TextSettings, config))


# {TEXT.ENCODER: defaults that depend on it}. Without a DAMSM loss for CLIP: that needs DAMSM's own encoders.
ENCODER_DEFAULTS: dict[str, dict[str, Any]] = {
    "damsm": {},
    "clip": {"TEXT.EMBEDDING_DIM": 512, "TEXT.WORDS_NUM": 77, "TRAIN.DAMSM_WEIGHT": 0.0},
}


def find_system(given: Mapping[str, Any], systems: Iterable[str] = ()) -> str:
    """The system that a file means: GAN.NAME, or the rule for files whose authors had only one system.

    given: {key: value}.
    systems: names that are allowed; empty: all.

    Raises ConfigError with the nearest name.
    """
    # The papers' spellings are accepted, too: AttnGAN, Attn-GAN.
    name = str(given.get("GAN.NAME") or "").strip().lower().replace("-", "_")
    systems = list(systems)
    spelled = {system.replace("_", ""): system for system in systems}
    name = spelled.get(name.replace("_", "").replace(" ", ""), name)

    # Without a name: several stages, or an encoder under AttnGAN's key, mean AttnGAN or AttnDCGAN.
    if not name:
        attention = int(given.get("TREE.BRANCH_NUM", 1)) > 1 or bool(given.get("TRAIN.NET_E"))
        name = ("attn_dcgan" if given.get("GAN.B_DCGAN") else "attn_gan") if attention else "ssa_gan"

    # Refuse an unknown name.
    if systems and name not in systems:
        near = difflib.get_close_matches(name, systems, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(f"GAN.NAME: there is no system {name!r} (there are: {', '.join(systems)}){hint}")
    return name


def network_parts(name: str) -> list[type]:
    """The dataclasses of a system's networks, and of what it makes of the text encoder."""
    system = SYSTEMS[name]
    return [*(network.Settings for network in system.NETWORKS.values()), system.TextSettings]


def system_parts(name: str) -> list[type]:
    """The dataclasses of a system's networks and objective."""
    return [*network_parts(name), SYSTEMS[name].Settings]


def keys_of(parts: Iterable[type]) -> set[str]:
    """The keys that some parts declare."""
    return set(schema_of(parts))


def system_defaults(name: str) -> dict[str, Any]:
    """{key: default} of a system: the defaults of its parts, and of the loops' settings that it changes."""
    parts = schema_of(system_parts(name)).items()
    return {key: one.default for key, one in parts} | dict(SYSTEMS[name].DEFAULTS)


def schema_with_systems(parts: Sequence[type]) -> Schema:
    """The settings of some parts, and of all systems."""
    of_systems = [part for name in SYSTEMS for part in system_parts(name)]
    return schema_of([*parts, SystemChoice, *of_systems])


def load_for_system(
    path: str | Path,
    overrides: Iterable[tuple[str, str]],
    parts: Sequence[type],
    schema: Schema,
    skip_unknown: bool = False,
) -> Config:
    """A YAML file, then `--set` pairs, over the defaults of the system that they mean.

    parts: the dataclasses that the command reads, beside the system's.
    schema, skip_unknown: see miscc.config.read_given.

    Returns a nested Config with every key of the schema. Raises ConfigError for what is missing, unknown or wrong.
    """
    # What the user gave, and the system that it means.
    given = read_given(path, overrides, schema, skip_unknown)
    system = find_system(given, SYSTEMS)
    given["GAN.NAME"], given["CONFIG_NAME"] = system, given.get("CONFIG_NAME") or Path(path).stem

    # Over the system's defaults, and those that its text encoder changes.
    defaults = system_defaults(system)
    encoder = given.get("TEXT.ENCODER") or defaults.get("TEXT.ENCODER", "")
    defaults |= ENCODER_DEFAULTS.get(encoder, {})
    defaults = {key: value for key, value in defaults.items() if key in schema}
    return resolve(given, schema, defaults, [*parts, SYSTEMS[system].Settings])
