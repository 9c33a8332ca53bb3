"""The formats of released weight files: tensors that tell them apart, our names for theirs, sizes from shapes.

released.py recognises and loads the files.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from miscc.errors import CheckpointError
from models.layers import num_upsamples

State = Mapping[str, Tensor]


class Format(NamedTuple):
    """One kind of released file.

    title: for error messages.
    part: generator, discriminator, text_encoder or image_encoder.
    network: its name in our registry.
    signature: tensor names that, together, tell it from the formats after it in FORMATS.
    renames: (regular expression, replacement) from the authors' names to ours, applied in this order.
    arguments: function from the tensors to our network's constructor arguments.
    ignored: regular expression of the names that our network does not have.
    """

    title: str
    part: str
    network: str
    signature: tuple[str, ...]
    renames: tuple[tuple[str, str | Callable[[re.Match], str]], ...]
    arguments: Callable[[State], dict[str, Any]]
    ignored: str = r"$^"


def _count(state: State, pattern: str) -> int:
    """Number of different values of the pattern's group among the names, e.g. of blocks with `block(\\d+)\\.`."""
    return len({match.group(1) for name in state if (match := re.match(pattern, name))})


def _ssa_generator_arguments(state: State) -> dict[str, Any]:
    return {
        "nf": state["conv_img.2.weight"].shape[1],
        "z_dim": state["fc.weight"].shape[1],
        # The first block works at 4×4, each further one at twice the size.
        "image_size": 4 * 2 ** (_count(state, r"block(\d+)\.") - 1),
        "sentence_dim": state["block0.affine0.fc_gamma.linear1.weight"].shape[1],
    }


