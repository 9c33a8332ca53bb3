"""The plain step of bench/reference.py and ours: the same losses and gradients, update by update, in float64."""

import pytest
import torch

from bench.reference import PlainSSAGAN, plain_copy, plain_system
from miscc.batch import Batch
from miscc.distributed import World
from miscc.errors import ConfigError
from models.damsm import InceptionEncoder, SmallImageEncoder, TextEncoder
from models.layers import OneWayDiscriminator
from models.ssa_gan import SSAGAN, SSAGenerator
from training.step import Stepper, parameters_of


def make_system(sscbn="code", **settings):
    torch.manual_seed(0)
    networks = {
        "generator": SSAGenerator(nf=2, z_dim=8, image_size=16, sscbn=sscbn),
        "discriminator": OneWayDiscriminator(nf=2, image_size=16),
        "text_encoder": TextEncoder(20),
        "image_encoder": SmallImageEncoder(image_size=16, nf=4),
    }
    for name in ("generator", "discriminator"):  # gates and heads start at zero, which would hide most of a step
        for parameter in networks[name].parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    system = SSAGAN({name: network.double() for name, network in networks.items()}, **settings)
    system.train()
    return system


def make_batch():
    torch.manual_seed(1)
    images = torch.randn(4, 3, 16, 16, dtype=torch.float64).clamp(-1, 1)
    captions, lengths = torch.randint(1, 20, (4, 6)), torch.tensor([6, 4, 5, 3])
    return Batch(images, captions, lengths, torch.tensor([0, 1, 0, 2]), list("abcd"), torch.arange(4), torch.arange(4))


class ClippedDescent(torch.optim.Optimizer):
    """Each gradient is clipped to [-1, 1]: random gates make large ones."""

    def __init__(self, parameters):
        super().__init__(parameters, {})

    @torch.no_grad()
    def step(self):
        for parameter in parameters_of(self):
            parameter -= 0.01 * parameter.grad.clamp(-1, 1)


def history(system, batch, noise):
    """Losses and gradients of every update, with a step of clipped descent after each."""
    optimizers = {name: ClippedDescent(spec.parameters) for name, spec in system.optimizers().items()}
    found = []
    for update in Stepper(system.updates, optimizers, World(0, 1, torch.device("cpu"))).steps(batch, noise):
        losses = {name: loss.item() for name, loss in update.losses.items()}
        gradients = [parameter.grad.clone() for parameter in parameters_of(optimizers[update.optimizer])]
        found.append((update.optimizer, losses, gradients))
    return found


@pytest.mark.parametrize("sscbn", ["code", "paper"])
def test_the_plain_step_is_the_same_step(sscbn):
    ours = make_system(sscbn)
    plain = plain_system(ours)
    assert isinstance(plain, PlainSSAGAN) and type(ours) is SSAGAN
    batch, noise = make_batch(), torch.randn(4, 8, dtype=torch.float64)
    expected, found = history(plain, batch, noise), history(ours, batch, noise)
    assert [list(losses) for _, losses, _ in found] == [["hinge"], ["penalty"], ["adversarial", "words", "sentence"]]
    for (optimizer, losses, gradients), (same, others, their_gradients) in zip(found, expected, strict=True):
        assert optimizer == same and losses == pytest.approx(others, rel=1e-9)
        assert all(value != 0 for value in losses.values())
        for a, b in zip(gradients, their_gradients, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-11)
    buffers = [dict(system.networks["generator"].named_buffers()) for system in (ours, plain)]
    for name, buffer in buffers[0].items():  # batch norm's statistics, counted as those of doubled features
        torch.testing.assert_close(buffer, buffers[1][name], rtol=1e-9, atol=1e-11)


def test_a_plain_copy_shares_nothing_with_the_original():
    ours = OneWayDiscriminator(nf=2, image_size=8)
    plain = plain_copy(ours)
    assert plain.state_dict().keys() == ours.state_dict().keys()
    plain.from_rgb.weight.data.zero_()
    assert ours.from_rgb.weight.abs().max() > 0
    assert {type(part).__name__ for part in plain.modules()} >= {"PlainDiscriminator", "PlainDownBlock"}


def test_there_is_no_plain_form_of_spectral_normalisation():
    with pytest.raises(ConfigError, match="USE_SN"):
        plain_copy(OneWayDiscriminator(nf=2, image_size=8, spectral_normalisation=True))


@pytest.mark.parametrize("changed", [{"diversity_weight": 0.1}, {"augment": "cutout"}, {"mask_classes": False}])
def test_a_loss_without_a_plain_form_is_not_compared(changed):
    with pytest.raises(ConfigError, match="(TRAIN.DIVERSITY|TRAIN.AUGMENT|DAMSM.MASK_CLASSES): has no plain form"):
        plain_system(make_system(**changed))


def test_plain_inception_gives_the_same_features():
    torch.manual_seed(2)
    ours = InceptionEncoder().eval().requires_grad_(False)
    plain = plain_copy(ours)
    images = torch.randn(1, 3, 32, 32)
    for a, b in zip(ours(images), plain(images), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * b.abs().max().item())
