"""Every setting: its default, type and meaning; reading of YAML files and `--set`. The only file that reads YAML.

Keys and spelling are those of SSA-GAN, AttnGAN and SEMA, so that their released files load as they are. What the
originals hard-code is a key here, with their value as the default. Nothing below the entry scripts and the
trainers sees the settings: they pass plain typed arguments on.
"""

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from easydict import EasyDict

from miscc.errors import ConfigError


class Key(NamedTuple):
    """One setting. `used_by`: all, gan, damsm, sampling, or system: only the systems that name it."""

    default: Any
    type: type
    meaning: str
    used_by: str
    choices: tuple = ()


SCHEMA = {
    "CONFIG_NAME": Key("", str, "name of the experiment; part of the run directory's name", "all"),
    "DATASET_NAME": Key("birds", str, "birds, coco, folder, flickr or toybirds", "all"),
    "DATA_DIR": Key("", str, "where the data lies; empty: data/<DATASET_NAME>", "all"),
    "DATA_CACHE": Key(False, bool, "keep decoded, resized images in one file under DATA_DIR/cache", "all"),
    "SKIP_BROKEN": Key(False, bool, "leave out images that cannot be read instead of stopping", "all"),
    "OUTPUT_DIR": Key("output", str, "where the numbered run directories go", "gan"),
    "GPU_ID": Key(None, int, "number of the GPU; -1: CPU; empty: a GPU if there is one", "all"),
    "CUDA": Key(True, bool, "False: use the CPU even if there is a GPU", "all"),
    "WORKERS": Key(4, int, "processes that read images; 0: none beside the main one", "all"),
    "RNN_TYPE": Key("LSTM", str, "recurrent cell of the text encoder", "damsm", ("LSTM", "GRU")),
    "B_VALIDATION": Key(False, bool, "True: sample the test captions instead of training", "sampling"),
    "RESTORE": Key(False, bool, "continue the newest run of this configuration (the same as --resume)", "all"),
    "USE_SN": Key(False, bool, "spectral normalisation of the discriminator's convolutions", "system"),
    "SEED": Key(100, int, "of every random draw: order, captions, crops, noise, initial weights", "all"),
    "loss": Key("hinge", str, "adversarial loss", "system", ("hinge",)),
    "TREE.BRANCH_NUM": Key(1, int, "AttnGAN: number of stages; each doubles the image size", "system"),
    "TREE.BASE_SIZE": Key(256, int, "image size in pixels (AttnGAN: of the first stage)", "all"),
    "TRAIN.FLAG": Key(True, bool, "False: sample instead of training", "sampling"),
    "TRAIN.BATCH_SIZE": Key(24, int, "images per step, over all GPUs together", "all"),
    "TRAIN.MAX_EPOCH": Key(600, int, "epochs to train", "all"),
    "TRAIN.MAX_STEPS": Key(0, int, "stop after so many steps, whatever MAX_EPOCH says; 0: no limit", "gan"),
    "TRAIN.WARMUP_EPOCHS": Key(0, int, "no numbered checkpoint before this epoch", "gan"),
    "TRAIN.GSAVE_INTERVAL": Key(10, int, "epochs between numbered checkpoints for sampling; 0: none", "gan"),
    "TRAIN.DSAVE_INTERVAL": Key(0, int, "epochs between numbered checkpoints that hold D, too; 0: none", "gan"),
    "TRAIN.SNAPSHOT_INTERVAL": Key(0, int, "epochs between numbered checkpoints with everything; 0: none", "all"),
    "TRAIN.SAVE_EVERY": Key(1000, int, "steps between writes of last.pth within an epoch; 0: at its end alone", "gan"),
    "TRAIN.SAMPLE_EVERY": Key(500, int, "steps between pictures of fixed test captions; 0: none", "gan"),
    "TRAIN.LOG_EVERY": Key(50, int, "steps between lines in stats.jsonl and TensorBoard", "gan"),
    "TRAIN.EVAL_EVERY": Key(0, int, "epochs between evaluations on held-out training classes; 0: none", "gan"),
    "TRAIN.EVAL_CLASSES": Key(0.05, float, "share of the training classes held out for them, never trained on", "gan"),
    "TRAIN.EVAL_IMAGES": Key(2000, int, "images drawn for an evaluation", "gan"),
    "TRAIN.EVAL_MEASURE": Key(
        "FD", str, "the number: FD by EfficientNet-lite0, or FID by TensorFlow's Inception", "gan", ("FD", "FID")
    ),
    "TRAIN.GENERATOR_LR": Key(1e-4, float, "Adam's learning rate of G", "gan"),
    "TRAIN.DISCRIMINATOR_LR": Key(4e-4, float, "Adam's learning rate of D", "gan"),
    "TRAIN.ENCODER_LR": Key(2e-3, float, "Adam's first learning rate in pretraining the encoders", "damsm"),
    "TRAIN.ENCODER_LR_DECAY": Key(0.98, float, "factor on ENCODER_LR each epoch, down to a tenth of it", "damsm"),
    "TRAIN.BETAS": Key([0.0, 0.9], list, "Adam's betas", "all"),
    "TRAIN.RNN_GRAD_CLIP": Key(0.25, float, "largest gradient norm of the text encoder's recurrent net", "damsm"),
    "TRAIN.PATIENCE": Key(
        20, int, "stop pretraining after so many epochs without a better validation loss; 0: never", "damsm"
    ),
    "TRAIN.HELD_OUT": Key(
        0.05,
        float,
        "share of training images held out to validate the encoders where there is no val split",
        "damsm",
    ),
    "TRAIN.NET_G": Key("", str, "weights to sample from or to continue from: ours or the authors'", "gan"),
    "TRAIN.NET_D": Key("", str, "the authors' discriminator that goes with NET_G", "gan"),
    "TRAIN.B_NET_D": Key(True, bool, "take D from NET_G's checkpoint too, where it holds one", "gan"),
    "TRAIN.NET_E": Key("", str, "AttnGAN's name for TEXT.DAMSM_NAME; in pretraining: encoders to continue from", "all"),
    "TRAIN.NF": Key(64, int, "base number of channels of G and D (SSA-GAN, DF-GAN, SEMA)", "system"),
    "TRAIN.PRECISION": Key(
        "tf32",
        str,
        "fp32, tf32 (on GPUs that have it), or bf16 autocast with penalties and losses in float32",
        "gan",
        ("fp32", "tf32", "bf16"),
    ),
    "TRAIN.COMPILE": Key(False, bool, "torch.compile for all that is not differentiated twice", "gan"),
    "TRAIN.CHANNELS_LAST": Key(False, bool, "channels_last layout of the networks; pays on GPUs alone", "gan"),
    "TRAIN.ACCUMULATE": Key(1, int, "micro-batches that BATCH_SIZE is cut into, one after the other", "gan"),
    "TRAIN.ACTIVATION_CHECKPOINTING": Key(
        False, bool, "compute G's activations again in the backward pass instead of keeping them", "gan"
    ),
    "TRAIN.GLOBAL_DAMSM": Key(
        False, bool, "DAMSM's losses over the images and captions of all processes together", "gan"
    ),
    "TRAIN.EMA_DECAY": Key(0.999, float, "of the averaged generator used for samples; 0: sample from G itself", "gan"),
    "TRAIN.DAMSM_WEIGHT": Key(
        None, float, "weight of the DAMSM loss in G's; empty: 0.05, or 0.1 with FINETUNE_ENCODERS", "system"
    ),
    "TRAIN.PENALTY_WEIGHT": Key(2.0, float, "weight of the gradient penalty (MA-GP)", "system"),
    "TRAIN.PENALTY_POWER": Key(6.0, float, "power of the gradient's norm in it", "system"),
    "TRAIN.PENALTY_STEP": Key(
        "separate",
        str,
        "the penalty in an optimizer step of its own, or jointly with the hinge",
        "system",
        ("separate", "joint"),
    ),
    "TRAIN.FINETUNE_ENCODERS": Key(
        False, bool, "train the encoders along with G and D (SSA-GAN, section 3.4)", "system"
    ),
    "TRAIN.FINETUNE_LR": Key(4e-5, float, "Adam's learning rate for that", "system"),
    "TRAIN.FINETUNE_MODE": Key(
        "eval",
        str,
        "mode of the encoders meanwhile; train: with dropout and batch statistics, as the authors did",
        "system",
        ("eval", "train"),
    ),
    "TRAIN.SMOOTH.GAMMA1": Key(5.0, float, "DAMSM: sharpness of attention over regions", "all"),
    "TRAIN.SMOOTH.GAMMA2": Key(5.0, float, "DAMSM: sharpness in joining the words", "all"),
    "TRAIN.SMOOTH.GAMMA3": Key(10.0, float, "DAMSM: sharpness of the match over the batch", "all"),
    "TRAIN.SMOOTH.LAMBDA": Key(1.0, float, "factor on the DAMSM loss (AttnGAN: its weight)", "system"),
    "GAN.NAME": Key("", str, "the system; empty: found from the other keys", "all"),
    "GAN.Z_DIM": Key(100, int, "length of the noise", "gan"),
    "GAN.TRUNCATION": Key(
        None, float, "sample with noise cut at +-2 times this; empty: plain normal noise", "sampling"
    ),
    "GAN.SSCBN": Key(
        "code",
        str,
        "form of the SSCBN: as in the authors' code or as in the paper's text",
        "system",
        ("code", "paper"),
    ),
    "GAN.UPSAMPLE": Key(
        "nearest",
        str,
        "upsampling between blocks: nearest (code) or bilinear (paper)",
        "system",
        ("nearest", "bilinear"),
    ),
    "GAN.MASK": Key(
        "predicted", str, "SSA-GAN's masks; ones: all ones, for ablations", "system", ("predicted", "ones")
    ),
    "GAN.DF_DIM": Key(64, int, "AttnGAN: base number of channels of D", "system"),
    "GAN.GF_DIM": Key(32, int, "AttnGAN: base number of channels of G", "system"),
    "GAN.CONDITION_DIM": Key(100, int, "AttnGAN: length of the augmented condition", "system"),
    "GAN.R_NUM": Key(2, int, "AttnGAN: residual blocks a stage", "system"),
    "GAN.B_ATTENTION": Key(True, bool, "AttnGAN: word attention", "system"),
    "GAN.B_DCGAN": Key(False, bool, "AttnDCGAN instead of AttnGAN", "all"),
    "TEXT.CAPTIONS_PER_IMAGE": Key(10, int, "captions of an image that are used at most", "all"),
    "TEXT.EMBEDDING_DIM": Key(256, int, "length of word and sentence features", "all"),
    "TEXT.WORDS_NUM": Key(18, int, "words of a caption at most", "all"),
    "TEXT.DAMSM_NAME": Key(
        "",
        str,
        "the encoders: ours or text_encoder*.pth; empty: DAMSMencoders/<DATASET_NAME>/best.pth",
        "gan",
    ),
    "TEXT.TRANSFORMER": Key(
        "", str, "SEMA: folder of a Hugging Face BERT that gives half of the sentence; empty: the LSTM alone", "system"
    ),
    "SEMA.REDESCRIPTION_WEIGHT": Key(
        1.0, float, "weight of SEM(R(fake), sentence) in G's loss; 0: without R", "system"
    ),
    "SEMA.FEATURE_WEIGHT": Key(1.0, float, "weight of SEM(F(fake), F(real)) in G's loss; 0: without F", "system"),
    "SEMA.MARGIN": Key(0.5, float, "distance up to which R pushes what it writes of fake images away", "system"),
    "SEMA.STEPS": Key(8, int, "how often R's LSTM looks at an image", "system"),
    "SEMA.FEATURE_DIM": Key(256, int, "length of F's features", "system"),
    "DAMSM.IMAGE_ENCODER": Key(
        "inception", str, "network of the image encoder to pretrain", "damsm", ("inception", "small")
    ),
    "DAMSM.INCEPTION_WEIGHTS": Key(
        "", str, "ImageNet weights of torchvision's inception_v3; empty: torchvision's cache", "damsm"
    ),
}

