"""How long a training step takes and where: `python -m bench.train_step --image-size 64 --nf 16 --batch-size 24 --reference`.

Any system of models.SYSTEMS, by its updates, on random images and fresh weights. --reference: also the plain form of
bench/reference.py, in the same process and taking turns; the ratio is the figure that counts.
"""

import argparse
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from bench import common
from bench.common import Clock
from bench.reference import plain_system
from bench.reference_galip import plain_galip
from miscc.batch import Batch
from miscc.config import Config
from miscc.distributed import World
from miscc.errors import ConfigError, run_command
from models import IMAGE_ENCODERS, SYSTEMS, TEXT_ENCODERS
from models.adversarial import AdversarialSystem
from models.choice import chosen_system, keys_of, system_parts
from models.clip_features import ClipImageEncoder, ClipTextEncoder, untrained_clip
from models.damsm import SmallImageEncoder
from models.types import Generator, Network, System, TextFeatures, Update
from training.build import build_networks, build_system
from training.compute import checkpoint_activations, compile_networks, use_channels_last
from training.ema import EMA
from training.settings import load_config
from training.step import PhaseHook, Stepper, make_optimizers

# The image encoders of DAMSM's loss; systems of another kind bring their own.
DAMSM_ENCODERS = [name for name, kind in IMAGE_ENCODERS.items() if kind is not ClipImageEncoder]
NUM_WORDS, NUM_CLASSES = 5450, 200  # CUB's
LONGEST = 20  # tokens of a caption, also where an encoder would take more
AFTERWARDS = "optimizers, average"  # the phase after all passes
# The systems that have a plain form, each with the function that makes it.
REFERENCES: dict[str, Callable[[Any], System]] = {"ssa_gan": plain_system, "galip": plain_galip}
OURS_ALONE = ("TRAIN.PRECISION", "TRAIN.COMPILE", "TRAIN.CHANNELS_LAST", "TRAIN.ACTIVATION_CHECKPOINTING")


class Step:
    """The trainer's own step (training/step.py) on one batch, then the average.

    compiled: whether networks are, so that it cannot be cut into phases.
    """

    def __init__(
        self,
        system: System,
        device: torch.device,
        batch: Batch,
        noise: Tensor,
        precision: str = "tf32",
        stock_adam: bool = False,
    ):
        self.system, self.device, self.batch, self.noise = system, device, batch, noise

        # The trainer's Adam, or torch's own as the originals have it.
        optimizers = make_optimizers(system.optimizers())
        if stock_adam:
            optimizers = {
                name: torch.optim.Adam(parameters, lr=lr, betas=betas)
                for name, (parameters, lr, betas) in system.optimizers().items()
            }

        # What the trainer does in a step, and all of it.
        system.step = system.fullest_step
        self.stepper = Stepper(system.updates, optimizers, World(0, 1, device), precision)
        self.average = EMA(system.networks["generator"], 0.999)
        self.compiled = False

    def __call__(self, clock: Callable[[str], None] | None = None) -> None:
        """Run it; `clock(phase)` is called at the end of each phase."""
        for _ in self.stepper.steps(self.batch, self.noise, phase_hook(clock) if clock else None):
            pass
        self.average.update(self.system.networks["generator"])
        if clock:
            clock(AFTERWARDS)

    def phases(self) -> dict[str, float]:
        """Seconds of each phase of one step; none of a compiled one, where hooks would cut up what is compiled."""
        if self.compiled:
            return {}
        clock = Clock(self.device)
        with watched(self.system, clock):
            self(clock)
        return clock.phases


def phase_hook(clock: Callable[[str], None]) -> PhaseHook:
    """What the stepper calls at the end of each phase, so that the clock is given the table's name for it."""

    def on_phase(update: Update, phase: str) -> None:
        clock(phase_name(update, phase))

    return on_phase


def phase_name(update: Update, phase: str) -> str:
    """What the table calls a phase of the stepper."""
    if phase == "step":
        return AFTERWARDS
    if (update.kind, phase) == ("generator", "backward"):
        return "G backward"  # what comes before it has a name of its own, see `watched`
    part = {"discriminator": "D", "generator": "D for G"}.get(update.kind, update.kind)
    return f"{part} {phase}"


