"""python -m models.released: what files are, and the authors' loose files joined into one checkpoint of ours."""

import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from golden import OWN, fill_state, load

from main import main
from miscc.checkpoint import load_checkpoint, load_file
from miscc.distributed import World
from miscc.errors import CheckpointError, UserError
from models.damsm import TextEncoder
from models.released import load_generator
from sampling.convert import convert, describe
from sampling.encoders import load_encoders
from sampling.pipeline import TextToImage
from training.trainer import train

WORDS = ["<end>", "a", "bird", "this", "is", "with", "and", "the", "that"]
CPU = World(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder of files as the authors hand them out: netG.pth, netD.pth, text_encoder.pth, data/captions.pickle."""
    folder = tmp_path_factory.mktemp("released")
    about, _ = load(OWN, "ssa_gan")
    text, _ = load(OWN, "damsm")
    for part in ("netG", "netD"):
        state = {f"module.{name}": tensor for name, tensor in fill_state(about[part], 1).items()}
        torch.save(state, folder / f"{part}.pth")
    torch.save(fill_state(text["text_encoder"], 1), folder / "text_encoder.pth")
    (folder / "data").mkdir()
    with (folder / "data" / "captions.pickle").open("wb") as stream:
        names = dict(enumerate(WORDS))
        pickle.dump([[[1, 2]], [[1, 2]], names, {word: number for number, word in names.items()}], stream)
    return folder


def converted(files, out, **changes):
    options = {"discriminator_path": files / "netD.pth", "dataset": "birds"} | changes
    return convert(files / "netG.pth", files / "text_encoder.pth", files / "data", out, **options)


def test_files_are_named_for_what_they_hold(files, tmp_path):
    assert describe(files / "netG.pth")[0].endswith(
        "generator ssa_gan, 1.2 M parameters, nf 2, z_dim 100, image_size 32, sentence_dim 256, sscbn code, "
        "upsample nearest, mask predicted"
    )
    assert "discriminator ssa_gan" in describe(files / "netD.pth")[0]
    assert "text_encoder rnn" in describe(files / "text_encoder.pth")[0]
    both = {"model": {"netG": torch.load(files / "netG.pth"), "netD": torch.load(files / "netD.pth")}}
    torch.save(both, tmp_path / "both.pth")
    assert [line.split(": ")[1].split()[0] for line in describe(tmp_path / "both.pth")] == [
        "generator",
        "discriminator",
    ]
    torch.save({"a.weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match="unknown"):
        describe(tmp_path / "other.pth")


def test_a_converted_checkpoint_draws_as_the_loose_files_do(files, tmp_path):
    out = tmp_path / "joined.pth"
    converted(files, out)
    loose = TextToImage.from_released(files / "netG.pth", files / "text_encoder.pth", files / "data", "cpu")
    joined = TextToImage.load(out, "cpu")
    captions = ["this is a bird", "the bird with that bird"]
    assert np.array_equal(loose.generate(captions, seed=3).images, joined.generate(captions, seed=3).images)
    lines = describe(out)
    assert "birds, 9 words, without optimizers" in lines[0] and len(lines) == 4
    content = load_checkpoint(out)
    assert set(content["networks"]) == {"generator", "discriminator", "text_encoder"}
    assert len(content["released"]) == 3 and all(len(digest) == 64 for digest in content["released"].values())


def test_training_goes_on_from_a_converted_checkpoint(files, tmp_path, tiny):
    out = tmp_path / "joined.pth"
    before = converted(files, out)["networks"]
    changes = {"TREE.BASE_SIZE": 32, "TRAIN.NF": 2, "TRAIN.NET_G": str(out), "TRAIN.MAX_STEPS": 1,
               "TEXT.DAMSM_NAME": str(out), "TRAIN.DAMSM_WEIGHT": 0}  # fmt: skip
    cfg = tiny(*((name, str(value)) for name, value in changes.items()))
    assert train(cfg, CPU) == 0
    after = load_checkpoint(next(Path(cfg.OUTPUT_DIR).glob("*/checkpoints/last.pth")))["networks"]
    for part, limit in (("generator", 1.5e-4), ("discriminator", 1.2e-3)):
        name = "fc.weight" if part == "generator" else "from_rgb.weight"
        moved = (after[part]["state"][name] - before[part]["state"][name]).abs()
        # One step of Adam from these weights (two of D), not from others.
        assert 0 < moved.max() < limit
    assert load_encoders(out).vocabulary.words == WORDS


def test_a_generator_of_another_system_than_the_settings_say_is_named(files, tmp_path, tiny_yaml, caplog):
    about, _ = load(OWN, "sema")
    torch.save(fill_state(about["netG"], 1), tmp_path / "netG.pth")
    text_encoder = str(files / "text_encoder.pth")
    command = [
        "--cfg",
        str(tiny_yaml),
        "--gpu",
        "-1",
        "--caption",
        "a bird",
        "--out",
        str(tmp_path / "out"),
        "--overwrite",
    ]
    changes = ["--set", "TRAIN.NET_G", str(tmp_path / "netG.pth"), "TEXT.DAMSM_NAME", text_encoder,
               "DATA_DIR", str(files / "data")]  # fmt: skip
    assert main([*command, *changes]) == 0
    assert "the generator is sema's, the settings are for ssa_gan: set GAN.NAME sema" in caplog.text
    caplog.clear()
    assert main([*command, *changes, "GAN.NAME", "SEMA"]) == 0
    assert "the generator is" not in caplog.text


def test_parts_that_do_not_belong_together_are_refused(files, tmp_path):
    out = tmp_path / "joined.pth"
    (tmp_path / "data").mkdir()
    with (tmp_path / "data" / "captions.pickle").open("wb") as stream:
        pickle.dump([[], [], dict(enumerate(WORDS[:5])), {}], stream)
    with pytest.raises(CheckpointError, match="knows 9 words, the vocabulary has 5"):
        convert(files / "netG.pth", files / "text_encoder.pth", tmp_path / "data", out)
    with pytest.raises(CheckpointError, match="expected a discriminator"):
        converted(files, out, discriminator_path=files / "netG.pth")
    about, _ = load(OWN, "df_gan")
    torch.save({part: fill_state(about[part], 1) for part in ("netD", "netC")}, tmp_path / "df.pth")
    with pytest.raises(CheckpointError, match="df.pth: is the discriminator of df_gan, the generator is ssa_gan's"):
        converted(files, out, discriminator_path=tmp_path / "df.pth")
    assert not out.exists()
    converted(files, out, discriminator_path=None)
    written = out.read_bytes()
    with pytest.raises(UserError, match="exists already; give --overwrite"):
        converted(files, out)
    assert out.read_bytes() == written
    converted(files, out, overwrite=True)
    assert "discriminator" in load_checkpoint(out)["networks"]


def test_the_command_says_it_in_one_line(files, tmp_path):
    def run(*arguments):
        command = [sys.executable, "-m", "models.released", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])

    done = run(files / "netD.pth")
    assert done.returncode == 0 and "discriminator ssa_gan" in done.stdout and not done.stderr
    done = run(tmp_path / "gone.pth")
    assert done.returncode == 2 and done.stderr.strip() == f"error: {tmp_path / 'gone.pth'}: no such weight file"
    torch.save({"joint_conv.weight": torch.zeros(2)}, tmp_path / "half.pth")
    done = run(tmp_path / "half.pth")
    assert done.returncode == 2 and done.stderr.startswith(f"error: {tmp_path / 'half.pth'}: expected a generator")
    done = run(files / "netG.pth", "--convert", tmp_path / "out.pth")
    assert done.returncode == 2 and "--encoder and --data" in done.stderr


@pytest.mark.parametrize(
    ("system", "discriminators"), [("attn_gan", ["netD0", "netD1", "netD2"]), ("df_gan", ["netD"]), ("sema", [])]
)
def test_every_system_converts(files, tmp_path, system, discriminators):
    about, _ = load(OWN, system)
    salt = about["config"]["salt"]
    generator = fill_state(about["netG"], salt)
    if system == "df_gan":  # everything in one file, as its authors have it
        states = {part: fill_state(about[part], salt) for part in ("netG", "netD", "netC")}
        torch.save({"model": states, "optimizers": {}}, tmp_path / "netG.pth")
    else:
        torch.save(generator, tmp_path / "netG.pth")
        for number, part in enumerate(discriminators):
            torch.save(fill_state(about[part], salt + number), tmp_path / f"{part}.pth")
    first = tmp_path / "netD0.pth" if system == "attn_gan" else None
    out, encoder = tmp_path / "ours.pth", tmp_path / "text_encoder.pth"
    width = load_generator(load_file(tmp_path / "netG.pth")).arguments["sentence_dim"]
    words = TextEncoder(len(WORDS), text_dim=width).state_dict()
    torch.save({name.replace("embedding.", "encoder."): tensor for name, tensor in words.items()}, encoder)
    convert(tmp_path / "netG.pth", encoder, files / "data", out, discriminator_path=first)
    networks = load_checkpoint(out)["networks"]
    assert networks["generator"]["name"] == system and ("discriminator" in networks) == bool(discriminators)
    loose = TextToImage.from_released(tmp_path / "netG.pth", encoder, files / "data", "cpu")
    drawn = TextToImage.load(out, "cpu").generate(["this is a bird", "a bird with the bird"], seed=1).images
    assert np.array_equal(drawn, loose.generate(["this is a bird", "a bird with the bird"], seed=1).images)
