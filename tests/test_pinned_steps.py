"""Ten training steps of every system and of the encoders, pinned: a refactoring must not change one loss or weight.

The values in fixtures/pinned_steps.json are written once, by `python -m pytest tests/test_pinned_steps.py --write-pins`,
and only a change that is meant to change the maths may write them again. float32 on one CPU thread; the float64 runs
hold on any machine, the float32 ones to the last digits only where the CPU rounds as the one that wrote them.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import settings
from PIL import Image

from datasets.loading import training_loader
from miscc.batch import Batch
from miscc.checkpoint import load_checkpoint, save_checkpoint
from miscc.distributed import World
from miscc.randomness import noise_for, seed_everything
from models.choice import chosen_system
from models.damsm import SmallImageEncoder, TextEncoder
from training.build import build_networks, build_system
from training.damsm import EncoderTrainer
from training.step import Stepper, make_optimizers
from training.trainer import train

PINS = Path(__file__).parent / "fixtures" / "pinned_steps.json"
CPU = World(0, 1, torch.device("cpu"))
STEPS = 10
CAPTIONS = ("a small red bird with black wings", "the bird has a yellow belly and a long beak", "a blue bird")

# name: (GAN.NAME, further settings). Small sizes; every objective and each of its switches that adds a loss.
RUNS = {
    "ssa_gan": ("ssa_gan", {}),
    "ssa_gan_paper": ("ssa_gan", {"GAN.SSCBN": "paper", "GAN.UPSAMPLE": "bilinear", "TRAIN.PENALTY_STEP": "joint"}),
    "ssa_gan_finetuned": ("ssa_gan", {"TRAIN.FINETUNE_ENCODERS": "True", "TRAIN.FINETUNE_MODE": "train"}),
    "ssa_gan_accumulated": ("ssa_gan", {"TRAIN.ACCUMULATE": "2", "USE_SN": "True"}),
    "df_gan": ("df_gan", {"TRAIN.DAMSM_WEIGHT": "0.05"}),
    "sema": ("sema", {}),
    "attn_gan": ("attn_gan", {}),
    "attn_dcgan": ("attn_dcgan", {}),
}
GAN = """
CONFIG_NAME: pinned
DATASET_NAME: folder
DATA_DIR: {data}
OUTPUT_DIR: {output}
WORKERS: 0
GAN: {{NAME: {system}, GF_DIM: 4, DF_DIM: 2, Z_DIM: 8, R_NUM: 1, CONDITION_DIM: 8}}
TREE: {{BASE_SIZE: {base_size}, BRANCH_NUM: {stages}}}
TRAIN: {{NF: 2, BATCH_SIZE: 8, MAX_STEPS: 10, SAMPLE_EVERY: 0, SAVE_EVERY: 0, LOG_EVERY: 1, GSAVE_INTERVAL: 0}}
TEXT: {{CAPTIONS_PER_IMAGE: 3, DAMSM_NAME: {encoders}, EMBEDDING_DIM: 32}}
"""
DAMSM = """
DATASET_NAME: folder
DATA_DIR: {data}
WORKERS: 0
TREE: {{BASE_SIZE: 16}}
TRAIN: {{BATCH_SIZE: 8, MAX_EPOCH: 3, HELD_OUT: 0.2}}
TEXT: {{CAPTIONS_PER_IMAGE: 3, EMBEDDING_DIM: 32}}
DAMSM: {{IMAGE_ENCODER: small}}
"""


@pytest.fixture(scope="session")
def noise_folder(tmp_path_factory):
    """A prepared data set of 40 images of seeded noise, of the very size that is trained on: no image library scales it."""
    from datasets.prepare import main as prepare

    root = tmp_path_factory.mktemp("noise")
    (root / "images").mkdir()
    random, rows = np.random.RandomState(0), []
    for number in range(40):
        pixels = random.randint(0, 256, (19, 19, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / "images" / f"{number:02d}.png")
        for caption in CAPTIONS:
            rows.append(json.dumps({"image": f"{number:02d}.png", "caption": f"{caption} {number % 5}"}))
    names = [f"{number:02d}.png" for number in range(40)]
    (root / "train.txt").write_text("\n".join(names[:36]))
    (root / "test.txt").write_text("\n".join(names[36:]))
    (root / "captions.jsonl").write_text("\n".join(rows) + "\n")
    prepare(["folder", "--root", str(root)])
    return root


@pytest.fixture(scope="session")
def pinned_encoders(noise_folder, tmp_path_factory):
    """(the losses of ten steps of the encoders, the checkpoint after them)."""
    folder = tmp_path_factory.mktemp("pinned-encoders")
    cfg = settings(folder / "damsm.yml", DAMSM.format(data=noise_folder), "damsm")
    trainer = EncoderTrainer(cfg, CPU.device)
    batches = iter(training_loader(trainer.dataset, cfg.TRAIN.BATCH_SIZE, cfg.SEED, 0, 0))
    losses = []
    for step in range(STEPS):
        found = trainer.train_step(next(batches).to(CPU.device), step // trainer.steps_per_epoch)
        losses.append({name: loss.item() for name, loss in found.items()})
    path = folder / "encoders.pth"
    save_checkpoint(path, trainer.checkpoint())
    return losses, path


def checksums(state):
    """Sum and sum of squares over all tensors, in float64: {"sum", "squares", "elements"}."""
    values = torch.cat([tensor.double().flatten() for tensor in state.values() if tensor.is_floating_point()])
    return {"sum": values.sum().item(), "squares": values.square().sum().item(), "elements": len(values)}


def settings_of(name, folder, data, encoders):
    system, changes = RUNS[name]
    stages = 2 if system.startswith("attn") else 1
    text = GAN.format(
        data=data, output=folder / "output", system=system, encoders=encoders, stages=stages,
        base_size=64 if stages > 1 else 16,
    )  # fmt: skip
    return settings(folder / "pinned.yml", text, overrides=tuple(changes.items()))


def double_precision_run(cfg):
    """Losses of ten steps on random float64 data, without files and loaders, and the generator's weights after them."""
    seed_everything(3)
    chosen = chosen_system(cfg)
    networks = build_networks(chosen)
    networks["text_encoder"] = TextEncoder(20, text_dim=32)
    networks["image_encoder"] = SmallImageEncoder(text_dim=32, image_size=16, nf=4)
    networks = {part: network.double() for part, network in networks.items()}
    system = build_system(chosen, networks)
    system.train()
    stepper = Stepper(system.updates, make_optimizers(system.optimizers()), CPU, accumulate=cfg.TRAIN.ACCUMULATE)
    losses = []
    for step in range(STEPS):
        batch = random_batch(step, system.image_sizes)
        noise = noise_for(3, step, range(8), networks["generator"].noise_dim).double()
        seed_everything(3, step)
        found = {}
        for update in stepper.steps(batch, noise):
            found |= {name: loss.item() for name, loss in update.losses.items()}
        losses.append(found)
    return losses, {part: checksums(network.state_dict()) for part, network in networks.items()}


