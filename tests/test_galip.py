"""GALIP: sizes, its frozen ViT, who moves in a step, its released files, the plain form. Golden numbers: test_golden_galip.py."""

import copy
import re

import pytest
import torch
from test_bench_reference import history
from tiny_clip import clip_batch, tiny_clip, tiny_galip
from tiny_systems import changed_by_a_step, text_features

from bench.reference_galip import PlainGALIP, plain_galip
from miscc.errors import CheckpointError
from models.clip_features import untrained_clip
from models.galip import GALIP, GALIPGenerator, PromptedViT, block_sizes
from models.released import holds, load_discriminator, load_generator
from training.ema import EMA


@pytest.fixture(scope="module")
def clip():
    return tiny_clip()


@pytest.fixture
def networks(clip):
    return tiny_galip(clip)


def test_sizes_of_the_blocks():
    assert block_sizes(224) == [8, 16, 32, 64, 128, 224]
    assert block_sizes(64) == [8, 16, 32, 64] and block_sizes(56) == [8, 16, 32, 56] and block_sizes(9) == [8, 9]
    with pytest.raises(ValueError, match="larger than 8"):
        block_sizes(8)


def test_images_are_of_clips_size_and_not_bounded(networks):
    images = networks["generator"](20 * torch.randn(2, 5), text_features(2, 16)).images
    assert len(images) == 1 and images[0].shape == (2, 3, 56, 56) and images[0].abs().max() > 1


def test_every_prompt_reaches_its_own_block_and_none_the_output(networks, clip):
    generator = networks["generator"]
    generator.vit.fill(clip.visual)
    bridge, prompts = torch.randn(1, 64, 7, 7), torch.randn(1, 8, 64)
    seen = []
    hooks = [
        block.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
        for block in generator.vit.transformer.resblocks
    ]
    assert generator.vit(bridge, prompts).shape == (1, 64, 7, 7)
    for hook in hooks:
        hook.remove()
    assert [x.shape[1] for x in seen] == [50, *[51] * 8, 50]
    for number in range(1, 9):
        assert torch.equal(seen[number][0, -1], prompts[0, number - 1])


def test_the_vit_is_frozen_shared_and_saved(networks, clip):
    generator = networks["generator"]
    assert not generator.vit.is_filled
    generator.vit.fill(clip.visual)
    generator.requires_grad_(True)  # as training does
    names = {name for name, _ in generator.named_parameters()}
    assert not any(name.startswith("vit.") for name in names)
    inside = "vit.transformer.resblocks.3.attn.in_proj_weight"
    assert generator.state_dict()[inside].data_ptr() == clip.visual.state_dict()[inside[4:]].data_ptr()
    average = EMA(generator, 0.9)
    assert average.module.vit is generator.vit and average.module.fc is not generator.fc
    before = generator.vit.class_embedding.clone()
    average.update(generator)
    assert torch.equal(generator.vit.class_embedding, before)


def test_another_clip_is_refused(networks):
    wider = untrained_clip(56, 8, 128, 10, 16, 520)
    with pytest.raises(ValueError, match="made for another CLIP"):
        networks["generator"].vit.fill(wider.visual)
    assert not PromptedViT(64, 2).is_filled


def test_a_step_moves_d_then_g_and_nothing_of_clip(networks):
    system = GALIP(networks)
    system.train()
    assert networks["generator"].vit.is_filled  # with the image encoder's weights
    first, second = changed_by_a_step(system, clip_batch(), torch.randn(4, 5))
    assert first[:2] == ("discriminator", ["hinge", "penalty"]) and second[:2] == (
        "generator",
        ["adversarial", "similarity"],
    )
    assert first[2] == first[3] == {"discriminator"}
    assert second[2] == second[3] == {"generator"}


def test_the_similarity_pulls_towards_the_caption(networks):
    system = GALIP(networks, similarity_weight=4.0)
    system.train()
    *_, generator_update = system.updates(clip_batch(), torch.randn(4, 5))
    similarity = generator_update.stats["similarity"]
    assert -1 <= similarity <= 1
    assert generator_update.losses["similarity"].item() == pytest.approx(-4 * similarity.item())


