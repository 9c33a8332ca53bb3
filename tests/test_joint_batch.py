"""Two processes (gloo) with half a batch each take the step of one process with the whole batch, to 1e-5."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]

STEP = """
import sys
from pathlib import Path

sys.path[:0] = [sys.argv[2], sys.argv[2] + "/tests"]
import torch
from test_bench_reference import make_batch, make_system

from miscc import distributed
from models.ssa_gan import SSAGAN
from training.step import Stepper, split_batch


class Halves(SSAGAN):
    '''Mismatched pairs are formed within each half of the batch, as each process forms its own.'''

    def _discriminator_losses(self, real, fake, sentence):
        parts = [SSAGAN._discriminator_losses(self, real[r], fake[r], sentence[r]) for r in (slice(0, 2), slice(2, 4))]
        return {"hinge": sum(losses["hinge"] for losses, _ in parts) / 2}, parts[0][1]


def run(system, world, batch, noise):
    groups = {name: spec.parameters for name, spec in system.optimizers().items()}
    optimizers = {name: torch.optim.SGD(parameters, lr=0.01) for name, parameters in groups.items()}
    found = []
    for update in Stepper(system.updates, optimizers, world, global_damsm=True).steps(batch, noise):
        found.append([None if p.grad is None else p.grad.clone() for p in groups[update.optimizer]])
    return found


world = distributed.start(gpu=-1)
whole, noise = make_batch(), torch.randn(4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
alone = make_system()
alone.__class__ = Halves
expected = run(alone, distributed.World(0, 1, world.device), whole, noise)
shared = make_system()
for network in shared.networks.values():
    distributed.synchronise(network, world)
found = run(shared, world, split_batch(whole, 2)[world.rank], noise.chunk(2)[world.rank])
assert len(found) == len(expected) == 3
for ours, theirs in zip(found, expected, strict=True):
    for a, b in zip(ours, theirs, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-8)
for name, value in alone.networks["generator"].state_dict().items():  # weights after the step, running statistics
    torch.testing.assert_close(shared.networks["generator"].state_dict()[name], value, rtol=1e-6, atol=1e-8)

# Each part by itself: batch norm over all images, and rows of all processes, with gradients.
torch.manual_seed(5)
x, direction = torch.randn(2, 4, 3, 2, 2, dtype=torch.float64)
theirs, ours = torch.nn.BatchNorm2d(3).double(), torch.nn.BatchNorm2d(3).double()
ours = distributed.synchronise(ours, world)
half = slice(2 * world.rank, 2 * world.rank + 2)
joint, own = x.clone().requires_grad_(), x[half].clone().requires_grad_()
(theirs(joint) * direction).sum().backward()
(ours(own) * direction[half]).sum().backward()
torch.testing.assert_close(own.grad, joint.grad[half])
distributed.average_gradients([ours.weight, ours.bias], world)
torch.testing.assert_close(2 * ours.weight.grad, theirs.weight.grad)
torch.testing.assert_close(ours.running_var, theirs.running_var)
assert ours.num_batches_tracked == 1
torch.testing.assert_close(ours.eval()(own), theirs.eval()(joint)[half])
rows = torch.full((2, 1), float(world.rank), requires_grad=True)
assert distributed.all_gather_with_grad(rows)[0] is rows
with distributed.global_damsm(world):
    (gathered,) = distributed.all_gather_with_grad(rows)
assert gathered.flatten().tolist() == [0.0, 0.0, 1.0, 1.0]
(gathered.flatten() * torch.tensor([1.0, 2.0, 3.0, 4.0])).sum().backward()
assert rows.grad.flatten().tolist() == [[2.0, 4.0], [6.0, 8.0]][world.rank]
(Path(sys.argv[1]) / f"fine{world.rank}").touch()
distributed.stop()
"""


def test_two_processes_take_the_step_of_one(tmp_path):
    (tmp_path / "step.py").write_text(STEP)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*command, str(tmp_path / "step.py"), str(tmp_path), str(ROOT)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert sorted(path.name for path in tmp_path.glob("fine*")) == ["fine0", "fine1"]
