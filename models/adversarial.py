"""What the systems' objectives share: an Adam for G and one for D, frozen encoders, DAMSM's loss, logits in the log."""

from collections.abc import Mapping

from torch import Tensor, nn

from miscc.batch import Batch
from models.damsm import matching_losses
from models.settings import AdversarialSettings
from models.types import OptimizerSpec, System, TextFeatures

ENCODERS = ("text_encoder", "image_encoder")


class AdversarialSystem(System):
    """A generator against a discriminator, each with an Adam of its own.

    networks: by part, see models.types.System; encoders among them stay as they are.
    """

    Settings = AdversarialSettings

    def optimizers(self) -> dict[str, OptimizerSpec]:
        """Those of D and G."""
        rates = {"discriminator": self.settings.discriminator_lr, "generator": self.settings.generator_lr}
        return {
            part: OptimizerSpec(list(self.networks[part].parameters()), rate, self.settings.betas)
            for part, rate in rates.items()
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
        return matching_losses(self.networks["image_encoder"], images, text, batch, **self.settings.gammas)


def logit_stats(logits: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """{kind of pair: D's logits (N,)} -> their means, and the means of their signs, by their names in the log."""
    values = {name: value.detach().float() for name, value in logits.items()}
    stats = {f"logits/{name}": value.mean() for name, value in values.items()}
    return stats | {f"sign/{name}": value.sign().mean() for name, value in values.items()}
