"""How a step is computed, whatever the system: precision, compiling, layout, micro-batches, checkpointed activations.

What a step consists of is the system's business, when it runs the trainer's.
"""

import copy
import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from miscc.batch import Batch
from miscc.distributed import World, global_damsm
from miscc.errors import ConfigError
from models.types import System, Update

COMPILED_METHODS = ("features", "logits", "unconditional")  # of judges, which steps call part by part


class Stepper:
    """Runs the updates of a system: their forward passes in the wanted precision, and their backward passes.

    precision: "fp32", "tf32" (float32 whose products on a GPU round to 19 bits) or "bf16" (autocast; penalties and losses
    stay in float32); accumulate: micro-batches of an update, each with its own mismatched pairs and batch statistics (G's
    graphs live until G's update, so what falls is D's and the penalty's memory; checkpointed activations lower G's);
    joint_matching: DAMSM's losses over the images and captions of all processes.
    """

    def __init__(
        self,
        system: System,
        world: World,
        precision: str = "tf32",
        accumulate: int = 1,
        joint_matching: bool = False,
    ):
        self.system, self.world = system, world
        self.precision, self.accumulate, self.joint_matching = precision, accumulate, joint_matching
        if world.device.type == "cuda":
            if precision == "bf16" and not torch.cuda.is_bf16_supported():
                raise ConfigError("TRAIN.PRECISION: this GPU does not compute in bf16; take tf32 or fp32")
            torch.set_float32_matmul_precision("highest" if precision == "fp32" else "high")
            torch.backends.cudnn.allow_tf32 = precision != "fp32"

    @contextmanager
    def computing(self) -> Iterator[None]:
        """What forward passes run in."""
        with ExitStack() as contexts:
            if self.precision == "bf16":
                contexts.enter_context(torch.autocast(self.world.device.type, dtype=torch.bfloat16))
            if self.joint_matching:
                contexts.enter_context(global_damsm(self.world))
            yield

    def updates(self, batch: Batch, noise: Tensor, optimizers: Mapping[str, torch.optim.Optimizer]) -> Iterator[Update]:
        """The system's updates, each with its gradients in place: whoever asks steps the optimizer, then asks on.

        With micro-batches, their losses and statistics are the means over them, and so are the gradients.
        """
        parts = zip(split_batch(batch, self.accumulate), noise.chunk(self.accumulate), strict=True)
        runs = [iter(self.system.updates(*part)) for part in parts]
        while True:
            done = []
            for number, run in enumerate(runs):
                with self.computing():
                    update = next(run, None)
                if update is None:
                    continue
                if number == 0:
                    optimizers[update.optimizer].zero_grad(set_to_none=True)
                loss = torch.stack(list(update.losses.values())).sum()
                (loss if len(runs) == 1 else loss / len(runs)).backward()
                losses = {name: value.detach() for name, value in update.losses.items()}
                done.append(Update(update.optimizer, losses, update.stats))
                del update, loss  # or their graph would live through the next micro-batch
            if not done:
                return
            yield done[0] if len(done) == 1 else mean_update(done)


def adam(parameters: Sequence[nn.Parameter], lr: float, betas: Sequence[float]) -> torch.optim.Adam:
    """Adam in its fused form, which goes over the memory once: four times faster than the stock loop also on CPUs."""
    return torch.optim.Adam(parameters, lr=lr, betas=(float(betas[0]), float(betas[1])), fused=True)


def restore_adam(optimizer: torch.optim.Adam, saved: Mapping[str, Any]) -> None:
    """Load an optimizer's saved state; rates and betas stay the settings', should they have changed.

    Older checkpoints were not fused. The fused form takes parameters and averages for the same layout, which a run with
    TRAIN.CHANNELS_LAST changed since has not: they are laid out anew.
    """
    groups = [
        old | {key: new[key] for key in ("lr", "betas", "fused")}
        for old, new in zip(saved["param_groups"], optimizer.param_groups, strict=True)
    ]
    optimizer.load_state_dict({**saved, "param_groups": groups})
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if value.shape == parameter.shape and value.stride() != parameter.stride():
                state[name] = torch.empty_like(parameter, dtype=value.dtype, requires_grad=False).copy_(value)


