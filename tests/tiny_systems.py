"""Tiny networks and a batch of 16 px for the tests of the systems, and who moves in a training step. No tests here."""

from pathlib import Path

import torch

from miscc.batch import Batch
from models.damsm import TextEncoder
from models.types import TextFeatures

ROOT = Path(__file__).parents[1]


def text_features(number, dim=256):
    mask = torch.zeros(number, 3, dtype=torch.bool)
    return TextFeatures(torch.randn(number, dim), torch.randn(number, dim, 3), mask)


def make_batch(number=4):
    torch.manual_seed(1)
    captions, lengths = torch.randint(1, 20, (number, 6)), torch.tensor([6, 4, 5, 3])[:number]
    images = torch.randn(number, 3, 16, 16).clamp(-1, 1)
    numbers = torch.arange(number)
    return Batch(images, captions, lengths, numbers, [str(n) for n in numbers], numbers, numbers)


def make_networks(generator, discriminator):
    """Those and a text encoder, with weights of their own kind: last layers at zero would hide mistakes."""
    torch.manual_seed(0)
    networks = {"generator": generator, "discriminator": discriminator, "text_encoder": TextEncoder(20)}
    for part in ("generator", "discriminator"):
        for parameter in networks[part].parameters():
            if parameter.dim() < 2 or not parameter.any():
                torch.nn.init.normal_(parameter, 0.0, 0.3)
    return networks


def changed_by_a_step(system, batch, noise):
    """Run one step with plain SGD; for each update its name, losses, and the networks that it moves and touches."""
    history = []
    for update in system.updates(batch, noise):
        before = {part: [p.clone() for p in net.parameters()] for part, net in system.networks.items()}
        for net in system.networks.values():
            net.zero_grad()
        sum(update.losses.values()).backward()
        for parameter in system.optimizers()[update.optimizer][0]:
            if parameter.grad is not None:
                parameter.data -= 0.1 * parameter.grad
        moved = {
            part
            for part, net in system.networks.items()
            if any(not torch.equal(a, b) for a, b in zip(before[part], net.parameters(), strict=True))
        }
        touched = {part for part, net in system.networks.items() if any(p.grad is not None for p in net.parameters())}
        history.append((update.optimizer, list(update.losses), moved, touched))
    return history


def tiny_overrides(data, encoders, output):
    """What makes one of our YAML files a training of seconds on `drawn_folder`."""
    return {
        "DATASET_NAME": "folder", "DATA_DIR": str(data), "OUTPUT_DIR": str(output), "WORKERS": "0",
        "TREE.BASE_SIZE": "16", "TRAIN.NF": "1", "TRAIN.BATCH_SIZE": "8", "TRAIN.MAX_STEPS": "2",
        "TRAIN.LOG_EVERY": "1", "TEXT.CAPTIONS_PER_IMAGE": "3", "TEXT.DAMSM_NAME": str(encoders),
    }  # fmt: skip


def run_main(yaml, overrides, *arguments):
    """main.py in this process, on the CPU."""
    from main import main

    pairs = [text for pair in overrides.items() for text in pair]
    return main(["--cfg", str(ROOT / yaml), "--gpu", "-1", *arguments, "--set", *pairs])


def trains_resumes_and_samples(yaml, system, overrides):
    """Two steps, three more after a stop, equal to five at once; then a caption is drawn. Returns the last checkpoint."""
    from miscc.checkpoint import load_checkpoint

    name = Path(yaml).stem
    output = Path(overrides["OUTPUT_DIR"])
    whole = overrides | {"OUTPUT_DIR": str(output / "whole"), "TRAIN.MAX_STEPS": "5"}
    assert run_main(yaml, overrides) == 0
    assert run_main(yaml, overrides | {"TRAIN.MAX_STEPS": "5"}, "--resume") == 0
    assert run_main(yaml, whole) == 0
    parts, at_once = (
        load_checkpoint(folder / f"00000-{name}-{system}" / "checkpoints" / "last.pth")
        for folder in (output, output / "whole")
    )
    from test_trainer import assert_same_state

    for content in (parts, at_once):
        content.pop("config")
    assert_same_state(parts, at_once)
    assert parts["step"] == 5
    assert run_main(yaml, overrides, "--caption", "a small red bird", "--out", str(output / "drawn")) == 0
    assert (output / "drawn" / "samples.png").is_file() or list((output / "drawn").glob("*.png"))
    return parts
