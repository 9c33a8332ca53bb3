"""A published model: a folder with model.safetensors, config.json, vocabulary.json and README.md, read as a checkpoint.

discriminators.safetensors is beside them where a training shall go on from the folder as from its own checkpoint. Loading a
folder executes nothing: tensors come from safetensors, everything else from JSON. The command that writes one is publish.py, its
README.md comes from model_card.py.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch

from miscc.checkpoint import load_checkpoint, load_file, validate
from miscc.errors import CheckpointError, DamagedError, DataError
from miscc.files import hash_of_file, read_json, write_atomically, write_json
from miscc.vocabulary import Vocabulary, read_words
from sampling.trained_with import entries_of

WEIGHTS, TRAINING_WEIGHTS, CONFIG, VOCABULARY, CARD, PICTURE = (
    "model.safetensors", "discriminators.safetensors", "config.json", "vocabulary.json", "README.md", "samples.png",
)  # fmt: skip
FORMAT = 1  # of config.json; raised when an older reader would misread a newer folder
PARTS = ("generator", "text_encoder")


def is_published(path: str | Path) -> bool:
    """Whether this is the folder of a published model."""
    return (Path(path) / CONFIG).is_file() and (Path(path) / WEIGHTS).is_file()


def weight_file(path: str | Path) -> Path:
    """The file that holds the weights: of a published model the one in its folder, else the path itself."""
    return Path(path) / WEIGHTS if is_published(path) else Path(path)


def load_model(path: str | Path) -> dict[str, Any]:
    """The checkpoint in a file of ours, or in the folder of a published model. Raises CheckpointError."""
    checkpoint = read_published(path) if Path(path).is_dir() else load_checkpoint(path)
    validate(checkpoint, path)
    return checkpoint


def load_weights(path: str | Path) -> Any:
    """What a weight file holds, ours or the authors', not checked; a published model's folder as a checkpoint.

    With the discriminators of the folder, where it has them. Raises CheckpointError where it is missing, damaged or of a newer
    format.
    """
    return read_published(path, with_discriminators=True) if is_published(path) else load_file(path)


def find_published(name: str | Path) -> Path:
    """The folder of a published model: one on this disk, else "owner/name" by huggingface_hub, which nothing else needs.

    Raises CheckpointError where there is neither.
    """
    # On this disk.
    if Path(name).is_dir():
        return Path(name)

    # Online: a name of two parts, and the package that fetches it.
    parts = str(name).split("/")
    if len(parts) != 2 or not all(parts) or parts[0] in (".", "..", "~"):
        raise CheckpointError(
            f"{name}: no such folder; give the folder of a published model, or owner/name of one online"
        )
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    except ImportError:
        raise CheckpointError(
            f"{name}: no such folder; to fetch a model of that name, pip install huggingface_hub"
        ) from None
    try:
        # Only the files that are read; no code.
        return Path(snapshot_download(str(name), allow_patterns=[WEIGHTS, CONFIG, VOCABULARY, CARD]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{name}: no such folder, and it cannot be fetched: {reason}") from None


def write_published(folder: Path, networks: Mapping[str, Mapping[str, Any]], words: Vocabulary, about: dict) -> None:
    """Write weights, vocabulary and, last of all, config.json, without which the folder is not taken for a model.

    networks: {"generator", "text_encoder"} and any discriminators, as models.registry.to_state has them.
    about: what config.json says besides.
    """
    described = {part: {name: entry[name] for name in ("name", "arguments")} for part, entry in networks.items()}
    discriminators = [part for part in networks if part not in PARTS]
    names = (*([TRAINING_WEIGHTS] if discriminators else []), WEIGHTS, VOCABULARY, CONFIG)
    new = {name: folder / f".{name}.new.tmp" for name in names}
    checksums = {}
    try:
        # Every file under another name first: a full disk leaves the model that is there as it was.
        if discriminators:
            parts = {part: networks[part] for part in discriminators}
            checksums["discriminators_sha256"] = _write_weights(new[TRAINING_WEIGHTS], parts)
        checksums["sha256"] = _write_weights(new[WEIGHTS], {part: networks[part] for part in PARTS})
        words.save(new[VOCABULARY])
        parts = {part: described[part] for part in PARTS}
        trained = {"discriminators": {part: described[part] for part in discriminators}} if discriminators else {}
        write_json(new[CONFIG], {"format": FORMAT, **about, **checksums, **parts, **trained})

        # config.json with the checksums comes last; then what it no longer names is not needed.
        for name, temporary in new.items():
            os.replace(temporary, folder / name)
        if not discriminators:
            (folder / TRAINING_WEIGHTS).unlink(missing_ok=True)
    finally:
        for temporary in new.values():
            temporary.unlink(missing_ok=True)


def _write_weights(file: Path, networks: Mapping[str, Mapping[str, Any]]) -> str:
    """Write the tensors of networks, each under its own prefix; returns the file's checksum."""
    tensors = {
        f"{part}.{name}": tensor.detach().cpu().contiguous().clone()
        for part, entry in networks.items()
        for name, tensor in entry["state"].items()
    }
    # In memory first: the library would write the file in place.
    encoded = safetensors.torch.save(tensors, metadata={"format": "pt"})
    write_atomically(file, lambda stream: stream.write(encoded))
    return hash_of_file(file)


