"""The authors' weight files: recognise them by their tensors, rename the tensors, load them into our networks.

System, sizes and stages come from names and shapes of the tensors, never from file names. `module.` prefixes and wrapping
dicts are removed.
"""

import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from miscc.checkpoint import check_tensors, load_file
from miscc.errors import CheckpointError
from models import networks_of
from models.registry import skip_init
from models.released_formats import FORMATS, Format, State
from models.types import CaptionEncoder, Discriminator, Generator, ImageEncoder, Network


@contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Prefix the messages of CheckpointErrors raised inside with the file's path."""
    try:
        yield
    except CheckpointError as error:
        message = str(error)
        raise CheckpointError(message if message.startswith(str(path)) else f"{path}: {message}") from None


def load_generator(state_dict: Mapping[str, Any]) -> Generator:
    """A generator of ours, in eval mode, with the released weights. Raises CheckpointError naming what does not fit."""
    return cast(Generator, _load(state_dict, "generator"))


def load_discriminator(state_dict: Mapping[str, Any]) -> Discriminator:
    """A discriminator of ours, in eval mode, with the released weights. Raises CheckpointError."""
    return cast(Discriminator, _load(state_dict, "discriminator"))


def load_discriminator_files(path: str | Path, like: Discriminator) -> Discriminator:
    """The authors' discriminator in a file, as a network like `like`.

    path: the file; where `like` has stages (AttnGAN's), the first of netD0.pth, netD1.pth, ..., beside which the others are.

    Raises CheckpointError where a file is broken or a stage is missing.
    """
    # One file holds one stage, or the whole discriminator.
    path = Path(path)
    with naming(path):
        first = load_discriminator(load_file(path))
    if not like.has_stages:
        return first

    # The files of the other stages, and the network made of all of them.
    stages = [first]
    while (beside := path.with_name(re.sub(r"D0(?=\D)", f"D{len(stages)}", path.name))).is_file() and beside != path:
        with naming(beside):
            stages.append(load_discriminator(load_file(beside)))

    try:
        return like.with_stages(stages)
    except ValueError as error:
        raise CheckpointError(
            f"{path}: {error}; name the first of the authors' files, netD0.pth, and put the others of this training, "
            f"netD1.pth, netD2.pth ..., beside it"
        ) from None


def load_text_encoder(state_dict: Mapping[str, Any]) -> CaptionEncoder:
    """DAMSM's text encoder, in eval mode, with the released weights. Raises CheckpointError."""
    return cast(CaptionEncoder, _load(state_dict, "text_encoder"))


def load_image_encoder(state_dict: Mapping[str, Any]) -> ImageEncoder:
    """DAMSM's image encoder, in eval mode, with the released weights. Raises CheckpointError."""
    return cast(ImageEncoder, _load(state_dict, "image_encoder"))


# Part of a released file -> its loader.
LOADERS: dict[str, Callable[[Mapping[str, Any]], Network]] = {
    "generator": load_generator,
    "discriminator": load_discriminator,
    "text_encoder": load_text_encoder,
    "image_encoder": load_image_encoder,
}


def unwrap(value: Any, part: str) -> dict[str, Tensor]:
    """The tensors of one network, out of wrapping dicts and without `module.` prefixes.

    value: content of a file.
    part: which network to take from a file that holds several, under the names that the authors gave them.

    Raises CheckpointError where there are no such tensors.
    """
    names = {
        "generator": ("netG", "generator", "G", "g_ema"),
        "discriminator": ("netD", "discriminator", "D"),
        "text_encoder": ("text_encoder", "RNN"),
        "image_encoder": ("image_encoder", "CNN"),
    }[part]

    # Each pass removes one wrapping dict.
    for _ in range(4):
        if not isinstance(value, Mapping):
            raise CheckpointError(f"the {part} file holds a {type(value).__name__}, not the tensors of a network")

        # Nothing but tensors: the network itself.
        if value and all(isinstance(tensor, Tensor) for tensor in value.values()):
            check_tensors(value, f"the {part}")
            return {re.sub(r"^(module\.)+", "", name): tensor for name, tensor in value.items()}

        # DF-GAN's authors save D's head apart from its body.
        if part == "discriminator" and "netD" in value and "netC" in value:
            return {**unwrap(value["netD"], part), **unwrap(value["netC"], part)}

        # The part by its own name, before any general one.
        wrapper = next((name for name in (*names, "model", "state_dict", "net", "params") if name in value), None)
        if wrapper is None:
            break
        value = value[wrapper]

    raise CheckpointError(f"the {part} file holds no tensors of a network (it has: {_first(value)})")


