"""Weight files: saved whole or not at all, loaded without running their code."""

import hashlib
import pickle
import struct
import warnings
from pathlib import Path
from typing import Any

import torch

from miscc.errors import CheckpointError
from miscc.files import write_atomically

FORMAT = 1  # of our checkpoints; raised when an older reader would misread a newer file


def save_checkpoint(path: str | Path, checkpoint: dict) -> None:
    """Save a dict of tensors and plain containers, whole or not at all."""
    write_atomically(path, lambda stream: torch.save({"format": FORMAT, **checkpoint}, stream))


def load_file(path: str | Path, device: str | torch.device = "cpu") -> Any:
    """Load a .pth file without running code from it (`weights_only=True`).

    Raises CheckpointError when the file is missing, cut off, or pickles whole modules or other objects.
    """
    # What is obviously no weight file gets a better message than torch's.
    path = Path(path)
    if not path.is_file():
        what = "a folder, not a weight file: name the .pth in it" if path.is_dir() else "no such weight file"
        raise CheckpointError(f"{path}: {what}")
    with path.open("rb") as stream:
        start = stream.read(2)
    if start != b"PK" and start[:1] != b"\x80":  # torch's zip files, and the pickles that it wrote before 1.6
        raise CheckpointError(f"{path}: is no weight file (an incomplete download, or a text?); copy it again")

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
    except (RuntimeError, EOFError, OSError, ValueError, LookupError, AssertionError, TypeError, struct.error) as error:
        reason = (str(error).splitlines() or ["end of file"])[0][:160]
        raise CheckpointError(f"{path}: cannot be read as a weight file ({reason}); copy it again") from None


def load_checkpoint(path: str | Path, device: str | torch.device = "cpu") -> dict:
    """Load one of our checkpoints. Raises CheckpointError when the file is of another kind or a newer format."""
    checkpoint = load_file(path, device)
    if not isinstance(checkpoint, dict) or "format" not in checkpoint or "networks" not in checkpoint:
        raise CheckpointError(
            f"{path}: is not a checkpoint of this project (`format` and `networks` are missing); of the authors' weights "
            f"`python -m models.released {path} --convert OUT --encoder FILE --data DIR` makes one"
        )
    if checkpoint["format"] > FORMAT:
        raise CheckpointError(
            f"{path}: has format {checkpoint['format']}, this version reads up to {FORMAT}; update the project"
        )
    return checkpoint


def hash_tensors(state: dict[str, torch.Tensor]) -> str:
    """16 hex digits of the tensors' names, types, shapes and bytes, whatever kind of file they came in."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        array = tensor.detach().cpu().contiguous().numpy()
        digest.update(f"{name}\0{array.dtype}\0{array.shape}\0".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()[:16]