def to_half_precision(part: str, entry: Mapping[str, Any]) -> dict[str, Any]:
    """A network as models.registry.to_state has it, with matrices and kernels as float16.

    Biases and statistics, which are few, stay as they are. Raises CheckpointError for values that float16 does not hold.
    """
    state = dict(entry["state"])
    for name, tensor in state.items():
        if tensor.dim() < 2 or not tensor.is_floating_point():
            continue
        state[name] = tensor.half()
        if not torch.isfinite(state[name]).all():
            raise CheckpointError(
                f"{part}.{name} has values that half precision does not hold; publish it without --half"
            )
    return {**entry, "state": state}


def read_published(folder: str | Path, with_discriminators: bool = False) -> dict[str, Any]:
    """The folder as a checkpoint: networks, vocabulary, config, step, epoch, and examples, its example captions.

    with_discriminators: also those that a training goes on with, where the folder has them.

    Raises CheckpointError where a file is missing, damaged, or of a newer format.
    """
    # A device in the place of the weights would be read without end.
    if not is_published(folder):
        raise CheckpointError(
            f"{folder}: a folder without {CONFIG} and {WEIGHTS}; name the .pth in it, or a folder that "
            f"`python -m sampling.publish` wrote"
        )

    # What draws, and its words.
    folder = Path(folder)
    config = _read_config(folder / CONFIG)
    networks = _read_weights(folder / WEIGHTS, {part: config[part] for part in PARTS}, config.get("sha256"))

    # A model without its words: no vocabulary made anew would number them alike.
    if not (folder / VOCABULARY).exists():
        raise CheckpointError(f"{folder / VOCABULARY}: missing; copy all files of the published model, this one too")
    try:
        words = read_words(folder / VOCABULARY)
    except DataError as error:
        raise CheckpointError(f"{error} (it belongs to the published model)") from None

    # What trains; a copy of the folder may be without it.
    if with_discriminators and config.get("discriminators") and (folder / TRAINING_WEIGHTS).is_file():
        file, checksum = folder / TRAINING_WEIGHTS, config.get("discriminators_sha256")
        networks |= _read_weights(file, config["discriminators"], checksum)

    # An averaged generator goes by its name in a training's checkpoint.
    if config.get("averaged"):
        networks["generator_ema"] = networks.pop("generator")
    trained_with, examples = config.get("trained_with"), config.get("examples")
    known = {"trained_with": entries_of(trained_with)} if isinstance(trained_with, list) else {}
    return {
        **known,
        "networks": networks,
        "vocabulary": words,
        "config": config.get("settings") or {},
        "step": config.get("step"),
        "epoch": config.get("epoch"),
        "half": config.get("half") is True,
        "examples": [text for text in examples if isinstance(text, str)] if isinstance(examples, list) else [],
    }


def _read_weights(file: Path, described: Mapping[str, Mapping], checksum: str | None) -> dict[str, dict[str, Any]]:
    """Networks as models.registry.to_state has them, from one file in which each has its own prefix.

    described: name and arguments by part.
    checksum: of the file; None: folders of former versions have none.

    Raises CheckpointError where the file cannot be read, DamagedError where it is another than the one that was written.
    """
    try:
        if checksum not in (None, hash_of_file(file)):
            raise DamagedError(f"{file}: cannot be read, its checksum differs from {CONFIG}'s; publish it again")
        tensors = safetensors.torch.load_file(file)
    except (safetensors.SafetensorError, OSError) as error:
        raise CheckpointError(f"{file}: cannot be read ({error}); publish it again") from None

    def state_of(part: str) -> dict[str, Any]:
        return {name.removeprefix(f"{part}."): value for name, value in tensors.items() if name.startswith(f"{part}.")}

    return {part: {**entry, "state": state_of(part)} for part, entry in described.items()}


def _read_config(path: Path) -> dict[str, Any]:
    """The fields of config.json that loading needs."""
    try:
        config = read_json(path)
    except PermissionError:  # nothing is wrong with the file
        raise
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON ({error}); publish the model again") from None
    if not isinstance(config, dict) or not isinstance(config.get("format"), int):
        raise CheckpointError(f"{path}: describes no published model of this project (`format` is missing)")
    if config["format"] > FORMAT:
        raise CheckpointError(
            f"{path}: has format {config['format']}, this version reads up to {FORMAT}; update the project"
        )

    # The networks, as `from_state` reads them.
    discriminators = config.get("discriminators") or {}
    if not isinstance(discriminators, dict) or not discriminators.keys().isdisjoint(PARTS):
        raise CheckpointError(f"{path}: does not describe the discriminators; publish the model again")
    for part, entry in [*((part, config.get(part)) for part in PARTS), *discriminators.items()]:
        entry = entry if isinstance(entry, dict) else {}
        if not isinstance(entry.get("name"), str) or not isinstance(entry.get("arguments"), dict):
            raise CheckpointError(f"{path}: does not describe the {part}; publish the model again")
    return config