# What differs from the defaults above, by system. A file's own keys come after these.
ATTN_DEFAULTS = {
    "TREE.BRANCH_NUM": 3,
    "TREE.BASE_SIZE": 64,
    "TRAIN.BATCH_SIZE": 20,
    "TRAIN.GENERATOR_LR": 2e-4,
    "TRAIN.DISCRIMINATOR_LR": 2e-4,
    "TRAIN.BETAS": [0.5, 0.999],
    "TRAIN.DAMSM_WEIGHT": 1.0,
    "TRAIN.SMOOTH.GAMMA1": 4.0,
    "TRAIN.SMOOTH.LAMBDA": 5.0,
}
SYSTEM_DEFAULTS = {
    "ssa_gan": {},
    "df_gan": {
        "TRAIN.NF": 32,
        "TRAIN.BATCH_SIZE": 32,
        "TRAIN.MAX_EPOCH": 1300,
        "TRAIN.DAMSM_WEIGHT": 0.0,
        "GAN.TRUNCATION": 0.88,
    },
    "sema": {
        "TRAIN.NF": 32,
        "TRAIN.BATCH_SIZE": 48,
        "TRAIN.MAX_EPOCH": 121,
        "TRAIN.DAMSM_WEIGHT": 0.0,
        "GAN.TRUNCATION": 0.8,
    },
    "attn_gan": ATTN_DEFAULTS,
    "attn_dcgan": ATTN_DEFAULTS | {"GAN.B_DCGAN": True},
    "damsm": {
        "TRAIN.BATCH_SIZE": 48,
        "TRAIN.BETAS": [0.5, 0.999],
        "TRAIN.SMOOTH.GAMMA1": 4.0,
        "TRAIN.SNAPSHOT_INTERVAL": 50,
    },
}


