"""What the tests of evaluations share: a protocol of seconds, and a checkpoint that has taken one step."""

import torch
from metrics_help import tiny_network

from eval.features import networks
from eval.protocol.protocols import PROTOCOLS, Protocol
from miscc.distributed import World
from training.trainer import train

QUICK = Protocol(
    name="quick",
    about="for tests",
    num_images=24,
    metrics=("FID", "KID", "IS", "precision_recall", "R_precision", "diversity"),
    network="tiny",
    resize="bilinear",
    splits=4,
    kid_subset_size=8,
    kid_subsets=5,
    candidates=9,
    folds=4,
    diversity_captions=2,
    diversity_images=2,
)


def add_quick_protocol(monkeypatch):
    """QUICK and its network, under the names that commands know."""
    monkeypatch.setitem(networks.NETWORKS, "tiny", lambda weights, resize, seed: tiny_network(resize, seed))
    monkeypatch.setitem(PROTOCOLS, "quick", QUICK)


def one_step_checkpoint(tiny, tmp_path):
    train(tiny(("TRAIN.MAX_STEPS", "1")), World(0, 1, torch.device("cpu")))
    return tmp_path / "output" / "00000-tiny-ssa_gan" / "checkpoints" / "last.pth"
