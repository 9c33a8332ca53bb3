"""The authors' weight files: recognise them by their tensors, rename, load into our networks.

Nothing is taken from file names: system, sizes and stages come from names and shapes of the tensors. `module.` prefixes
and wrapping dicts are seen through.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from miscc.errors import CheckpointError
from models import DISCRIMINATORS, GENERATORS, IMAGE_ENCODERS, TEXT_ENCODERS

State = Mapping[str, Tensor]


class Format(NamedTuple):
    """One kind of released file.

    part: generator, discriminator, text_encoder or image_encoder; network: its name in our registry; signature: tensor
    names that tell it from all others; renames: (regular expression, replacement) from their names to ours; arguments:
    sizes from shapes; ignored: names that our network has no use for.
    """

    title: str
    part: str
    network: str
    signature: tuple[str, ...]
    renames: tuple[tuple[str, str], ...]
    arguments: Callable[[State], dict[str, Any]]
    ignored: str = r"$^"


def load_generator(state_dict: Mapping[str, Any]) -> nn.Module:
    """A generator of ours, in eval mode, with the released weights. Raises CheckpointError naming what does not fit."""
    return _load(state_dict, "generator", GENERATORS)


def load_discriminator(state_dict: Mapping[str, Any]) -> nn.Module:
    """A discriminator of ours, in eval mode, with the released weights. Raises CheckpointError."""
    return _load(state_dict, "discriminator", DISCRIMINATORS)


def load_text_encoder(state_dict: Mapping[str, Any]) -> nn.Module:
    """DAMSM's text encoder, in eval mode, with the released weights. Raises CheckpointError."""
    return _load(state_dict, "text_encoder", TEXT_ENCODERS)


def load_image_encoder(state_dict: Mapping[str, Any]) -> nn.Module:
    """DAMSM's image encoder, in eval mode, with the released weights. Raises CheckpointError."""
    return _load(state_dict, "image_encoder", IMAGE_ENCODERS)


def network_name(module: nn.Module) -> str:
    """The name under which our registries know a network's class."""
    registries = (GENERATORS, DISCRIMINATORS, TEXT_ENCODERS, IMAGE_ENCODERS)
    return next(name for registry in registries for name, kind in registry.items() if kind is type(module))


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
        wrapper = next((name for name in (*names, "model", "state_dict", "net", "params") if name in value), None)
        if wrapper is None:
            break
        value = value[wrapper]
    raise CheckpointError(f"the {part} file holds no tensors of a network (it has: {_first(value)})")


def recognise(state: State) -> Format | None:
    """Which kind of released file these tensors are; None if none that we know."""
    return next((form for form in FORMATS if all(name in state for name in form.signature)), None)


def _load(state_dict: Mapping[str, Any], part: str, registry: Mapping[str, type[nn.Module]]) -> nn.Module:
    state = unwrap(state_dict, part)
    form = recognise(state)
    if form is None or form.part != part:
        what = f"of a {form.title}" if form else f"unknown (the first: {_first(state)})"
        raise CheckpointError(f"a {part} is wanted, but the tensors are {what}; give the {part}'s own file")
    try:
        module = registry[form.network](**form.arguments(state))
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


def _count(state: State, pattern: str) -> int:
    """How many different numbers the names have at the pattern's group, e.g. blocks of `block(\\d+)\\.`."""
    return len({match.group(1) for name in state if (match := re.match(pattern, name))})


def _ssa_generator_arguments(state: State) -> dict[str, Any]:
    return {
        "nf": state["conv_img.2.weight"].shape[1],
        "z_dim": state["fc.weight"].shape[1],
        "image_size": 4 * 2 ** (_count(state, r"block(\d+)\.") - 1),
        "sentence_dim": state["block0.affine0.fc_gamma.linear1.weight"].shape[1],
    }


def _one_way_discriminator_arguments(state: State) -> dict[str, Any]:
    num_blocks = _count(state, r"block(\d+)\.")
    nf = state["conv_img.weight"].shape[0]
    channels = [state[f"block{number}.conv_r.0.weight"].shape[0] for number in range(num_blocks)]
    return {
        "nf": nf,
        "image_size": 4 * 2**num_blocks,
        "sentence_dim": state["COND_DNET.joint_conv.0.weight"].shape[1] - channels[-1],
        "multipliers": [count // nf for count in channels],
    }


def _text_encoder_arguments(state: State) -> dict[str, Any]:
    vocabulary_size, embedding_dim = state["encoder.weight"].shape
    hidden = state["rnn.weight_hh_l0"].shape[1]
    gates = state["rnn.weight_hh_l0"].shape[0] // hidden
    return {
        "vocabulary_size": vocabulary_size,
        "text_dim": 2 * hidden,
        "rnn_type": "LSTM" if gates == 4 else "GRU",
        "embedding_dim": embedding_dim,
    }


def _image_encoder_arguments(state: State) -> dict[str, Any]:
    return {"text_dim": state["emb_features.weight"].shape[0]}


FORMATS = (
    Format(
        "SSA-GAN generator", "generator", "ssa_gan",
        ("conv_mask.0.weight", "block0.affine0.fc_gamma.linear1.weight", "conv_img.2.weight"),
        (
            (r"^conv_mask\.", "first_mask_predictor."),
            (r"^conv_img\.", "to_rgb."),
            (r"^block(\d+)\.", r"blocks.\1."),
            (r"\.gamma$", ".gate"),
            (r"\.c_sc\.", ".shortcut."),
            (r"\.c([12])\.", r".conv\1."),
            (r"\.conv_mask\.", ".mask_predictor."),
            (r"\.affine0\.", ".sscbn1."),
            (r"\.affine2\.", ".sscbn2."),
            (r"\.batch_norm2d\.", ".norm."),
            (r"\.fc_(gamma|beta)\.linear1\.", r".\1.0."),
            (r"\.fc_(gamma|beta)\.linear2\.", r".\1.2."),
        ),
        _ssa_generator_arguments,
    ),
    Format(
        "SSA-GAN discriminator", "discriminator", "ssa_gan",
        ("conv_img.weight", "block0.conv_r.0.weight", "COND_DNET.joint_conv.0.weight"),
        (
            (r"^conv_img\.", "from_rgb."),
            (r"^COND_DNET\.joint_conv\.", "head."),
            (r"^block(\d+)\.", r"blocks.\1."),
            (r"\.gamma$", ".gate"),
            (r"\.conv_r\.", ".residual."),
            (r"\.conv_s\.", ".shortcut."),
        ),
        _one_way_discriminator_arguments,
    ),
    Format(
        "DAMSM text encoder", "text_encoder", "rnn",
        ("encoder.weight", "rnn.weight_ih_l0", "rnn.weight_hh_l0_reverse"),
        ((r"^encoder\.", "embedding."),),
        _text_encoder_arguments,
    ),
    Format(
        "DAMSM image encoder", "image_encoder", "inception",
        ("emb_features.weight", "emb_cnn_code.weight"),
        (
            (r"^(Conv2d|Mixed)_", r"trunk.\1_"),
            (r"^emb_features\.", "region_head."),
            (r"^emb_cnn_code\.", "code_head."),
        ),
        _image_encoder_arguments,
        ignored=r"(AuxLogits|fc)\.",
    ),
)  # fmt: skip
