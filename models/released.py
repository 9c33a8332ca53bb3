"""The authors' weight files: recognise them by their tensors, rename, load into our networks.

Nothing is taken from file names: system, sizes and stages come from names and shapes of the tensors. `module.` prefixes
and wrapping dicts are seen through.
"""

import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from miscc.checkpoint import load_file
from miscc.errors import CheckpointError
from models import networks_of
from models.registry import skip_init
from models.released_formats import FORMATS, Format, State
from models.types import Discriminator, Network


@contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """What a weight file's tensors are refused for is said with the file's name in front."""
    try:
        yield
    except CheckpointError as error:
        said = str(error)
        raise CheckpointError(said if said.startswith(str(path)) else f"{path}: {said}") from None


def load_generator(state_dict: Mapping[str, Any]) -> nn.Module:
    """A generator of ours, in eval mode, with the released weights. Raises CheckpointError naming what does not fit."""
    return _load(state_dict, "generator")


def load_discriminator(state_dict: Mapping[str, Any]) -> nn.Module:
    """A discriminator of ours, in eval mode, with the released weights. Raises CheckpointError."""
    return _load(state_dict, "discriminator")


def load_discriminator_files(path: str | Path, like: Discriminator) -> nn.Module:
    """The authors' discriminator in a file, as a network like `like`.

    Where that one has stages, AttnGAN's, the path names the first of netD0.pth, netD1.pth, ..., and those beside it are
    read, too. Raises CheckpointError where a file is broken or a stage is missing.
    """
    path = Path(path)
    with naming(path):
        first = load_discriminator(load_file(path))
    if not like.has_stages:
        return first
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


def load_text_encoder(state_dict: Mapping[str, Any]) -> nn.Module:
    """DAMSM's text encoder, in eval mode, with the released weights. Raises CheckpointError."""
    return _load(state_dict, "text_encoder")


def load_image_encoder(state_dict: Mapping[str, Any]) -> nn.Module:
    """DAMSM's image encoder, in eval mode, with the released weights. Raises CheckpointError."""
    return _load(state_dict, "image_encoder")


# How each part of a released file is loaded.
LOADERS: dict[str, Callable[[Mapping[str, Any]], nn.Module]] = {
    "generator": load_generator,
    "discriminator": load_discriminator,
    "text_encoder": load_text_encoder,
    "image_encoder": load_image_encoder,
}


def unwrap(value: Any, part: str) -> dict[str, Tensor]:
    """The tensors of one network, out of wrapping dicts and without `module.` prefixes.

    part says which network to take from a file that holds several, under the names that the originals gave them.
    """
    names = {
        "generator": ("netG", "generator", "G", "g_ema"),
        "discriminator": ("netD", "discriminator", "D"),
        "text_encoder": ("text_encoder", "RNN"),
        "image_encoder": ("image_encoder", "CNN"),
    }[part]
    for _ in range(4):
        if not isinstance(value, Mapping):
            raise CheckpointError(f"the {part} file holds a {type(value).__name__}, not the tensors of a network")
        if value and all(isinstance(tensor, Tensor) for tensor in value.values()):
            return {re.sub(r"^(module\.)+", "", name): tensor for name, tensor in value.items()}
        if part == "discriminator" and "netD" in value and "netC" in value:  # DF-GAN keeps D's head apart
            return {**unwrap(value["netD"], part), **unwrap(value["netC"], part)}
        wrapper = next((name for name in (*names, "model", "state_dict", "net", "params") if name in value), None)
        if wrapper is None:
            break
        value = value[wrapper]
    raise CheckpointError(f"the {part} file holds no tensors of a network (it has: {_first(value)})")


def recognise(state: State) -> Format | None:
    """Which kind of released file these tensors are; None if none that we know."""
    return next((form for form in FORMATS if all(name in state for name in form.signature)), None)


def holds(value: Any, part: str) -> bool:
    """Whether a released file has this part in it, e.g. a discriminator beside the generator."""
    try:
        form = recognise(unwrap(value, part))
    except CheckpointError:
        return False
    return form is not None and form.part == part


def _load(state_dict: Mapping[str, Any], part: str) -> Network:
    state = unwrap(state_dict, part)
    form = recognise(state)
    if form is None or form.part != part:
        article = "an" if form and form.title.startswith("A") else "a"
        what = f"of {article} {form.title}" if form else f"unknown (the first: {_first(state)})"
        raise CheckpointError(f"a {part} is wanted, but the tensors are {what}; give the {part}'s own file")
    try:
        module = skip_init(networks_of(part)[form.network], form.arguments(state))
    except (KeyError, IndexError, ValueError) as error:
        raise CheckpointError(f"{form.title}: its sizes cannot be read, tensors are missing ({error})") from None
    renamed = {rename(name, form): tensor for name, tensor in state.items() if not re.match(form.ignored, name)}
    _check_fit(form, renamed, module.state_dict())
    module.load_state_dict(renamed)
    return module.eval()


def _check_fit(form: Format, given: State, wanted: State) -> None:
    missing, surplus = sorted(wanted.keys() - given.keys()), sorted(given.keys() - wanted.keys())
    wrong = [name for name in wanted if name in given and given[name].shape != wanted[name].shape]
    if missing:
        raise CheckpointError(f"{form.title}: {len(missing)} tensors are missing, for example {missing[0]}")
    if surplus:
        raise CheckpointError(f"{form.title}: {len(surplus)} tensors are not its own, for example {surplus[0]}")
    if wrong:
        name = wrong[0]
        shapes = f"{tuple(given[name].shape)} instead of {tuple(wanted[name].shape)}"
        raise CheckpointError(f"{form.title}: {len(wrong)} tensors have other sizes, for example {name}: {shapes}")


def rename(name: str, form: Format) -> str:
    """A released tensor name as our network has it."""
    for pattern, replacement in form.renames:
        name = re.sub(pattern, replacement, name)
    return name


def _first(value: Mapping) -> str:
    return ", ".join(str(name) for name in list(value)[:3]) or "nothing"


if __name__ == "__main__":
    # The former name of a command that needs the data's vocabulary, which models do not know.
    os.execv(sys.executable, [sys.executable, "-m", "sampling.convert", *sys.argv[1:]])