def mean_update(updates: Sequence[Update]) -> Update:
    """One update that says of several micro-batches what one says of itself."""

    def mean(group: str) -> dict[str, Tensor]:
        members = [getattr(update, group) for update in updates]
        return {
            name: torch.stack([torch.as_tensor(member[name]).detach() for member in members]).mean()
            for name in members[0]
        }

    return Update(updates[0].optimizer, mean("losses"), mean("stats"))


def split_batch(batch: Batch, number: int) -> list[Batch]:
    """A batch in `number` equal parts, in order."""
    if number == 1:
        return [batch]
    size = len(batch.keys) // number

    def rows(value: Any, part: slice) -> Any:
        if isinstance(value, list) and value and isinstance(value[0], Tensor):  # images of several sizes
            return [scale[part] for scale in value]
        return value[part]

    slices = [slice(n * size, (n + 1) * size) for n in range(number)]
    return [type(batch)(*(rows(value, part) for value in batch)) for part in slices]


def check_accumulation(batch_size: int, num_processes: int, accumulate: int) -> None:
    """Raises ConfigError where the batch cannot be cut into micro-batches of at least two images."""
    share = num_processes * accumulate
    if batch_size % share or batch_size // share < 2:
        raise ConfigError(
            f"TRAIN.ACCUMULATE: a batch of {batch_size} for {num_processes} process(es) cannot be cut into {accumulate} "
            f"equal parts of at least 2 images; change it or TRAIN.BATCH_SIZE"
        )


def use_channels_last(networks: Mapping[str, nn.Module]) -> None:
    """Store images' channels together, as GPUs in bf16 want them. Call it before copies and optimizers are made."""
    for network in networks.values():
        network.to(memory_format=torch.channels_last)


def compile_networks(networks: Mapping[str, nn.Module]) -> None:
    """Let torch.compile fuse what it can: all networks but text encoders, whose packed sequences it cannot follow,
    and a generator with checkpointed activations, whose kept batch statistics it cannot.

    A gradient penalty runs uncompiled (models.modes.full_precision), as compilers cannot differentiate twice.
    """
    for part, network in networks.items():
        recomputed = any(isinstance(vars(module).get("forward"), _Recomputed) for module in network.modules())
        if part == "text_encoder" or recomputed:
            continue
        found = set()
        for module in network.modules():  # AttnGAN's are in the stages
            for name in COMPILED_METHODS:
                if callable(getattr(module, name, None)):
                    found.add(name)
                    setattr(module, name, torch.compile(getattr(module, name)))
        if "features" not in found:  # else forward is nothing beside these
            network.compile()


def checkpoint_activations(generator: nn.Module) -> int:
    """Keep only what goes into each of G's blocks and compute the rest again in the backward pass: less memory, a third
    more time for G, the same gradients. Returns how many blocks that is.

    Blocks are what a ModuleList of the generator holds. Raises ConfigError where it has none.
    """
    blocks = [
        block for part in generator.children() if isinstance(part, nn.ModuleList) for block in part
    ]  # fmt: skip
    if not blocks:
        raise ConfigError("TRAIN.ACTIVATION_CHECKPOINTING: this generator has no blocks to compute again; leave it off")
    for block in blocks:
        block.forward = _Recomputed(block)
    return len(blocks)


class _Recomputed:
    """A block's forward whose insides are not kept."""

    def __init__(self, block: nn.Module):
        self.block = block

    def __call__(self, *inputs: Any, **options: Any) -> Any:
        forward = functools.partial(type(self.block).forward, self.block, **options)
        if not torch.is_grad_enabled():
            return forward(*inputs)
        return checkpoint(forward, *inputs, use_reentrant=False, context_fn=lambda: (nullcontext(), self._again()))

    def __deepcopy__(self, memo: dict) -> "_Recomputed":
        return _Recomputed(copy.deepcopy(self.block, memo))

    @contextmanager
    def _again(self) -> Iterator[None]:
        """Batch norm must not count a batch twice: it writes into copies of its statistics while a block runs again."""
        norms = [part for part in self.block.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)]
        kept = [(part, dict(part._buffers)) for part in norms]
        for part, buffers in kept:
            part._buffers.update({name: None if value is None else value.clone() for name, value in buffers.items()})
        try:
            yield
        finally:
            for part, buffers in kept:
                part._buffers.update(buffers)