@contextmanager
def watched(system: System, clock: Clock) -> Iterator[None]:
    """The clock also tells the networks' own forward passes and G's backward pass apart, and DAMSM where it is one."""
    names = {"text_encoder": "text encoder", "generator": "G forward", "image_encoder": "DAMSM forward"}
    handles, drawn = [], []

    def ends(name: str) -> Callable:
        def hook(module: nn.Module, inputs: tuple, output: Any = None) -> None:
            clock(names[name])
            if name == "generator":
                drawn.append(True)
                images = output.images[-1]
                if images.requires_grad:
                    # By now the gradient has come through D and DAMSM; what is left is G's own.
                    images.register_hook(lambda gradient: clock("D and DAMSM backward for G"))

        return hook

    def begins(module: nn.Module, inputs: tuple) -> None:
        clock("D for G forward" if drawn else "other")

    # Forward passes by hooks.
    for name, network in system.networks.items():
        if name in names:
            handles.append(network.register_forward_pre_hook(begins))
            handles.append(network.register_forward_hook(ends(name)))

    # DAMSM's losses, which are no module.
    if isinstance(system, AdversarialSystem):
        damsm_losses = system.damsm_losses

        def timed(images: Tensor, text: TextFeatures, batch: Batch) -> dict[str, Tensor]:
            clock("D for G forward" if drawn else "other")
            losses = damsm_losses(images, text, batch)
            clock("DAMSM forward")
            return losses

        system.damsm_losses = timed
    try:
        yield
    finally:
        vars(system).pop("damsm_losses", None)
        for handle in handles:
            handle.remove()


def build(options: argparse.Namespace, device: torch.device, changed: list[tuple[str, str]]) -> Step:
    """Fresh networks, random images and captions, the objective, as the options say."""
    keys = keys_of(system_parts(options.system))
    widths = [key for key in ("TRAIN.NF", "GAN.GF_DIM", "GAN.DF_DIM") if key in keys]
    # A system of stages starts at a quarter of the size: three stages.
    stages = [("TREE.BRANCH_NUM", "3")] if "TREE.BRANCH_NUM" in keys else []
    first_size = options.image_size // 4 if stages else options.image_size

    # By settings, as a training would be.
    changes = [("GAN.NAME", options.system), ("TREE.BASE_SIZE", str(first_size)), *stages]
    changes += [(key, str(options.nf)) for key in widths]
    with tempfile.TemporaryDirectory() as folder:
        empty = Path(folder) / "bench.yml"
        empty.write_text("")
        cfg = load_config(empty, [*changes, *changed])
    return step_of(cfg, options.encoder, options.batch, device)


def step_of(cfg: Config, encoder: str, batch_size: int, device: torch.device) -> Step:
    """A step of the system that the settings describe, with fresh networks and random images and captions.

    encoder: name of the image encoder; small ones read images of the last stage's size.
    """
    # Fresh networks, the same for the same settings.
    torch.manual_seed(0)
    chosen = chosen_system(cfg)
    networks = build_networks(chosen)
    generator = cast(Generator, networks["generator"])
    networks |= FRESH_ENCODERS[cfg.TEXT.ENCODER](cfg, encoder, generator.image_size)
    for network in networks.values():
        for gate in network.gates():  # zero at the start, where denormal gradients would make a CPU slow
            nn.init.constant_(gate, 0.1)

    # The objective on a random batch.
    system = build_system(chosen, {name: network.to(device) for name, network in networks.items()})
    system.train()
    batch = random_batch(batch_size, system.image_sizes, min(cfg.TEXT.WORDS_NUM, LONGEST), device)

    # Layout, checkpointing and compilation, as the trainer sets them up.
    if cfg.TRAIN.ACCUMULATE > 1:
        raise ConfigError("TRAIN.ACCUMULATE: a single pass is timed here; leave it at 1")
    if getattr(system.settings, "penalty_every", 1) > 1:
        raise ConfigError("TRAIN.PENALTY_EVERY: every step here has its penalty; leave it at 1")
    if cfg.TRAIN.CHANNELS_LAST:
        use_channels_last(networks)
    noise = torch.randn(batch_size, generator.noise_dim, device=device)
    step = Step(system, device, batch, noise, cfg.TRAIN.PRECISION)
    if cfg.TRAIN.ACTIVATION_CHECKPOINTING:
        checkpoint_activations(generator)
    if cfg.TRAIN.COMPILE:
        compile_networks(networks)
    step.compiled = cfg.TRAIN.COMPILE
    return step


