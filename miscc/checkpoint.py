"""Weight files: saved whole or not at all, loaded without running their code, checked before anything is built of them."""

import hashlib
import pickle
import struct
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from miscc.errors import CheckpointError, DamagedError
from miscc.files import write_atomically

FORMAT = 1  # of our checkpoints; raised when an older reader would misread a newer file
RESTORE = "restore it from a copy, or use another checkpoint"
LARGEST_ARGUMENT = 4096  # of a network, where no dimension of its tensors is larger


def save_checkpoint(path: str | Path, checkpoint: dict, previous: str | Path | None = None) -> None:
    """Save a dict of tensors and plain containers, whole or not at all.

    previous: see `write_atomically`.
    """
    write_atomically(path, lambda stream: torch.save({"format": FORMAT, **checkpoint}, stream), previous=previous)


# -- loading -------------------------------------------------------------------------------------------------------


def load_file(path: str | Path, device: str | torch.device = "cpu") -> Any:
    """Load a .pth file without running code from it (`weights_only=True`).

    Raises DamagedError when the file is cut off or was changed on the disk; CheckpointError when it is missing, or pickles
    whole modules or other objects.
    """
    path = Path(path)
    check_whole(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on pickle protocols: what cannot be read ends in an error below
            return torch.load(path, map_location=device, weights_only=True)

    # Refused by torch: it would have to run code.
    except pickle.UnpicklingError as error:
        named = next((line for line in str(error).splitlines() if "GLOBAL" in line or "global" in line), "")
        raise CheckpointError(
            f"{path}: holds more than tensors (a whole pickled module or foreign objects) or is damaged, and is not "
            f"loaded, because that could run code from it; save its state_dict() instead. {named.strip()[:160]}"
        ) from None

    # Cut off or damaged, which shows as nearly any error.
    except (RuntimeError, EOFError, OSError, ValueError, LookupError, AssertionError, TypeError, AttributeError,
            MemoryError, OverflowError, RecursionError, struct.error) as error:  # fmt: skip
        reason = (str(error).splitlines() or ["end of file"])[0][:160]
        raise DamagedError(f"{path}: cannot be read as a weight file ({reason}); {RESTORE}") from None


def check_whole(path: Path) -> None:
    """Raises DamagedError where the file's bytes are not those that torch.save wrote; torch's reader checks no checksums."""
    if not path.is_file():
        what = "a folder, not a weight file: name the .pth in it" if path.is_dir() else "no such weight file"
        raise CheckpointError(f"{path}: {what}")
    try:
        with path.open("rb") as stream:
            # What is obviously no weight file: torch's are zip files, and were plain pickles before 1.6.
            start = stream.read(2)
            if start[:1] == b"\x80":
                return
            if start != b"PK":
                raise DamagedError(f"{path}: is no weight file (cut off, or a text?); {RESTORE}")

            # Every part by its checksum. torch compresses none: what is compressed could fill the memory.
            with zipfile.ZipFile(stream) as archive:
                if any(part.file_size > part.compress_size for part in archive.infolist()):
                    raise CheckpointError(f"{path}: is compressed, which no file of torch.save is; unpack and save it")
                damaged = archive.testzip()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}); {RESTORE}") from None
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, ValueError, EOFError, struct.error) as error:
        raise DamagedError(f"{path}: cannot be read as a weight file, it is damaged ({error}); {RESTORE}") from None
    if damaged is not None:
        raise DamagedError(
            f"{path}: cannot be read as a weight file, it is damaged (the checksum of {damaged} differs); {RESTORE}"
        )


def load_checkpoint(path: str | Path, device: str | torch.device = "cpu") -> dict:
    """Load one of our checkpoints. Raises CheckpointError when the file is of another kind or a newer format."""
    checkpoint = load_file(path, device)
    if not isinstance(checkpoint, dict) or "format" not in checkpoint or "networks" not in checkpoint:
        raise CheckpointError(
            f"{path}: is not a checkpoint of this project (`format` and `networks` are missing); of the authors' weights "
            f"`python -m sampling.convert {path} --convert OUT --encoder FILE --data DIR` makes one"
        )
    if not isinstance(checkpoint["format"], int) or checkpoint["format"] > FORMAT:
        raise CheckpointError(
            f"{path}: has format {checkpoint['format']!r:.40}, this version reads up to {FORMAT}; update the project"
        )
    return checkpoint


# -- what a checkpoint must be -------------------------------------------------------------------------------------

# {part of a checkpoint: (its type, the smallest value of a number)}
PARTS: dict[str, tuple[type | tuple[type, ...], float | None]] = {
    "config": (dict, None), "vocabulary": (list, None), "step": (int, 0), "epoch": (int, 0), "data": (dict, None),
    "optimizers": (dict, None), "num_averaged": (int, 0), "seconds": ((int, float), 0), "best": (dict, None),
    "evaluation": (dict, None), "encoders_hash": (str, None), "watch": (dict, None), "system": (dict, None),
}  # fmt: skip
NUMBERS = {"best": ("loss", "epoch"), "evaluation": ("best_step",)}  # in these dicts