def recognise(state: State) -> Format | None:
    """The format of these tensors; None if it is unknown."""
    return next((form for form in FORMATS if all(name in state for name in form.signature)), None)


def holds(value: Any, part: str) -> bool:
    """Whether a released file contains this part, e.g. a discriminator beside the generator."""
    try:
        form = recognise(unwrap(value, part))
    except CheckpointError:
        return False
    return form is not None and form.part == part


def _load(state_dict: Mapping[str, Any], part: str) -> Network:
    """The network of one part, in eval mode. Raises CheckpointError for another part, unknown or missing tensors."""
    # Which kind of file it is.
    state = unwrap(state_dict, part)
    form = recognise(state)
    if form is None or form.part != part:
        article = "an" if form and form.title.startswith("A") else "a"
        what = f"of {article} {form.title}" if form else f"unknown (the first: {_first(state)})"
        raise CheckpointError(f"expected a {part}, but the tensors are {what}; name the {part}'s own file")

    # Its sizes, compared on the meta device, before any memory is taken.
    kind = networks_of(part)[form.network]
    try:
        arguments = form.arguments(state)
        with torch.device("meta"):
            expected = kind(**arguments).state_dict()
    except (LookupError, ValueError, TypeError, ArithmeticError, RuntimeError, StopIteration) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"{form.title}: its sizes cannot be read, tensors are missing or of other shapes ({reason})"
        ) from None
    renamed = {rename(name, form): tensor for name, tensor in state.items() if not re.match(form.ignored, name)}
    _add_counters(renamed, expected)
    _check_fit(form, renamed, expected)

    # The network, filled with the renamed tensors.
    module = skip_init(kind, arguments)
    module.load_state_dict(renamed)
    return module.eval()


def _add_counters(actual: dict[str, Any], expected: State) -> None:
    """Give batch norms their counters of batches, which files of PyTorch before 0.4.1 do not have; nothing reads them."""
    for name, tensor in expected.items():
        if (
            name.endswith(".num_batches_tracked")
            and name.removesuffix("num_batches_tracked") + "running_mean" in actual
        ):
            actual.setdefault(name, torch.zeros(tensor.shape, dtype=tensor.dtype))


def _check_fit(form: Format, actual: State, expected: State) -> None:
    """Raise CheckpointError, naming one tensor, unless names and shapes are equal."""
    missing, surplus = sorted(expected.keys() - actual.keys()), sorted(actual.keys() - expected.keys())
    wrong = [name for name in expected if name in actual and actual[name].shape != expected[name].shape]

    problem = ""
    if missing:
        problem = f"{len(missing)} tensors are missing, for example {missing[0][:80]}"
    elif surplus:
        problem = f"{len(surplus)} tensors are not its own, for example {surplus[0][:80]}"
    elif wrong:
        name = wrong[0]
        shapes = f"{tuple(actual[name].shape)} instead of {tuple(expected[name].shape)}"
        problem = f"{len(wrong)} tensors have other sizes, for example {name}: {shapes}"
    if problem:
        raise CheckpointError(f"{form.title}: {problem}; use the file as its authors released it")


def rename(name: str, form: Format) -> str:
    """The name in our network of a released tensor."""
    for pattern, replacement in form.renames:
        name = re.sub(pattern, replacement, name)
    return name


def _first(value: Mapping) -> str:
    """The first three names, for an error message."""
    return ", ".join(str(name)[:80] for name in list(value)[:3]) or "nothing"


if __name__ == "__main__":
    # The command's former name. It moved because it needs the data's vocabulary, and models/ imports no datasets.
    os.execv(sys.executable, [sys.executable, "-m", "sampling.convert", *sys.argv[1:]])