def load_config(
    path: str | Path,
    overrides: Iterable[tuple[str, str]] = (),
    command: str = "gan",
    systems: Iterable[str] = (),
) -> EasyDict:
    """Read a YAML file, then `--set` pairs, over the defaults of its system.

    command: "gan" (main.py) or "damsm" (pretrain_DAMSM.py); systems: the names that GAN.NAME may have.
    Returns a nested EasyDict with every key of SCHEMA. Raises ConfigError for a missing or broken file, an unknown
    key (with the nearest name), a wrong type or value.
    """
    given = read_yaml(path)
    for name, text in overrides:
        given[name] = text if name in SCHEMA and SCHEMA[name].type is str else _parse_override(name, text)
    given = {name: _convert(name, value) for name, value in given.items()}
    system = "damsm" if command == "damsm" else find_system(given, systems)
    values = {name: key.default for name, key in SCHEMA.items()}
    values |= SYSTEM_DEFAULTS.get(system, {}) | given
    values["GAN.NAME"] = system
    _fill_derived(values, command, Path(path).stem)
    _check(values)
    return nest(values)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """A settings file as {"TRAIN.NF": 64, ...}. Raises ConfigError when it is missing or not a mapping."""
    path = Path(path)
    if not path.is_file():
        known = ", ".join(sorted(str(p) for p in Path("cfg").glob("*.yml"))) or "none in cfg/"
        raise ConfigError(f"{path}: no such settings file (there are: {known})")
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())[:200]}") from None
    if document is None:
        return {}
    if not isinstance(document, Mapping):
        raise ConfigError(f"{path}: must hold KEY: value lines, but holds a {type(document).__name__}")
    return flatten(document)


