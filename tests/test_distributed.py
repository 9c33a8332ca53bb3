"""Two processes on one machine (gloo): one batch between them, one set of weights after it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from miscc.checkpoint import load_checkpoint
from miscc.distributed import World
from training.trainer import train

ROOT = Path(__file__).parents[1]

AVERAGING = """
import sys
from pathlib import Path

import torch
from miscc import distributed
world = distributed.start(gpu=-1)
parameters = [torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.zeros(3)), torch.nn.Parameter(torch.zeros(1))]
parameters[0].grad = torch.full((2,), float(world.rank))
parameters[1].grad = torch.tensor([1.0, 2.0, 3.0]) * (1 + 2 * world.rank)
distributed.average_gradients(parameters, world)
assert parameters[0].grad.tolist() == [0.5, 0.5] and parameters[1].grad.tolist() == [2.0, 4.0, 6.0]
assert parameters[2].grad is None
module = torch.nn.BatchNorm1d(1)
module.weight.data.fill_(world.rank + 1.0)
module.running_mean.fill_(world.rank + 5.0)
distributed.synchronise(module, world)
assert module.weight.item() == 1.0 and module.running_mean.item() == 5.0
assert distributed.any_process(world.rank == 1, world) and not distributed.any_process(False, world)
assert distributed.average({"a": torch.tensor(float(world.rank))}, world)["a"].item() == 0.5
(Path(sys.argv[1]) / f"fine{world.rank}").touch()  # printed lines of two processes may run into each other
distributed.stop()
"""


@pytest.mark.parametrize("script", ["main.py", "pretrain_DAMSM.py"])
def test_what_runs_in_one_process_says_so(tiny_yaml, script):
    environment = os.environ | {"WORLD_SIZE": "2", "RANK": "0"}
    arguments = [sys.executable, script, "--gpu", "-1"]
    arguments += ["--cfg", str(tiny_yaml), "--caption", "a bird"] if script == "main.py" else []
    done = subprocess.run(arguments, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "runs in one process; start it without torchrun" in done.stderr


def torchrun(*arguments):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        *map(str, arguments),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_averaging(tmp_path):
    (tmp_path / "averaging.py").write_text(AVERAGING)
    torchrun(tmp_path / "averaging.py", tmp_path)
    assert sorted(path.name for path in tmp_path.glob("fine*")) == ["fine0", "fine1"]


def test_two_processes_train_one_model_and_resume(tiny_yaml, tiny, tmp_path):
    output = torchrun("main.py", "--cfg", tiny_yaml, "--gpu", "-1", "--set", "TRAIN.MAX_EPOCH", "1")
    assert "2 process(es)" in output and output.count("finished") == 1
    run = tmp_path / "output" / "00000-tiny-ssa_gan"
    # D has no batch norm, so its logits of the first real batch do not depend on how the batch is shared out.
    train(tiny(("TRAIN.MAX_STEPS", "1"), ("OUTPUT_DIR", str(tmp_path / "alone"))), World(0, 1, torch.device("cpu")))
    first, alone = (
        json.loads((folder / "00000-tiny-ssa_gan" / "stats.jsonl").read_text().splitlines()[0])
        for folder in (tmp_path / "output", tmp_path / "alone")
    )
    assert first["logits/real"] == pytest.approx(alone["logits/real"], abs=1e-6)
    assert load_checkpoint(run / "checkpoints" / "last.pth")["step"] == 5
    torchrun("main.py", "--cfg", tiny_yaml, "--gpu", "-1", "--resume")
    checkpoint = load_checkpoint(run / "checkpoints" / "last.pth")
    assert checkpoint["step"] == 10
    weights = checkpoint["networks"]["generator"]["state"]["fc.weight"]
    assert torch.isfinite(weights).all()
    assert (run / "stats.jsonl").read_text().count("\n") == 10
