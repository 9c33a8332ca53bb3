"""The kinds of released weight files: by which tensors they are known, our names for theirs, sizes from shapes.

Recognising and loading is released.py's.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from miscc.errors import CheckpointError

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


def _df_generator_arguments(state: State) -> dict[str, Any]:
    z_dim = state["fc.weight"].shape[1]
    return {
        "nf": state["to_rgb.1.weight"].shape[1],
        "z_dim": z_dim,
        "image_size": 4 * 2 ** _count(state, r"GBlocks\.(\d+)\."),
        "sentence_dim": state["GBlocks.0.fuse1.affine0.fc_gamma.linear1.weight"].shape[1] - z_dim,
    }


def _df_discriminator_arguments(state: State) -> dict[str, Any]:
    if "joint_conv.0.weight" not in state:
        raise CheckpointError(
            "DF-GAN discriminator: its condition head is not here; the authors keep it as netC beside netD: give a "
            "state_epoch_*.pth, which holds both, or a file of {'netD': ..., 'netC': ...}"
        )
    nf = state["conv_img.weight"].shape[0]
    num_blocks = _count(state, r"DBlocks\.(\d+)\.")
    channels = [state[f"DBlocks.{number}.conv_r.0.weight"].shape[0] for number in range(num_blocks)]
    return {
        "nf": nf,
        "image_size": 4 * 2**num_blocks,
        "sentence_dim": state["joint_conv.0.weight"].shape[1] - channels[-1],
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


FUSION_RENAMES = (  # DF-GAN's and SEMA's blocks
    (r"\.c_sc\.", ".shortcut."),
    (r"\.c([12])\.", r".conv\1."),
    (r"\.fuse([12])\.", r".fusion\1."),
    (r"\.fc_(gamma|beta)\.linear1\.", r".\1.0."),
    (r"\.fc_(gamma|beta)\.linear2\.", r".\1.2."),
)

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
        "DF-GAN generator", "generator", "df_gan",
        ("GBlocks.0.fuse1.affine0.fc_gamma.linear1.weight", "to_rgb.1.weight"),
        ((r"^GBlocks\.", "blocks."), *FUSION_RENAMES),
        _df_generator_arguments,
    ),
    Format(
        "DF-GAN discriminator", "discriminator", "df_gan",
        ("conv_img.weight", "DBlocks.0.conv_r.0.weight"),
        (
            (r"^conv_img\.", "from_rgb."),
            (r"^joint_conv\.", "head."),
            (r"^DBlocks\.", "blocks."),
            (r"\.gamma$", ".gate"),
            (r"\.conv_r\.", ".residual."),
            (r"\.conv_s\.", ".shortcut."),
        ),
        _df_discriminator_arguments,
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
