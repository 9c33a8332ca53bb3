"""What the systems' objectives share: an Adam for G and one for D, frozen encoders, DAMSM's loss, logits in the log."""

from collections.abc import Mapping

from torch import Tensor, nn

from miscc.batch import Batch
from models.damsm import matching_losses
from models.types import OptimizerSpec, System, TextFeatures

ENCODERS = ("text_encoder", "image_encoder")


class AdversarialSystem(System):
    """A generator against a discriminator, each with an Adam of its own.

    networks: by part, see models.types.System; encoders among them stay as they are.
    """

    gammas: Mapping[str, float]  # DAMSM's γ1, γ2, γ3, of systems with that loss

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

    def optimizers(self) -> dict[str, OptimizerSpec]:
        """Those of D and G."""
        generator, discriminator = self.networks["generator"], self.networks["discriminator"]
        return {
            "discriminator": OptimizerSpec(list(discriminator.parameters()), self.discriminator_lr, self.betas),
            "generator": OptimizerSpec(list(generator.parameters()), self.generator_lr, self.betas),
        }

    def train(self) -> None:
        """Put what is trained into training mode, the encoders into eval mode without gradients."""
        for part, network in self.networks.items():
            network.train(part not in ENCODERS)
            network.requires_grad_(part not in ENCODERS)

    def encoders(self) -> list[nn.Module]:
        """Those that are there."""
        return [self.networks[part] for part in ENCODERS if part in self.networks]

    def damsm_losses(self, images: Tensor, text: TextFeatures, batch: Batch) -> dict[str, Tensor]:
        """How well images (N, 3, H, W) in [-1, 1] fit their captions: {"words", "sentence"}, without their weight."""
        return matching_losses(self.networks["image_encoder"], images, text, batch, **self.gammas)


def logit_stats(logits: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """{kind of pair: D's logits (N,)} -> their means, and the means of their signs, by their names in the log."""
    values = {name: value.detach().float() for name, value in logits.items()}
    stats = {f"logits/{name}": value.mean() for name, value in values.items()}
    return stats | {f"sign/{name}": value.sign().mean() for name, value in values.items()}
