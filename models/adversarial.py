"""What the systems' objectives share: an Adam for G and one for D, encoders at rest, what the log says of logits."""

from collections.abc import Mapping

from torch import Tensor, nn

ENCODERS = ("text_encoder", "image_encoder")


class AdversarialSystem:
    """A generator against a discriminator, each with an Adam of its own.

    networks: by part, see models.types.System; encoders among them stay as they are.
    """

    def __init__(
        self,
        networks: dict[str, nn.Module],
        generator_lr: float,
        discriminator_lr: float,
        betas: tuple[float, float],
    ):
        self.networks = networks
        self.image_sizes = [networks["generator"].image_size]
        self.generator_lr, self.discriminator_lr, self.betas = generator_lr, discriminator_lr, tuple(betas)

    def optimizers(self) -> dict[str, tuple[list[nn.Parameter], float, tuple[float, float]]]:
        """{name: (parameters, learning rate, betas)} of D and G."""
        generator, discriminator = self.networks["generator"], self.networks["discriminator"]
        return {
            "discriminator": (list(discriminator.parameters()), self.discriminator_lr, self.betas),
            "generator": (list(generator.parameters()), self.generator_lr, self.betas),
        }

    def train(self) -> None:
        """Put what is trained into training mode, the encoders into eval mode without gradients."""
        for part, network in self.networks.items():
            network.train(part not in ENCODERS)
            network.requires_grad_(part not in ENCODERS)

    def encoders(self) -> list[nn.Module]:
        """Those that are there."""
        return [self.networks[part] for part in ENCODERS if part in self.networks]


def logit_stats(logits: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """{kind of pair: D's logits (N,)} -> their means, and the means of their signs, for the log."""
    values = {name: value.detach().float() for name, value in logits.items()}
    stats = {f"{name}_logits": value.mean() for name, value in values.items()}
    return stats | {f"{name}_sign": value.sign().mean() for name, value in values.items()}
