"""The systems side by side: `python -m bench.systems`: parameters, operations an image, memory, images a second.

A file of settings a system (default: cfg/toybirds_*.yml), each with fresh weights and random images: what a training
step and a drawn image cost. Steps take turns, so that a busy machine slows all of them. `--each KEY VALUE ...` compares
values of one key, e.g. `--cfg cfg/toybirds_ssa.yml --each GAN.DISCRIMINATOR paper projected both`.
"""

from collections.abc import Mapping
from pathlib import Path

import torch

from bench import common
from bench.train_step import DAMSM_ENCODERS, Step, step_of
from miscc.config import Config
from miscc.errors import ConfigError, run_command
from models.modes import eval_mode
from models.registry import count_parameters
from training.settings import load_config


class Drawing:
    """Drawing one batch: captions to images, as sampling does it."""

    def __init__(self, step: Step):
        self.step = step

    def __call__(self) -> None:
        networks, batch = self.step.system.networks, self.step.batch
        generator, text_encoder = networks["generator"], networks["text_encoder"]
        with eval_mode(generator, text_encoder), torch.no_grad():  # inference_mode hides its operations from the count
            generator(self.step.noise, text_encoder(batch.captions, batch.lengths))


def measure(configs: Mapping[str, Config], encoder: str, batch_size: int, rounds: int, device: torch.device) -> dict:
    """{name: figures} of every configuration: seconds, operations and bytes of a step, seconds of drawing a batch."""
    # Each step, and drawing by its networks.
    steps = {name: step_of(cfg, encoder, batch_size, device) for name, cfg in configs.items()}
    drawings = {name: Drawing(step) for name, step in steps.items()}
    trained = common.take_turns(steps, rounds, 2, device)
    drawn = common.take_turns(drawings, rounds, 1, device)

    # What each takes, and how large it is.
    results = {}
    for name, step in steps.items():
        networks = step.system.networks
        results[name] = {
            "system": configs[name].GAN.NAME,
            "image_size": networks["generator"].image_size,
            "parameters": {part: count_parameters(network) for part, network in networks.items()},
            "flops_per_image": {
                "training": common.count_flops(step) / batch_size,
                "drawing": common.count_flops(drawings[name]) / batch_size,
            },
            "peak_bytes": common.peak_bytes(step, device),
            "images_per_second": {
                "training": batch_size / common.summary(trained[name])["median"],
                "drawing": batch_size / common.summary(drawn[name])["median"],
            },
            "spread": common.summary(trained[name])["spread"],
        }
    return results


def table(results: dict) -> str:
    """The results as Markdown."""
    lines = [
        "# The systems side by side",
        "",
        f"{common.machine_line(results['machine'])}. Batch {results['batch']}, image encoder {results['encoder']} for those "
        f"that have one, float32 unless a file says otherwise, medians of {results['rounds']} rounds in turns; operations: 2 a "
        "multiply-add.",
        "",
    ]
    if results["set"]:
        pairs = ", ".join(f"`{key} {value}`" for key, value in results["set"])
        lines[-1:] = [f"Beside the files: {pairs}.", ""]

    # A row a system.
    header = ["settings", "px", "G, M", "D and others, M", "GFLOP an image: step", "drawing", "peak, MiB",
              "images/s: training", "drawing"]  # fmt: skip
    rows = []
    for name, found in results["systems"].items():
        # Encoders are counted apart: they are not the system's own.
        parameters, flops, speed = (found[key] for key in ("parameters", "flops_per_image", "images_per_second"))
        encoders = ("generator", "text_encoder", "image_encoder")
        others = sum(count for part, count in parameters.items() if part not in encoders)
        peak = "?" if found["peak_bytes"] is None else f"{found['peak_bytes'] / 2**20:.0f}"
        rows.append([
            name, found["image_size"], f"{parameters['generator'] / 1e6:.2f}", f"{others / 1e6:.2f}",
            f"{flops['training'] / 1e9:.2f}", f"{flops['drawing'] / 1e9:.3f}", peak,
            f"{speed['training']:.1f}", f"{speed['drawing']:.0f}",
        ])  # fmt: skip
    return "\n".join(lines) + "\n" + common.markdown_table(header, rows)


def main(arguments: list[str] | None = None) -> None:
    parser = common.parser(__doc__.splitlines()[0])
    parser.add_argument("--cfg", nargs="+", metavar="FILE", help="settings to compare (default: cfg/toybirds_*.yml)")
    parser.add_argument("--batch-size", "--batch", dest="batch", type=int, default=24)
    parser.add_argument("--encoder", default="small", choices=sorted(DAMSM_ENCODERS))
    parser.add_argument(
        "--set", nargs=2, action="append", default=[], metavar=("KEY", "VALUE"), help="any setting; may be repeated"
    )
    parser.add_argument(
        "--each", nargs="+", metavar=("KEY", "VALUE"), help="each file with each of these values of a key"
    )
    options = parser.parse_args(arguments)
    if options.each and len(options.each) < 2:
        parser.error("--each: a key and its values, e.g. --each GAN.DISCRIMINATOR paper projected both")

    # Which settings are compared.
    paths = options.cfg or sorted(Path("cfg").glob("toybirds_*.yml"))
    if not paths:
        raise ConfigError("there is no cfg/toybirds_*.yml here; start this in the project's folder, or give --cfg")
    key, *values = options.each or ("",)
    configs = {}
    for path in paths:
        name = Path(path).stem
        variants = {f"{name}, {value}": [(key, value)] for value in values} or {name: []}
        for variant, changed in variants.items():
            configs[variant] = load_config(path, [*map(tuple, options.set), *changed])

    # All of them in one process, so that they can take turns.
    device = common.start(options)
    results = {
        "machine": common.machine(device),
        "batch": options.batch,
        "encoder": options.encoder,
        "rounds": options.rounds,
        "set": options.set,
        "systems": measure(configs, options.encoder, options.batch, options.rounds, device),
    }
    common.report(options, results, table(results))


if __name__ == "__main__":
    run_command(main)