def flatten(tree: Mapping, prefix: str = "") -> dict[str, Any]:
    """{"TRAIN": {"NF": 64}} -> {"TRAIN.NF": 64}; a group without members is left out."""
    flat = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}.")
        elif value is None and any(known.startswith(f"{prefix}{name}.") for known in SCHEMA):
            continue  # `TRAIN:` with all its lines commented out
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def nest(values: Mapping[str, Any]) -> EasyDict:
    """{"TRAIN.NF": 64} -> EasyDict with cfg.TRAIN.NF == 64."""
    tree: dict[str, Any] = {}
    for name, value in values.items():
        *groups, last = name.split(".")
        node = tree
        for group in groups:
            node = node.setdefault(group, {})
        node[last] = value
    return EasyDict(tree)


def to_plain(cfg: Mapping) -> dict:
    """The settings as plain nested dicts, for YAML and checkpoints."""
    return {name: to_plain(value) if isinstance(value, Mapping) else value for name, value in cfg.items()}


def to_yaml(cfg: Mapping) -> str:
    """The settings as YAML text."""
    return yaml.safe_dump(to_plain(cfg), sort_keys=False, default_flow_style=None)


def lookup(cfg: Mapping, name: str) -> Any:
    """The value of a dotted key: lookup(cfg, "TRAIN.NF")."""
    value: Any = cfg
    for part in name.split("."):
        value = value[part]
    return value


