"""--dry-run: what a training would be, without starting it: settings, sizes, steps, memory, and what is missing."""

from collections.abc import Mapping

import torch
from torch import nn

from miscc.config import to_yaml
from miscc.errors import UserError
from models.types import TextFeatures, count_parameters
from training.build import build_networks, problems, read_records

PENALTY_PASSES = 2  # MA-GP keeps about twice what one pass of D keeps, for its double backward


def describe(cfg: Mapping) -> str:
    """The report as text. Raises ConfigError only for settings that no data could mend."""
    with torch.device("meta"):
        networks = build_networks(cfg)
    lines = [to_yaml(cfg).rstrip(), ""]
    for part, network in networks.items():
        lines.append(f"{part}: {count_parameters(network) / 1e6:.1f} M parameters")
    state, kept = memory_estimate(networks, cfg.GAN.Z_DIM, cfg.TREE.BASE_SIZE, cfg.TEXT.EMBEDDING_DIM)
    total = state + kept * cfg.TRAIN.BATCH_SIZE
    lines.append(
        f"memory: about {total / 2**30:.1f} GiB ({kept / 2**20:.0f} MiB an image kept for backward at batch "
        f"{cfg.TRAIN.BATCH_SIZE}, {state / 2**30:.2f} GiB weights and optimizers), without the image encoder's"
    )
    try:
        num_images = len(read_records(cfg, "train"))
        steps = num_images // cfg.TRAIN.BATCH_SIZE
        total = min(steps * cfg.TRAIN.MAX_EPOCH, cfg.TRAIN.MAX_STEPS or steps * cfg.TRAIN.MAX_EPOCH)
        lines.append(f"steps per epoch: {steps} ({num_images} images), {total} in all")
        if not steps:
            lines.append(f"not there yet: {num_images} images are fewer than one batch; lower TRAIN.BATCH_SIZE")
    except UserError:
        lines.append("steps per epoch: unknown until the data is there")
    missing = problems(cfg)
    lines += [f"not there yet: {line}" for line in missing] or ["data and encoders: found"]
    return "\n".join(lines)


def memory_estimate(
    networks: Mapping[str, nn.Module], z_dim: int, image_size: int, text_dim: int
) -> tuple[float, float]:
    """(bytes of weights, gradients, Adam's state and averaged G; bytes an image that autograd keeps), float32.

    Networks on the meta device, so nothing is computed. What is kept is counted while G and D run on two images; a step
    holds G's activations together with those of D on real and fake images, or D's for the gradient penalty.
    """
    weights = {part: 4 * count_parameters(network) for part, network in networks.items()}
    state = 4 * sum(weights.values()) + weights["generator"]
    sentence = torch.zeros(2, text_dim, device="meta")
    words, mask = torch.zeros(2, text_dim, 8, device="meta"), torch.zeros(2, 8, dtype=torch.bool, device="meta")
    noise = torch.zeros(2, z_dim, device="meta")
    images = torch.zeros(2, 3, image_size, image_size, device="meta")
    text = TextFeatures(sentence, words, mask)
    generator = _kept_bytes(lambda: networks["generator"](noise, text))
    discriminator = _kept_bytes(lambda: networks["discriminator"](images, sentence))
    return state, (generator + PENALTY_PASSES * discriminator) / 2


def _kept_bytes(run) -> float:
    """Bytes of distinct tensors that autograd saves while `run` runs, weights not counted."""
    seen: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, nn.Parameter):
            seen[id(tensor)] = tensor  # held, so that no id is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = run()
    total = sum(tensor.numel() * tensor.element_size() for tensor in seen.values())
    del output
    return float(total)
