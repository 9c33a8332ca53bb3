"""The same seed gives the same numbers: for any number of workers and processes; and a long run takes no more of the machine."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import training.data
from miscc.checkpoint import load_checkpoint
from miscc.distributed import World
from training.trainer import Trainer, train

ROOT = Path(__file__).parents[1]
CPU = World(0, 1, torch.device("cpu"))
OF_THE_MACHINE = ("images_per_second", "memory_mib")


def losses_of(output):
    """What the only run in a folder has logged, but for speed and memory."""
    (path,) = output.glob("*/stats.jsonl")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in OF_THE_MACHINE} for line in lines]


def test_the_number_of_workers_changes_no_loss(tiny, tmp_path, monkeypatch):
    """Over the end of an epoch (5 steps), with images that are cropped, flipped and augmented."""
    monkeypatch.setattr(training.data.os, "cpu_count", lambda: 8)  # or a machine of one core would have none
    used, original = [], training.data.training_loader

    def record(*arguments, workers, **options):
        used.append(workers)
        return original(*arguments, workers=workers, **options)

    monkeypatch.setattr(training.data, "training_loader", record)
    found = {}
    for name, workers, seed in (("0", "0", "7"), ("1", "1", "7"), ("2", "2", "7"), ("other seed", "0", "8")):
        output = tmp_path / name
        changes = {"OUTPUT_DIR": str(output), "WORKERS": workers, "SEED": seed, "TRAIN.MAX_STEPS": "6"}
        train(tiny(*changes.items(), ("TRAIN.AUGMENT", "translation,cutout")), CPU)
        found[name] = losses_of(output)
    assert used == [0, 1, 2, 0]
    assert found["0"] == found["1"] == found["2"] and len(found["0"]) == 6
    assert all(a["loss/hinge"] != b["loss/hinge"] for a, b in zip(found["0"], found["other seed"], strict=True))


@pytest.mark.slow
def test_two_processes_train_as_one_that_takes_two_micro_batches(tiny_yaml, tmp_path):
    """DF-GAN, whose generator has no batch norm: each half of the batch has its own mismatched pairs in either way."""
    settings = ["GAN.NAME", "df_gan", "TRAIN.MAX_STEPS", "6", "TRAIN.NF", "2"]
    command = ["main.py", "--cfg", str(tiny_yaml), "--gpu", "-1", "--quiet", "--set", *settings]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    for start, own in (
        ([], ["OUTPUT_DIR", str(tmp_path / "one"), "TRAIN.ACCUMULATE", "2"]),
        (torchrun, ["OUTPUT_DIR", str(tmp_path / "two")]),
    ):
        done = subprocess.run(
            [sys.executable, *start, *command, *own],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr[-3000:]

    # Equal but for rounding: sums are taken in another order.
    one, two = losses_of(tmp_path / "one"), losses_of(tmp_path / "two")
    assert len(one) == len(two) == 6 and one[0]["loss/penalty"] > 0
    for a, b in zip(one, two, strict=True):
        compared = [name for name in a if name.startswith(("loss/", "logits/", "gradient_norm/"))]
        assert {name: b[name] for name in compared} == pytest.approx(
            {name: a[name] for name in compared}, rel=1e-3, abs=1e-5
        )
    weights = [
        load_checkpoint(next((tmp_path / name).glob("*/checkpoints/last.pth")))["networks"]["generator_ema"]["state"]
        for name in ("one", "two")
    ]
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=1e-3, atol=1e-5)


# -- what a long run takes -----------------------------------------------------------------------------------------


def taken():
    """(resident memory in bytes, open files, threads) of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    counts = (len(os.listdir(f"/proc/self/{kind}")) for kind in ("fd", "task"))
    return pages * os.sysconf("SC_PAGE_SIZE"), *counts


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
def test_two_thousand_steps_take_no_more_memory_files_or_threads(tiny, monkeypatch):
    """With checkpoints of every epoch, pictures, statistics and a reading process."""
    monkeypatch.setattr(training.data.os, "cpu_count", lambda: 2)
    seen, original = {}, Trainer.train_step

    def step(self, *arguments):
        values = original(self, *arguments)
        if self.step % 100 == 0:
            seen[self.step] = taken()
        return values

    monkeypatch.setattr(Trainer, "train_step", step)
    changes = {
        "MAX_EPOCH": "200",
        "BATCH_SIZE": "4",
        "SAVE_EVERY": "0",
        "SAMPLE_EVERY": "250",
        "LOG_EVERY": "10",
        "GSAVE_INTERVAL": "0",
        "EMA_DECAY": "0.99",
    }
    assert train(tiny(("WORKERS", "1"), *((f"TRAIN.{name}", value) for name, value in changes.items())), CPU) == 0

    # After a warm-up of a quarter, in which pictures and checkpoints are made for the first time.
    memory, files, threads = zip(*(seen[step] for step in range(500, 2001, 100)), strict=True)
    print(f"memory {[round(value / 2**20, 1) for value in memory]} MiB, files {files}, threads {threads}")
    assert max(memory) < 1.01 * memory[0]
    assert len(set(files)) == 1 and len(set(threads)) == 1
