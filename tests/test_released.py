"""What the loader of released weights sees through, and what it refuses, with the reason."""

import pickle

import pytest
import torch
from golden import OWN, fill_state, load

from miscc.checkpoint import load_file
from miscc.errors import CheckpointError
from models.released import load_discriminator, load_generator, load_text_encoder, recognise


@pytest.fixture(scope="module")
def states():
    about, _ = load(OWN, "ssa_gan")
    text, _ = load(OWN, "damsm")
    return {
        "netG": fill_state(about["netG"], 1),
        "netD": fill_state(about["netD"], 1),
        "text": fill_state(text["text_encoder"], 1),
    }


def test_prefixes_and_wrapping_dicts_are_seen_through(states):
    plain = load_generator(states["netG"]).state_dict()
    prefixed = {f"module.{name}": tensor for name, tensor in states["netG"].items()}
    for wrapped in (
        prefixed,
        {"state_dict": prefixed},
        {"model": {"netG": prefixed, "netD": states["netD"]}, "epoch": 3},
    ):
        assert all(
            torch.equal(a, b)
            for a, b in zip(plain.values(), load_generator(wrapped).state_dict().values(), strict=True)
        )
    assert load_discriminator({"model": {"netG": prefixed, "netD": states["netD"]}}).arguments["image_size"] == 32


def test_sizes_come_from_the_tensors(states):
    generator, discriminator = load_generator(states["netG"]), load_discriminator(states["netD"])
    assert generator.arguments["nf"] == 2 and generator.arguments["image_size"] == 32 and generator.z_dim == 100
    assert discriminator.arguments["nf"] == 2 and not generator.training
    assert load_text_encoder(states["text"]).arguments["vocabulary_size"] == 9
    gru = {n: t[: 3 * len(t) // 4] if "rnn" in n else t for n, t in states["text"].items()}
    assert load_text_encoder(gru).arguments["rnn_type"] == "GRU"


def test_files_from_before_batch_norm_counted_are_read(states):
    """PyTorch before 0.4.1, of the summer of 2018, wrote no num_batches_tracked: AttnGAN's first files."""
    about, _ = load(OWN, "attn_gan")
    whole = fill_state(about["netG"], 1)
    old = {name: tensor for name, tensor in whole.items() if not name.endswith("num_batches_tracked")}
    assert len(old) < len(whole)
    found, expected = load_generator(old).state_dict(), load_generator(whole).state_dict()
    for name, tensor in expected.items():
        same = torch.zeros_like(tensor) if name.endswith("num_batches_tracked") else tensor
        assert torch.equal(found[name], same), name


def without(state, name):
    return {key: tensor for key, tensor in state.items() if key != name}


def test_what_does_not_fit_is_refused_with_the_reason(states):
    generator = states["netG"]
    cases = [
        (
            load_generator,
            without(generator, "block1.c1.bias"),
            "1 tensors are missing, for example blocks.1.conv1.bias",
        ),
        (load_generator, without(generator, "fc.weight"), "its sizes cannot be read, tensors are missing"),
        (
            load_generator,
            generator | {"extra.weight": torch.zeros(1)},
            "1 tensors are not its own, for example extra.weight",
        ),
        (load_generator, generator | {"fc.bias": torch.zeros(3)}, r"fc.bias: \(3,\) instead of \(256,\)"),
        (load_generator, states["netD"], "expected a generator, but the tensors are of a SSA-GAN discriminator"),
        (load_discriminator, states["text"], "expected a discriminator, but the tensors are of a DAMSM text encoder"),
        (load_generator, {"a": torch.zeros(1)}, r"unknown \(the first: a\)"),
        (load_generator, {"epoch": 3}, r"holds no tensors of a network \(it has: epoch\)"),
        (load_generator, [1, 2], "holds a list, not the tensors"),
        (load_generator, {}, r"holds no tensors of a network \(it has: nothing\)"),
    ]
    for function, state, message in cases:
        with pytest.raises(CheckpointError, match=message):
            function(state)
    assert recognise({"a": torch.zeros(1)}) is None


class Evil:
    def __reduce__(self):
        return (open, ("/tmp/should-never-be-written", "w"))


def test_pickled_modules_and_code_are_not_loaded(tmp_path):
    for name, content in (("module.pth", torch.nn.Linear(1, 1)), ("evil.pth", {"state": Evil()})):
        torch.save(content, tmp_path / name)
        with pytest.raises(CheckpointError, match=f"{name}: holds more than tensors.*is not loaded"):
            load_file(tmp_path / name)
    with (tmp_path / "plain.pickle").open("wb") as stream:
        pickle.dump(Evil(), stream)
    with pytest.raises(CheckpointError, match="plain.pickle"):
        load_file(tmp_path / "plain.pickle")