def fresh_damsm(cfg: Config, encoder: str, image_size: int) -> dict[str, Network]:
    """DAMSM's encoders without training; encoder: name of the image encoder."""
    text_dim = cfg.TEXT.EMBEDDING_DIM
    arguments = {"text_dim": text_dim} | (
        {"image_size": image_size} if issubclass(IMAGE_ENCODERS[encoder], SmallImageEncoder) else {}
    )
    return {
        "text_encoder": TEXT_ENCODERS["rnn"](NUM_WORDS, text_dim, max_words=cfg.TEXT.WORDS_NUM),
        "image_encoder": IMAGE_ENCODERS[encoder](**arguments),
    }


def fresh_clip(cfg: Config, encoder: str, image_size: int) -> dict[str, Network]:
    """CLIP's towers without training: the image tower of the settings' size, the text tower as it is in ViT-B/32."""
    text_dim = cfg.TEXT.EMBEDDING_DIM
    clip = untrained_clip(image_size, image_size // 7, cfg.CLIP.WIDTH, cfg.CLIP.BLOCKS, text_dim, NUM_WORDS)
    text_encoder = ClipTextEncoder(NUM_WORDS, text_dim=text_dim)

    # Small random weights, as a training of CLIP starts with.
    for parameter in text_encoder.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.02)
    return {"text_encoder": text_encoder, "image_encoder": clip.visual}


FRESH_ENCODERS = {"damsm": fresh_damsm, "clip": fresh_clip}


