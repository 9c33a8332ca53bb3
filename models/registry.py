"""Networks as plain data and back: name, constructor arguments, tensors. Names are those of models/__init__.py."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from miscc.errors import CheckpointError
from miscc.settings import check_arguments
from models import networks_of, parts
from models.types import Network


def to_state(name: str, module: Network) -> dict[str, Any]:
    """A network as plain data: its registry name, constructor arguments and tensors."""
    return {"name": name, "arguments": dict(module.arguments), "state": module.state_dict()}


def from_state(entry: Mapping[str, Any], registry: Mapping[str, type[Network]]) -> Network:
    """The network of a `to_state`, with its weights.

    Raises CheckpointError for a network that this version does not know, and for tensors that do not fit its arguments.
    """
    if entry["name"] not in registry:
        raise CheckpointError(
            f"the checkpoint holds a network {entry['name']!r}, which this version does not know (it knows: "
            f"{', '.join(registry)}); update the project"
        )

    # Arguments and sizes first: those of a damaged file could ask for all memory.
    try:
        check_arguments(registry[entry["name"]].Settings, entry["arguments"])
        _check_sizes(registry[entry["name"]], entry)
        module = skip_init(registry[entry["name"]], entry["arguments"])
        module.load_state_dict(entry["state"])
    except (TypeError, ValueError, RuntimeError, AttributeError, ArithmeticError, AssertionError, LookupError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"the network {entry['name']!r} does not fit this version of the project ({reason}); use another checkpoint, or "
            f"the version that wrote it"
        ) from None
    return module


def with_weight_file(entry: Mapping[str, Any], file: str, backbone: str | None = None) -> Mapping[str, Any]:
    """The `to_state` of a network on a frozen backbone, which reads its weights from `file` now; "": from where it did.

    backbone: whose file that is; a network on another one stays as it is. None: of the network's.

    Other networks stay as they are. Whether these are the weights that it was trained on, the network checks by their hash.
    """
    arguments = entry["arguments"]
    if not file or not isinstance(arguments, Mapping) or "weights_hash" not in arguments:
        return entry
    if backbone not in (None, arguments.get("backbone")):
        return entry
    return {**entry, "arguments": {**arguments, "weights": file}}


def _check_sizes(kind: type[Network], entry: Mapping[str, Any]) -> None:
    """Raise ValueError where the arguments mean other sizes than the tensors have: that network could be larger than memory."""
    # Built without values, for its sizes alone.
    try:
        with torch.device("meta"):
            expected = kind(**entry["arguments"]).state_dict()
    except (RuntimeError, NotImplementedError):  # a part that cannot be built without values
        return

    # Missing tensors are reported by load_state_dict.
    for name, tensor in expected.items():
        actual = entry["state"].get(name)
        if actual is not None and actual.shape != tensor.shape:
            raise ValueError(f"{name} is {tuple(actual.shape)}, its arguments mean {tuple(tensor.shape)}")


def skip_init(kind: type[Network], arguments: Mapping[str, Any]) -> Network:
    """A network on the CPU whose tensors a state dict will fill.

    Classes with `slow_start` are built without values.
    """
    if not kind.slow_start:
        return kind(**arguments)
    with torch.device("meta"):
        module = kind(**arguments)
    return module.to_empty(device="cpu")


def count_parameters(module: nn.Module) -> int:
    """Number of learnable values, frozen ones included."""
    return sum(parameter.numel() for parameter in module.parameters())


def network_name(module: nn.Module) -> str:
    """The name under which our registries know a network's class."""
    return next(name for part in parts() for name, kind in networks_of(part).items() if kind is type(module))
