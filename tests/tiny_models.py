"""Whole models of 16 and 32 px with random weights, of three systems: pipelines and checkpoints to serve. No tests here."""

from pathlib import Path

import torch

from datasets.toybirds.dataset import ToyBirds
from miscc.checkpoint import save_checkpoint
from miscc.vocabulary import Vocabulary
from models.attn_gan import AttnGenerator
from models.damsm import TextEncoder
from models.df_gan import DFGenerator
from models.registry import network_name, to_state
from models.ssa_gan import SSAGenerator
from sampling.pipeline import TextToImage

CAPTIONS = ["a small bird with a red crown", "this bird has blue wings", "a bird with a yellow belly"]
GENERATORS = {
    "ssa_gan": lambda: SSAGenerator(nf=2, image_size=16),
    "df_gan": lambda: DFGenerator(nf=2, image_size=16),
    "attn_gan": lambda: AttnGenerator(gf_dim=4, base_size=8, num_stages=3),
}


def vocabulary():
    birds = ToyBirds("train")
    return Vocabulary.build(caption for index in range(40) for caption in birds.captions(index))


def tiny_pipeline(system="ssa_gan", rnn_type="LSTM"):
    """Random networks whose output depends on caption and noise alike."""
    torch.manual_seed(3)
    words = vocabulary()
    generator, text_encoder = GENERATORS[system](), TextEncoder(len(words), rnn_type=rnn_type)
    for parameter in generator.parameters():
        if not parameter.any():  # gates and last layers start at zero, which would hide mistakes
            torch.nn.init.normal_(parameter, 0.0, 0.3)
    origin = {"config": {"DATASET_NAME": "toybirds", "GAN": {"NAME": system}}, "step": 7, "epoch": 1, "averaged": False}
    return TextToImage(generator.eval(), text_encoder.eval(), words, origin)


def tiny_checkpoint(path, system="ssa_gan", config=None, averaged=None):
    """The same as one of our checkpoint files; averaged: a further generator, as G's average."""
    pipeline = tiny_pipeline(system)
    networks = {"generator": pipeline.generator, "text_encoder": pipeline.text_encoder}
    states = {part: to_state(network_name(network), network) for part, network in networks.items()}
    if averaged is not None:
        states["generator_ema"] = to_state(system, averaged)
    content = {
        "config": config or pipeline.origin["config"], "vocabulary": pipeline.vocabulary.words, "networks": states,
        "step": 7, "epoch": 1,
    }  # fmt: skip
    save_checkpoint(path, content)
    return Path(path)