def find_system(given: Mapping[str, Any], systems: Iterable[str]) -> str:
    """The system that a file means: GAN.NAME, or the rule for files whose authors had only one system."""
    name = str(given.get("GAN.NAME") or "").strip().lower().replace("-", "_")
    systems = list(systems)
    spelled = {system.replace("_", ""): system for system in systems}  # so that AttnGAN and Attn-GAN are found, too
    name = spelled.get(name.replace("_", "").replace(" ", ""), name)
    if not name:
        attention = int(given.get("TREE.BRANCH_NUM", 1)) > 1 or bool(given.get("TRAIN.NET_E"))
        name = ("attn_dcgan" if given.get("GAN.B_DCGAN") else "attn_gan") if attention else "ssa_gan"
    if systems and name not in systems:
        near = difflib.get_close_matches(name, systems, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(f"GAN.NAME: there is no system {name!r} (there are: {', '.join(systems)}){hint}")
    return name


def without_effect(
    path: str | Path, command: str, system_keys: Iterable[str], overrides: Iterable[tuple[str, str]] = ()
) -> list[str]:
    """Keys that the file, or `--set`, sets although nothing reads them: of another command, or of another system.

    system_keys: the keys that the chosen system (or the encoders) names.
    """
    read_by_all = {"gan": ("all", "gan", "sampling"), "damsm": ("all", "damsm")}[command]
    used = {name for name, key in SCHEMA.items() if key.used_by in read_by_all} | set(system_keys)
    # What the original files carry along with its default value does no harm and is not worth a warning.
    given = read_yaml(path) | dict(overrides)
    return [name for name, value in given.items() if name not in used and value not in (SCHEMA[name].default, None)]


def _fill_derived(values: dict[str, Any], command: str, stem: str) -> None:
    values["CONFIG_NAME"] = values["CONFIG_NAME"] or stem
    values["DATA_DIR"] = values["DATA_DIR"] or f"data/{values['DATASET_NAME']}"
    if values["TRAIN.DAMSM_WEIGHT"] is None:
        values["TRAIN.DAMSM_WEIGHT"] = 0.1 if values["TRAIN.FINETUNE_ENCODERS"] else 0.05
    if command == "gan":
        default = f"DAMSMencoders/{values['DATASET_NAME']}/best.pth"
        values["TEXT.DAMSM_NAME"] = values["TEXT.DAMSM_NAME"] or values["TRAIN.NET_E"] or default


def _check(values: Mapping[str, Any]) -> None:
    for name, key in SCHEMA.items():
        if key.choices and values[name] not in key.choices:
            raise ConfigError(f"{name}: must be one of {', '.join(key.choices)}, not {values[name]!r}")
    positive = ("TRAIN.BATCH_SIZE", "TRAIN.NF", "GAN.Z_DIM", "GAN.GF_DIM", "GAN.DF_DIM", "TEXT.WORDS_NUM",
                "TEXT.CAPTIONS_PER_IMAGE", "TEXT.EMBEDDING_DIM", "TREE.BRANCH_NUM", "TRAIN.LOG_EVERY", "TRAIN.ACCUMULATE",
                "TRAIN.GENERATOR_LR", "TRAIN.DISCRIMINATOR_LR", "TRAIN.ENCODER_LR", "SEMA.STEPS", "SEMA.FEATURE_DIM")  # fmt: skip
    for name in positive:
        if values[name] <= 0:
            raise ConfigError(f"{name}: must be greater than 0, not {values[name]}")
    not_negative = [n for n, key in SCHEMA.items() if key.type in (int, float) and n not in (*positive, "GPU_ID")]
    for name in not_negative:
        if values[name] is not None and values[name] < 0:
            raise ConfigError(f"{name}: must not be negative, but is {values[name]}")
    if len(values["TRAIN.BETAS"]) != 2 or not all(0 <= beta < 1 for beta in values["TRAIN.BETAS"]):
        raise ConfigError(f"TRAIN.BETAS: must be two numbers from 0 to below 1, not {values['TRAIN.BETAS']}")
    if values["TRAIN.EVAL_EVERY"] and not values["TRAIN.EVAL_CLASSES"]:
        raise ConfigError("TRAIN.EVAL_CLASSES: must be above 0 where TRAIN.EVAL_EVERY asks for evaluations")
    if values["GAN.TRUNCATION"] == 0:
        raise ConfigError("GAN.TRUNCATION: must be above 0, or empty for plain normal noise")
    for name in ("TRAIN.EMA_DECAY", "TRAIN.HELD_OUT", "TRAIN.EVAL_CLASSES"):
        if values[name] >= 1:
            raise ConfigError(f"{name}: must be below 1, not {values[name]}")


def _parse_override(name: str, text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError(f"--set {name}: cannot read {text!r} as a value") from None


def _convert(name: str, value: Any) -> Any:
    if name not in SCHEMA:
        near = difflib.get_close_matches(name, SCHEMA, n=1, cutoff=0.5)
        same_end = [known for known in SCHEMA if known.split(".")[-1] == name.split(".")[-1]]
        hint = (same_end or near or [""])[0]
        raise ConfigError(
            f"{name}: no such setting; " + (f"did you mean {hint}?" if hint else "miscc/config.py has them all")
        )
    key = SCHEMA[name]
    if value is None or (value == "" and key.type is not str):
        if key.default is None:
            return None
        if key.type is str:
            return ""
        raise ConfigError(f"{name}: has no value; give {_type_name(key.type)}, for example {key.default}")
    converted = _as_type(value, key.type)
    if converted is None:
        raise ConfigError(f"{name}: must be {_type_name(key.type)}, for example {key.default!r}, not {value!r}")
    return converted


def _as_type(value: Any, wanted: type) -> Any:
    """The value as the wanted type, None if it is not one. YAML 1.1 reads 1e-4 as a string: converted here."""
    if wanted is bool:
        return value if isinstance(value, bool) else None
    if wanted is int:
        if isinstance(value, str) and value.strip().lstrip("-").isdigit():
            return int(value)
        whole = isinstance(value, float) and value.is_integer()
        return int(value) if whole or (isinstance(value, int) and not isinstance(value, bool)) else None
    if wanted is float:
        try:
            number = None if isinstance(value, (bool, list)) else float(value)
        except (TypeError, ValueError):
            return None
        return number if number is not None and number == number and abs(number) != float("inf") else None
    if wanted is list:
        items = [_as_type(item, float) for item in value] if isinstance(value, (list, tuple)) else [None]
        return None if None in items else items
    return str(value) if isinstance(value, (str, int, float)) and not isinstance(value, bool) else None


def _type_name(wanted: type) -> str:
    names = {
        bool: "True or False",
        int: "a whole number",
        float: "a number",
        str: "a text",
        list: "a list of numbers",
    }
    return names[wanted]
