"""A checkpoint for the tests of attributes.py and mask_iou.py: untrained networks that know ToyBirds' words."""

import torch

from datasets.toybirds.dataset import ToyBirds
from miscc.checkpoint import save_checkpoint
from miscc.vocabulary import Vocabulary
from models.damsm import TextEncoder
from models.registry import to_state
from models.ssa_gan import SSAGenerator


def write_checkpoint(path, image_size: int = 32, dataset: str = "toybirds"):
    """An SSA-GAN of `image_size` pixels with random weights, as if trained on `dataset`; returns `path`."""
    vocabulary = Vocabulary.build(caption for index in range(200) for caption in ToyBirds("test").captions(index))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        generator, encoder = SSAGenerator(nf=2, image_size=image_size), TextEncoder(len(vocabulary))
    networks = {"generator": to_state("ssa_gan", generator), "text_encoder": to_state("rnn", encoder)}
    config = {"DATASET_NAME": dataset}
    save_checkpoint(
        path, {"networks": networks, "vocabulary": vocabulary.words, "step": 0, "epoch": 0, "config": config}
    )
    return path