def validate(checkpoint: Mapping[str, Any], path: str | Path) -> None:
    """Check what is in a checkpoint before anything is built from it. The caller checks which parts it needs.

    Raises CheckpointError, naming file and part, for a wrong type, an impossible number, and weights that are not finite.
    """
    # Plain parts.
    for part, (kind, smallest) in PARTS.items():
        value = checkpoint.get(part)
        if part in checkpoint and not (part in ("step", "epoch") and value is None):
            fits = isinstance(value, kind) and not isinstance(value, bool)
            if not fits or (smallest is not None and not smallest <= value < float("inf")):
                raise CheckpointError(f"{path}: its {part} is {_brief(value)}; {RESTORE}")
    for one in _leaves(checkpoint.get("config")):
        if not isinstance(one, (int, float, str, type(None))):
            raise CheckpointError(f"{path}: its config holds {_brief(one)} among the settings; {RESTORE}")
    for part, names in NUMBERS.items():
        if part in checkpoint and not all(isinstance(checkpoint[part].get(name), (int, float)) for name in names):
            raise CheckpointError(f"{path}: its {part} holds no {' and '.join(names)}; {RESTORE}")
    if not all(isinstance(word, str) for word in checkpoint.get("vocabulary", [None])):
        raise CheckpointError(f"{path}: has no vocabulary, or other things than words in it; {RESTORE}")

    # Networks: name, arguments, tensors.
    networks = checkpoint["networks"]
    if not isinstance(networks, Mapping) or not all(isinstance(part, str) for part in networks):
        raise CheckpointError(f"{path}: its networks are {_brief(networks)}; {RESTORE}")
    for part, entry in networks.items():
        if not isinstance(entry, Mapping) or not isinstance(entry.get("name"), str):
            raise CheckpointError(f"{path}: its {part} is no network of this project; {RESTORE}")
        check_tensors(entry.get("state"), f"{path}: its {part}")
        _check_arguments(entry.get("arguments"), entry["state"], f"{path}: its {part}")


def check_tensors(state: Any, what: str) -> None:
    """Raises CheckpointError unless this is {name: dense tensor of finite numbers}.

    what: begins the message.
    """
    if not isinstance(state, Mapping) or not all(isinstance(name, str) for name in state):
        raise CheckpointError(f"{what} holds no tensors by name; {RESTORE}")
    for name, tensor in state.items():
        # Its type, and as many numbers in the file as the shape says.
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
            raise CheckpointError(f"{what} holds {_brief(tensor)} under {name[:80]}, not a plain tensor; {RESTORE}")
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise CheckpointError(f"{what} holds fewer numbers of {name[:80]} than {tuple(tensor.shape)}; {RESTORE}")
        # One sum: finite only if all values are.
        if tensor.is_floating_point() and not torch.isfinite(tensor.sum(dtype=torch.float64)):
            raise CheckpointError(
                f"{what} is not finite (NaN or infinite numbers in {name[:80]}): it has diverged; use an earlier checkpoint"
            )


def _check_arguments(arguments: Any, state: Mapping[str, Tensor], what: str) -> None:
    """Raises CheckpointError for a network's arguments with which building it could take all memory or time."""
    if not isinstance(arguments, Mapping) or not all(isinstance(name, str) for name in arguments):
        raise CheckpointError(f"{what} has no arguments by name; {RESTORE}")
    largest = max([LARGEST_ARGUMENT, *(size for tensor in state.values() for size in tensor.shape)])
    for name, value in arguments.items():
        for one in _leaves(value):
            if not isinstance(one, (int, float, str, type(None))) or (isinstance(one, int) and abs(one) > largest):
                raise CheckpointError(f"{what} cannot be built with {name} {_brief(value)}; {RESTORE}")


def _leaves(value: Any) -> Iterator[Any]:
    """The values in nested lists and dicts."""
    if isinstance(value, (list, tuple, dict)):
        for one in value.values() if isinstance(value, dict) else value:
            yield from _leaves(one)
    else:
        yield value


def _brief(value: Any) -> str:
    """A value for an error message: small ones themselves, of others the type."""
    return repr(value)[:40] if isinstance(value, (int, float, str, type(None))) else f"a {type(value).__name__}"


def hash_tensors(state: dict[str, torch.Tensor]) -> str:
    """16 hex digits of the tensors' names, types, shapes and bytes, whatever kind of file they came in."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        array = tensor.detach().cpu().contiguous().numpy()
        digest.update(f"{name}\0{array.dtype}\0{array.shape}\0".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()[:16]