def random_batch(number: int, image_sizes: list[int], num_words: int, device: torch.device) -> Batch:
    """Random images and captions of random lengths, as the loader would hand them over."""
    images = [torch.rand(number, 3, size, size) * 2 - 1 for size in image_sizes]
    captions = torch.randint(1, NUM_WORDS - 1, (number, num_words))
    lengths = torch.randint(num_words // 2, num_words + 1, (number,))
    for row, length in enumerate(lengths.tolist()):  # CLIP's end token has the largest index; padding is 0
        captions[row, length - 1] = NUM_WORDS - 1
        captions[row, length:] = 0

    # One size is a tensor, several are a list.
    indices = torch.arange(number)
    one = images if len(images) > 1 else images[0]
    batch = Batch(one, captions, lengths, indices % NUM_CLASSES, [str(n) for n in range(number)], indices, indices)
    return batch.to(device)


def measure(options: argparse.Namespace, device: torch.device) -> dict:
    """Seconds of whole steps and of their phases, operations and memory, of ours and of the reference in turn."""
    steps = {"ours": build(options, device, options.set or [])}
    if options.reference:
        if options.system not in REFERENCES:
            raise ConfigError(f"--reference: there is no plain form of {options.system} (of: {', '.join(REFERENCES)})")
        ours = steps["ours"]
        # Eager, in the default layout, in float32 or, as far as ours may use it, TF32: how the originals run today.
        kept = [(key, value) for key, value in options.set or [] if key not in OURS_ALONE]
        plain = REFERENCES[options.system](build(options, device, kept).system)
        precision = "fp32" if ours.stepper.precision == "fp32" else "tf32"
        steps["reference"] = Step(plain, device, ours.batch, ours.noise, precision, stock_adam=True)

    # Whole steps, then their phases, which cost time to observe.
    wholes = common.take_turns(steps, options.rounds, options.warm_up, device)
    phases: dict[str, list[dict[str, float]]] = {name: [] for name in steps}
    for _ in range(options.rounds):
        for name, step in steps.items():
            phases[name].append(step.phases())

    # Operations and memory, of a single step each.
    results = {}
    for name, step in steps.items():
        names = list(phases[name][0])
        with torch.compiler.set_stance("force_eager"):  # a compiled pass hides its operations from the counter
            flops = common.count_flops(step)
        results[name] = {
            "seconds": common.summary(wholes[name]),
            "runs": wholes[name],
            "images_per_second": options.batch / common.summary(wholes[name])["median"],
            "phases": {phase: common.summary([run.get(phase, 0.0) for run in phases[name]]) for phase in names},
            "flops": flops,
            "flops_per_second": flops / common.summary(wholes[name])["median"],
            "peak_bytes": common.peak_bytes(step, device),
        }
    return results


def table(results: dict) -> str:
    """The results as Markdown."""
    ours, reference, settings = results["steps"]["ours"], results["steps"].get("reference"), results["settings"]
    changed = "".join(f", {key} {value}" for key, value in settings["set"] or [])
    compiled = " A compiled step is not cut into phases; its operations are those of the eager one."
    lines = [
        f"# Training step: {settings['system']}, {settings['image_size']} px, nf {settings['nf']}, batch "
        f"{settings['batch']}, image encoder {settings['encoder']}{changed}",
        "",
        f"{common.machine_line(results['machine'])}. {settings['rounds']} rounds, in each a step of every kind; medians, "
        f"± half the distance between the quarters.{'' if ours['phases'] else compiled}",
        "",
    ]

    # Phases in the order of the step.
    rows = []
    sides = [ours, reference] if reference else [ours]
    for phase in dict.fromkeys(name for side in sides for name in side["phases"]):
        rows.append([phase, *(_milliseconds(side["phases"].get(phase)) for side in sides), _times(sides, phase)])
    rows.append(["**whole step**", *(_milliseconds(side["seconds"]) for side in sides), _whole(results)])
    rows.append(["images/s", *(f"{side['images_per_second']:.2f}" for side in sides), ""])
    rows.append(["GFLOP", *(f"{side['flops'] / 1e9:.1f}" for side in sides), ""])
    for name, peak in results["peak_flops"].items():
        rows.append([f"of a {name} matrix product's rate, {peak / 1e12:.2f} TFLOP/s",
                     *(f"{side['flops_per_second'] / peak:.0%}" for side in sides), ""])  # fmt: skip
    if all(side["peak_bytes"] is not None for side in sides):
        rows.append(["peak memory, MiB", *(f"{side['peak_bytes'] / 2**20:.0f}" for side in sides), ""])
    header = ["phase", "ms", *(["reference, ms"] if reference else []), "ratio" if reference else ""]
    return "\n".join(lines) + "\n" + common.markdown_table(header, rows)


def _milliseconds(value: dict | None) -> str:
    return "" if value is None else f"{value['median'] * 1e3:.1f} ± {value['spread'] * value['median'] * 500:.1f}"


def _times(sides: list[dict], phase: str) -> str:
    both = [side["phases"].get(phase) for side in sides]
    return f"×{both[1]['median'] / both[0]['median']:.2f}" if len(both) == 2 and all(both) else ""


def _whole(results: dict) -> str:
    return f"**×{results['ratio']['of_medians']:.2f}**" if "ratio" in results else ""


def main(arguments: list[str] | None = None) -> None:
    parser = common.parser(__doc__.splitlines()[0])
    parser.add_argument("--system", default="ssa_gan", choices=sorted(SYSTEMS))
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--nf", type=int, default=16)
    parser.add_argument("--batch-size", "--batch", dest="batch", type=int, default=24)
    parser.add_argument("--encoder", default="small", choices=sorted(DAMSM_ENCODERS))
    parser.add_argument(
        "--set", nargs=2, action="append", metavar=("KEY", "VALUE"), help="any setting; may be repeated"
    )
    parser.add_argument("--warm-up", type=int, default=2, metavar="N", help="rounds before those that count")
    parser.add_argument("--reference", action="store_true", help="also the plain form, taking turns")
    options = parser.parse_args(arguments)

    # The step itself, or both forms in turns.
    device = common.start(options)
    settings = {name: value for name, value in vars(options).items() if name not in ("json", "name")}
    results = {"machine": common.machine(device), "settings": settings, "steps": measure(options, device)}

    # The device's peak, to set the rate in relation to.
    dtypes = {"float32": torch.float32} | ({"bfloat16": torch.bfloat16} if device.type == "cuda" else {})
    results["peak_flops"] = {name: common.peak_flops(device, dtype) for name, dtype in dtypes.items()}
    if options.reference:
        results["ratio"] = common.ratio(*(results["steps"][name]["runs"] for name in ("reference", "ours")))
    common.report(options, results, table(results))


if __name__ == "__main__":
    run_command(main)