def test_the_plain_step_is_the_same_step(networks):
    # In float64; CLIP, which others share, is copied first.
    ours = GALIP({name: copy.deepcopy(network).double() for name, network in networks.items()})
    ours.train()
    plain = plain_galip(ours)
    assert isinstance(plain, PlainGALIP) and type(ours) is GALIP
    batch, noise = clip_batch(), torch.randn(4, 5, dtype=torch.float64)
    batch = batch._replace(images=batch.images.double())
    expected, found = history(plain, batch, noise), history(ours, batch, noise)
    for (optimizer, losses, gradients), (same, others, their_gradients) in zip(found, expected, strict=True):
        assert optimizer == same and losses == pytest.approx(others, rel=1e-9)
        assert all(value != 0 for value in losses.values())
        for a, b in zip(gradients, their_gradients, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-10)


# Released files

THEIR_NAMES = (
    (r"^fc\.", "fc_code."), (r"^mapping_blocks\.", "mapping.FBlocks."), (r"^bridge\.", "mapping.conv_fuse."),
    (r"^prompt\.", "mapping.fc_prompt."), (r"^vit\.", "mapping.CLIP_ViT."), (r"^adapter\.", "mapping.conv."),
    (r"\.fusion([12])\.", r".fuse\1."), (r"\.(gamma|beta)\.0\.", r".fc_\1.linear1."),
    (r"\.(gamma|beta)\.2\.", r".fc_\1.linear2."), (r"\.shortcut\.", ".c_sc."),
    (r"^blocks\.(\d+)\.conv", r"GBlocks.\1.c"), (r"^blocks\.", "GBlocks."),
)  # fmt: skip
THEIR_D_NAMES = (
    (r"^head\.", "joint_conv."), (r"^blocks\.", "DBlocks."), (r"^last\.", "main."), (r"\.gate$", ".gamma"),
    (r"\.extra_gate$", ".beta"), (r"\.residual\.", ".conv_r."), (r"\.shortcut\.", ".conv_s."),
)  # fmt: skip


def renamed(state, names):
    found = {}
    for name, value in state.items():
        for pattern, replacement in names:
            name = re.sub(pattern, replacement, name)
        found[name] = value
    return found


def released_content(networks, clip, prefix="module."):
    """A file as the authors save it: prefixes, unused tensors, the ViT's matrices in half precision."""
    networks["generator"].vit.fill(clip.visual)
    net_g = renamed(networks["generator"].state_dict(), THEIR_NAMES)
    net_g["mapping.CLIP_ViT.conv1.weight"] = clip.visual.conv1.weight.data
    halves = re.compile(r"mapping\.CLIP_ViT\.(conv1|.*(attn|mlp)\.)")
    net_g = {name: value.half() if halves.match(name) else value for name, value in net_g.items()}
    whole_d = renamed(networks["discriminator"].state_dict(), THEIR_D_NAMES)
    net_c = {name: value for name, value in whole_d.items() if name.startswith("joint_conv")}
    net_d = {name: value for name, value in whole_d.items() if name not in net_c}
    for number in range(2):
        net_d |= {
            f"DBlocks.{number}.conv_s.weight": torch.zeros(64, 64, 1, 1),
            f"DBlocks.{number}.conv_s.bias": torch.zeros(64),
        }
    parts = {"netG": net_g, "netD": net_d, "netC": net_c}
    return {"model": {part: {prefix + name: value for name, value in state.items()} for part, state in parts.items()}}


@pytest.mark.parametrize("prefix", ["module.", ""])
def test_released_files_are_recognised(networks, clip, prefix):
    content = released_content(networks, clip, prefix) | {"epoch": 7, "optimizers": {"optimizer_G": {}}}
    assert holds(content, "generator") and holds(content, "discriminator") and not holds(content, "text_encoder")
    generator, discriminator = load_generator(content), load_discriminator(content)
    assert type(generator) is GALIPGenerator and generator.arguments == networks["generator"].arguments
    assert discriminator.arguments == networks["discriminator"].arguments
    for name, value in networks["generator"].state_dict().items():
        loaded = generator.state_dict()[name]
        assert loaded.dtype == torch.float32
        torch.testing.assert_close(loaded, value, rtol=1e-3 if name.startswith("vit.") else 0, atol=1e-7)
    for name, value in networks["discriminator"].state_dict().items():
        assert torch.equal(discriminator.state_dict()[name], value)


def test_a_discriminator_without_its_head_is_named(networks, clip):
    content = released_content(networks, clip)
    with pytest.raises(CheckpointError, match="netC beside netD"):
        load_discriminator(content["model"]["netD"])
    del content["model"]["netG"]["module.mapping.fc_prompt.bias"]
    with pytest.raises(CheckpointError, match=r"1 tensors are missing, for example prompt\.bias"):
        load_generator(content)