def random_batch(step, image_sizes):
    random = np.random.RandomState(100 + step)
    images = [torch.from_numpy(random.uniform(-1, 1, (8, 3, size, size))) for size in image_sizes]
    captions = torch.from_numpy(random.randint(1, 20, (8, 6)))
    lengths = torch.tensor([6, 4, 5, 3, 6, 2, 1, 5])
    numbers = torch.arange(8)
    classes = torch.tensor([0, 1, 2, 3, 0, 4, 5, 6])
    return Batch(
        images if len(images) > 1 else images[0],
        captions,
        lengths,
        classes,
        [str(n) for n in range(8)],
        numbers,
        numbers,
    )


def compare(found, name, kind, tolerance, write):
    """Hold a run's values against the pinned ones; with `write`, pin them."""
    pins = json.loads(PINS.read_text()) if PINS.is_file() else {}
    if write:
        pins.setdefault("cpu", torch.backends.cpu.get_cpu_capability())
        pins.setdefault(kind, {})[name] = found
        PINS.write_text(json.dumps(pins, indent=1, sort_keys=True) + "\n")
        return
    expected = pins[kind][name]
    assert_close(found, expected, tolerance, f"{name} ({kind})")


def assert_close(found, expected, tolerance, where):
    if isinstance(expected, dict):
        assert set(found) == set(expected), where
        for key in expected:
            assert_close(found[key], expected[key], tolerance, f"{where}, {key}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), where
        for number, (one, other) in enumerate(zip(found, expected, strict=True)):
            assert_close(one, other, tolerance, f"{where}, step {number + 1}")
    else:
        assert found == pytest.approx(expected, rel=tolerance, abs=tolerance), where


def rounds_alike():
    """Whether this CPU rounds as the one that wrote the pins: an Intel with the same instructions.

    On others the libraries for products, convolutions and decompositions take other paths; an AMD EPYC with AVX-512 ends the ten
    steps within 3e-3 of the pins.
    """
    info = Path("/proc/cpuinfo")
    capability = json.loads(PINS.read_text())["cpu"] if PINS.is_file() else torch.backends.cpu.get_cpu_capability()
    is_intel = info.is_file() and "GenuineIntel" in info.read_text()
    return is_intel and capability == torch.backends.cpu.get_cpu_capability()


def single_tolerance():
    """1e-6 where the CPU rounds as the one that wrote the pins; elsewhere rounding grows from step to step."""
    return 1e-6 if rounds_alike() else 2e-2


def double_tolerance(name):
    """1e-8, but elsewhere for AttnGAN: its first weights come of a decomposition in float32."""
    return 1e-8 if rounds_alike() or not name.startswith("attn") else 1e-4


def test_the_encoders_take_the_pinned_steps(pinned_encoders, request):
    losses, path = pinned_encoders
    networks = load_checkpoint(path)["networks"]
    found = {"losses": losses, "weights": {part: checksums(entry["state"]) for part, entry in networks.items()}}
    compare(found, "encoders", "float32", single_tolerance(), request.config.getoption("--write-pins"))


@pytest.mark.parametrize("name", RUNS)
def test_a_training_takes_the_pinned_steps(name, noise_folder, pinned_encoders, tmp_path, request):
    cfg = settings_of(name, tmp_path, noise_folder, pinned_encoders[1])
    assert train(cfg, CPU) == 0
    run = next((tmp_path / "output").iterdir())
    rows = [json.loads(line) for line in (run / "stats.jsonl").read_text().splitlines()]
    kinds = ("loss/", "gradient_norm/", "logits/", "sign/", "mask_mean", "distance/", "accuracy/")
    losses = [{key: value for key, value in row.items() if key.startswith(kinds)} for row in rows]
    assert len(losses) == STEPS
    networks = load_checkpoint(run / "checkpoints" / "last.pth")["networks"]
    found = {"losses": losses, "weights": {part: checksums(entry["state"]) for part, entry in networks.items()}}
    compare(found, name, "float32", single_tolerance(), request.config.getoption("--write-pins"))


@pytest.mark.parametrize("name", RUNS)
def test_the_steps_are_pinned_in_double_precision_on_any_machine(
    name, noise_folder, pinned_encoders, tmp_path, request
):
    losses, weights = double_precision_run(settings_of(name, tmp_path, noise_folder, pinned_encoders[1]))
    found = {"losses": losses, "weights": weights}
    compare(found, name, "float64", double_tolerance(name), request.config.getoption("--write-pins"))