def _one_way_discriminator_arguments(state: State) -> dict[str, Any]:
    num_blocks = _count(state, r"block(\d+)\.")
    nf = state["conv_img.weight"].shape[0]
    channels = [state[f"block{index}.conv_r.0.weight"].shape[0] for index in range(num_blocks)]

    # The head's first convolution takes features and sentence together.
    return {
        "nf": nf,
        "image_size": 4 * 2**num_blocks,
        "sentence_dim": state["COND_DNET.joint_conv.0.weight"].shape[1] - channels[-1],
        "multipliers": [count // nf for count in channels],
    }


def _df_generator_arguments(state: State) -> dict[str, Any]:
    z_dim = state["fc.weight"].shape[1]

    # The affine layers take noise and sentence together; every block upsamples, the first one included.
    return {
        "nf": state["to_rgb.1.weight"].shape[1],
        "z_dim": z_dim,
        "image_size": 4 * 2 ** _count(state, r"GBlocks\.(\d+)\."),
        "sentence_dim": state["GBlocks.0.fuse1.affine0.fc_gamma.linear1.weight"].shape[1] - z_dim,
    }


def _sema_generator_arguments(state: State) -> dict[str, Any]:
    z_dim = state["fc.weight"].shape[1]
    hidden, condition_dim = state["block0.fuse1.affine0.fc_gamma.linear1.weight"].shape  # z_dim + sentence_dim

    # The first block works at 4×4, each further one at twice the size.
    return {
        "nf": state["conv_img.1.weight"].shape[1],
        "z_dim": z_dim,
        "image_size": 4 * 2 ** (_count(state, r"block(\d+)\.") - 1),
        "sentence_dim": condition_dim - z_dim,
        "hidden": hidden,
    }


def _df_discriminator_arguments(state: State) -> dict[str, Any]:
    if "joint_conv.0.weight" not in state:
        raise CheckpointError(
            "DF-GAN discriminator: its condition head is not here; the authors keep it as netC beside netD: give a "
            "state_epoch_*.pth, which holds both, or a file of {'netD': ..., 'netC': ...}"
        )

    # As for the one-way discriminator, under other names.
    nf = state["conv_img.weight"].shape[0]
    num_blocks = _count(state, r"DBlocks\.(\d+)\.")
    channels = [state[f"DBlocks.{index}.conv_r.0.weight"].shape[0] for index in range(num_blocks)]

    return {
        "nf": nf,
        "image_size": 4 * 2**num_blocks,
        "sentence_dim": state["joint_conv.0.weight"].shape[1] - channels[-1],
        "multipliers": [count // nf for count in channels],
    }


def _galip_generator_arguments(state: State) -> dict[str, Any]:
    z_dim = state["fc_code.weight"].shape[1]
    width, _, _, patch_size = state["mapping.CLIP_ViT.conv1.weight"].shape
    prompts_dim, condition_dim = state["mapping.fc_prompt.weight"].shape  # num_prompts · width, z_dim + sentence_dim

    # The ViT has a position for each patch of the image, and one for the class token.
    return {
        "nf": state["to_rgb.1.weight"].shape[1],
        "z_dim": z_dim,
        "image_size": patch_size * round((len(state["mapping.CLIP_ViT.positional_embedding"]) - 1) ** 0.5),
        "sentence_dim": condition_dim - z_dim,
        "width": width,
        "num_blocks": _count(state, r"mapping\.CLIP_ViT\.transformer\.resblocks\.(\d+)\."),
        "num_prompts": prompts_dim // width,
    }


def _galip_discriminator_arguments(state: State) -> dict[str, Any]:
    if "joint_conv.0.weight" not in state:
        raise CheckpointError(
            "GALIP discriminator: its condition head is not here; the authors keep it as netC beside netD: give the file "
            "that holds both, or one of {'netD': ..., 'netC': ...}"
        )
    channels, width = state["main.conv_r.0.weight"].shape[:2]

    # A block for each map of ViT features but the last.
    return {
        "width": width,
        "num_maps": 1 + _count(state, r"DBlocks\.(\d+)\."),
        "channels": channels,
        "sentence_dim": state["joint_conv.0.weight"].shape[1] - channels,
        "head_channels": state["joint_conv.0.weight"].shape[0],
    }


def _attn_generator_arguments(state: State) -> dict[str, Any]:
    """Arguments of AttnGAN's and AttnDCGAN's generators; image sizes follow from the first stage's up blocks and the stages."""
    # The gated linear unit takes twice (mu, logvar). AttnDCGAN has one image layer, AttnGAN one for each stage.
    condition_dim, sentence_dim = state["ca_net.fc.weight"].shape[0] // 4, state["ca_net.fc.weight"].shape[1]
    to_rgb = next(name for name in ("img_net1.img.0.weight", "img_net.img.0.weight") if name in state)
    num_stages = _count(state, r"h_net(\d+)\.")

    sizes = {
        "gf_dim": state[to_rgb].shape[1],
        "z_dim": state["h_net1.fc.0.weight"].shape[1] - condition_dim,
        "condition_dim": condition_dim,
        "sentence_dim": sentence_dim,
        "base_size": 4 * 2 ** _count(state, r"h_net1\.upsample(\d+)\."),
        "num_stages": num_stages,
    }

    # Residual blocks: in the stages after the first.
    return sizes | ({"r_num": _count(state, r"h_net2\.residual\.(\d+)\.")} if num_stages > 1 else {})


def _attn_discriminator_arguments(state: State) -> dict[str, Any]:
    convolutions = [name for name, tensor in state.items() if name.startswith("img_code_s16.") and tensor.ndim == 4]
    width = state["COND_DNET.outlogits.0.weight"].shape[1]
    further = _count(state, r"img_code_s(\d+)\.") - 1  # s32, s64 beside the s16

    # Each convolution of the s16 and each further one downsamples by 2, down to 4×4.
    return {
        "df_dim": width // 8,
        "image_size": 4 * 2 ** (len(convolutions) + further),
        "sentence_dim": state["COND_DNET.jointConv.0.weight"].shape[1] - width,
        "has_unconditional_head": "UNCOND_DNET.outlogits.0.weight" in state,
    }


def _text_encoder_arguments(state: State) -> dict[str, Any]:
    vocabulary_size, embedding_dim = state["encoder.weight"].shape

    # weight_hh stacks the matrices of all gates: 4 in an LSTM, 3 in a GRU.
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

ATTN_RENAMES = (
    (r"^ca_net\.fc\.", "augmentation.linear."),
    (r"^h_net1\.fc\.", "first.fc."),
    (r"^h_net1\.upsample(\d+)\.", lambda found: f"first.blocks.{int(found[1]) - 1}."),
    (r"^h_net(\d+)\.", lambda found: f"refinements.{int(found[1]) - 2}."),
    (r"\.att\.conv_context\.", ".attention.project."),
    (r"\.block\.", ".layers."),
    (r"\.upsample\.", ".up."),
    (r"^img_net\.img\.", "to_rgb.0."),
    (r"^img_net(\d+)\.img\.", lambda found: f"to_rgb.{int(found[1]) - 1}."),
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
    Format(  # before DF-GAN's, whose names it has, too
        "GALIP generator", "generator", "galip",
        ("fc_code.weight", "mapping.fc_prompt.weight", "mapping.CLIP_ViT.conv1.weight", "to_rgb.1.weight"),
        (
            (r"^fc_code\.", "fc."),
            (r"^mapping\.FBlocks\.", "mapping_blocks."),
            (r"^mapping\.conv_fuse\.", "bridge."),
            (r"^mapping\.fc_prompt\.", "prompt."),
            (r"^mapping\.CLIP_ViT\.", "vit."),
            (r"^mapping\.conv\.", "adapter."),
            (r"^GBlocks\.", "blocks."),
            *FUSION_RENAMES,
        ),
        _galip_generator_arguments,
        ignored=r"mapping\.CLIP_ViT\.(conv1|ln_post|proj)",
    ),
    Format(
        "GALIP discriminator", "discriminator", "galip",
        ("DBlocks.0.conv_r.0.weight", "DBlocks.0.beta", "main.conv_r.0.weight"),
        (
            (r"^joint_conv\.", "head."),
            (r"^DBlocks\.", "blocks."),
            (r"^main\.", "last."),
            (r"\.gamma$", ".gate"),
            (r"\.beta$", ".extra_gate"),
            (r"\.conv_r\.", ".residual."),
            (r"\.conv_s\.", ".shortcut."),
        ),
        _galip_discriminator_arguments,
        ignored=r"DBlocks\.\d+\.conv_s\.",  # unused
    ),
    Format(
        "DF-GAN generator", "generator", "df_gan",
        ("GBlocks.0.fuse1.affine0.fc_gamma.linear1.weight", "to_rgb.1.weight"),
        ((r"^GBlocks\.", "blocks."), *FUSION_RENAMES),
        _df_generator_arguments,
    ),
    Format(
        "SEMA generator", "generator", "sema",
        ("block0.fuse1.affine0.fc_gamma.linear1.weight", "conv_img.1.weight"),
        ((r"^conv_img\.", "to_rgb."), (r"^block(\d+)\.", r"blocks.\1."), *FUSION_RENAMES),
        _sema_generator_arguments,
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
        "AttnGAN generator", "generator", "attn_gan",
        ("ca_net.fc.weight", "h_net1.fc.0.weight", "img_net1.img.0.weight"),
        ATTN_RENAMES,
        _attn_generator_arguments,
    ),
    Format(
        "AttnDCGAN generator", "generator", "attn_dcgan",
        ("ca_net.fc.weight", "h_net1.fc.0.weight", "img_net.img.0.weight"),
        ATTN_RENAMES,
        _attn_generator_arguments,
    ),
    Format(
        "AttnGAN discriminator", "discriminator", "attn_stage",
        ("img_code_s16.0.weight", "COND_DNET.jointConv.0.weight"),
        (
            (r"^img_code_s16\.", "encoder."),
            (r"^img_code_s(\d+)\.", lambda found: f"down.{num_upsamples(int(found[1])) - 3}."),
            (r"^img_code_s\d+_(\d+)\.", lambda found: f"back.{int(found[1]) - 1}."),
            (r"^UNCOND_DNET\.outlogits\.0\.", "unconditional_head."),
            (r"^COND_DNET\.jointConv\.", "joint."),
            (r"^COND_DNET\.outlogits\.0\.", "conditional_head."),
        ),
        _attn_discriminator_arguments,
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
