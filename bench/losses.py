"""How fast the losses are against their plain forms: `python -m bench.losses`. Values and gradients of both are compared.

DAMSM's word loss against a loop over the captions, lean and as the released programs lay their data out; MA-GP on a
discriminator against the same with stock operations; the hinge.
"""

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import common
from bench.reference import plain_copy, plain_word_loss, released_word_loss
from miscc.errors import run_command
from miscc.losses import hinge_discriminator_loss, matching_aware_gradient_penalty, word_loss
from models.layers import OneWayDiscriminator

GAMMAS = {"gamma1": 5.0, "gamma2": 5.0, "gamma3": 10.0}

Ways = dict[str, Callable[[], list[Tensor]]]  # "ours" and "plain": value and gradients, computed anew by each call


def word_ways(batch: int, plain: Callable, device: torch.device) -> Ways:
    """Forward and backward of the word loss on Inception's 17×17 regions and captions of 9 to 18 words."""
    # Sizes of a training on CUB; only the regions take a gradient, as in G's step.
    regions = torch.randn(batch, 256, 17, 17, device=device, requires_grad=True)
    words = torch.randn(batch, 256, 18, device=device)
    lengths, class_ids = torch.randint(9, 19, (batch,)), torch.arange(batch, device=device) % 200

    def way(loss: Callable) -> Callable[[], list[Tensor]]:
        def run() -> list[Tensor]:
            image_to_text, text_to_image = loss(regions, words, lengths, class_ids, **GAMMAS)
            value = image_to_text + text_to_image
            return [value.detach(), *torch.autograd.grad(value, regions)]

        return run

    # Both from the same tensors.
    return {"ours": way(word_loss), "plain": way(plain)}


def penalty_ways(batch: int, image_size: int, nf: int, device: torch.device) -> Ways:
    """MA-GP with its double backward."""
    ours = OneWayDiscriminator(nf, image_size)

    # Open gates: at their initial zero the blocks would add nothing.
    for gate in ours.gates():
        torch.nn.init.constant_(gate, 0.1)
    networks = {"ours": ours.to(device), "plain": plain_copy(copy.deepcopy(ours)).to(device)}

    # The same pairs for both; biases have no gradient in a penalty.
    images = torch.rand(batch, 3, image_size, image_size, device=device) * 2 - 1
    sentence = torch.randn(batch, 256, device=device)

    def way(network: OneWayDiscriminator) -> Callable[[], list[Tensor]]:
        parameters = [p for name, p in network.named_parameters() if "bias" not in name]

        def run() -> list[Tensor]:
            x, s = images.requires_grad_(), sentence.requires_grad_()
            value = matching_aware_gradient_penalty(network(x, s), x, s)
            gradients = torch.autograd.grad(value, parameters, allow_unused=True)
            return [value.detach(), *(gradient for gradient in gradients if gradient is not None)]

        return run

    return {name: way(network) for name, network in networks.items()}


def hinge_ways(batch: int, device: torch.device) -> Ways:
    """The hinge on logits: a matter of launches alone."""
    logits = [torch.randn(n, device=device, requires_grad=True) for n in (batch, batch, batch - 1)]

    def plain(real: Tensor, fake: Tensor, mismatched: Tensor) -> Tensor:
        return F.relu(1.0 - real).mean() + (F.relu(1.0 + fake).mean() + F.relu(1.0 + mismatched).mean()) / 2.0

    def way(loss: Callable) -> Callable[[], list[Tensor]]:
        def run() -> list[Tensor]:
            value = loss(*logits)
            return [value.detach(), *torch.autograd.grad(value, logits)]

        return run

    return {"ours": way(hinge_discriminator_loss), "plain": way(plain)}


def compare(ways: Ways, rounds: int, device: torch.device) -> dict:
    """Times of both ways, their ratio, and how far value and gradients are apart, relative to the largest of each."""
    # First that both compute the same.
    differences = []
    for a, b in zip(ways["ours"](), ways["plain"](), strict=True):
        differences.append(float((a - b).abs().max() / b.abs().max().clamp_min(1e-30)))

    # Then their times.
    runs = common.take_turns(ways, rounds, 2, device)
    return {
        "seconds": {name: common.summary(values) for name, values in runs.items()},
        "runs": runs,
        "ratio": common.ratio(runs["plain"], runs["ours"]),
        "difference": {"value": differences[0], "gradient": max(differences[1:])},
    }


def main(arguments: list[str] | None = None) -> None:
    parser = common.parser(__doc__.splitlines()[0])
    parser.add_argument("--image-size", type=int, default=64, help="of the discriminator under the penalty")
    parser.add_argument("--nf", type=int, default=16)
    parser.add_argument(
        "--batch-size", "--batch", dest="batch", type=int, default=24, help="of the penalty and the hinge"
    )
    options = parser.parse_args(arguments)
    device = common.start(options)

    # Every loss with its plain form.
    torch.manual_seed(0)
    penalty = f"MA-GP, {options.image_size} px, nf {options.nf}, batch {options.batch}"
    cases = {
        **{
            f"word loss, batch {batch}, against {plain}": word_ways(batch, loss, device)
            for batch in (24, 48)
            for plain, loss in {"a lean loop": plain_word_loss, "the released layout": released_word_loss}.items()
        },
        penalty: penalty_ways(options.batch, options.image_size, options.nf, device),
        f"hinge, batch {options.batch}": hinge_ways(options.batch, device),
    }

    # Differences and times of each.
    settings = {name: value for name, value in vars(options).items() if name not in ("json", "name")}
    found = {name: compare(ways, options.rounds, device) for name, ways in cases.items()}
    results = {"machine": common.machine(device), "settings": settings, "losses": found}

    # As a table.
    rows = []
    for name, row in found.items():
        seconds, apart = row["seconds"], row["difference"]
        rows.append([name, *(f"{seconds[way]['median'] * 1e3:.2f}" for way in ("ours", "plain")),
                     f"**×{row['ratio']['of_medians']:.2f}**", f"{apart['value']:.0e}, {apart['gradient']:.0e}"])  # fmt: skip
    text = (
        f"# Losses with their backward pass\n\n{common.machine_line(results['machine'])}. {options.rounds} rounds, taking "
        f"turns; medians.\n\n"
    )
    header = ["loss", "ms", "plain, ms", "ratio", "relative difference of value, gradient"]
    common.report(options, results, text + common.markdown_table(header, rows))


if __name__ == "__main__":
    run_command(main)
