"""What the systems' objectives share: optimizers of G and D, inputs of D, steps of the projected D, DAMSM's loss, the log."""

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from miscc.augment import Augmentation, augmentation
from miscc.batch import Batch
from miscc.errors import ConfigError
from miscc.losses import hinge_discriminator_loss, hinge_generator_loss, lecam_loss, mode_seeking_loss
from models.damsm import matching_losses
from models.projected import ProjectedDiscriminator
from models.settings import AdversarialSettings
from models.small_data import AugmentationControl, LogitAverages
from models.types import Discriminator, ImageEncoder, OptimizerSpec, System, TextFeatures, Update

ENCODERS = ("text_encoder", "image_encoder")
DISCRIMINATORS = ("discriminator", "projected")  # the paper's, and the one on frozen features: either or both


class Seen(NamedTuple):
    """Inputs of the discriminators in one training step, real and fake with the same augmentation.

    real: images (N, 3, H, W).
    fake: images (N, 3, H, W), with G's graph.
    projected: frozen features of the fake images, fine to coarse, with G's graph; None where no projected D takes part.
    """

    real: Tensor
    fake: Tensor
    projected: list[Tensor] | None


class AdversarialSystem(System):
    """A generator against one or two discriminators, each with an Adam of its own.

    networks: by part, see models.types.System; the encoders among them are not trained.
    lecam: averages of logits, where TRAIN.LECAM asks for them.
    ada: controls how many images are augmented, where TRAIN.ADA asks for it.

    Raises ConfigError for settings that do not go together.
    """

    Settings: ClassVar[type[Any]] = AdversarialSettings

    def __init__(self, networks: dict[str, Any], **arguments: Any):
        super().__init__(networks, **arguments)
        settings, self.lecam, self.ada = self.settings, None, None
        if len(self.discriminators()) > 1:
            check_joining(settings)
        if settings.lecam_weight:
            self.lecam = LogitAverages(self.logit_pairs(), settings.lecam_warmup)
        if settings.ada_target:
            self.ada = AugmentationControl(settings.ada_target, settings.ada_images)

    @property
    def image_encoder(self) -> ImageEncoder:
        return self.networks["image_encoder"]

    @property
    def discriminator(self) -> Discriminator:
        return self.networks["discriminator"]

    @property
    def projected(self) -> ProjectedDiscriminator:
        return self.networks["projected"]

    @classmethod
    def parts(cls, settings: Any) -> list[str]:
        absent = {"paper": "projected", "projected": "discriminator"}.get(settings.discriminator)
        return [part for part in cls.NETWORKS if part != absent]

    def optimizers(self) -> dict[str, OptimizerSpec]:
        """The optimizers of the discriminators and G."""
        rates = {part: self.settings.discriminator_lr for part in DISCRIMINATORS if part in self.networks}
        rates["generator"] = self.settings.generator_lr
        return {
            part: OptimizerSpec(list(self.networks[part].parameters()), rate, self.settings.betas)
            for part, rate in rates.items()
        }

    def train(self) -> None:
        """Put the trained networks in training mode, the encoders in eval mode without gradients."""
        for part, network in self.networks.items():
            network.train(part not in ENCODERS)
            network.requires_grad_(part not in ENCODERS)

    def encoders(self) -> list[nn.Module]:
        """The encoders of this run."""
        return [self.networks[part] for part in ENCODERS if part in self.networks]

    def discriminators(self) -> list[nn.Module]:
        """The discriminators of this run."""
        return [self.networks[part] for part in DISCRIMINATORS if part in self.networks]

    @property
    def paper_takes_part(self) -> bool:
        """Whether the paper's discriminator trains, and is in G's loss, at this point of the training."""
        joins = self.settings.steps_alone if "projected" in self.networks else 0
        return "discriminator" in self.networks and self.step >= joins

    @property
    def projected_takes_part(self) -> bool:
        """Whether the projected discriminator trains, and is in G's loss, at this point of the training."""
        joins = self.settings.projected_joins if "discriminator" in self.networks else 0
        return "projected" in self.networks and self.step >= joins

    @property
    def fullest_step(self) -> int:
        # Both discriminators, and the penalty, which comes every so many steps.
        joined = max(self.settings.steps_alone, self.settings.projected_joins)
        every = getattr(self.settings, "penalty_every", 1)
        return every * -(-joined // every)

    def logit_pairs(self) -> dict[str, tuple[str, str]]:
        kinds = {"discriminator": ("real", "fake"), "projected": ("projected_real", "projected_fake")}
        return {part: pair for part, pair in kinds.items() if part in self.networks}

    def keys_in_use(self) -> set[str]:
        settings = self.settings
        used = {
            "GAN.DISCRIMINATOR": len(self.discriminators()) == len(DISCRIMINATORS),
            "TRAIN.DIVERSITY": settings.diversity_weight > 0,
            "TRAIN.AUGMENT": bool(settings.augment_kinds),
        }
        return {key for key, is_used in used.items() if is_used}

    def remarks(self, last_step: int) -> list[str]:
        # Discriminators that join later: there must be two, and time for the second.
        lines = []
        for key, name, joins in (
            ("STEPS_ALONE", "the paper's", self.settings.steps_alone),
            ("JOINS", "the projected", self.settings.projected_joins),
        ):
            if joins and len(self.discriminators()) == 1:
                lines.append(f"GAN.PROJECTED.{key}: {joins} has no effect, as GAN.DISCRIMINATOR is not both")
            elif joins >= last_step > 0:
                end = f"the training ends at step {last_step}"
                lines.append(f"GAN.PROJECTED.{key}: {name} discriminator never joins, as {end}")
        return lines

    # -- state ---------------------------------------------------------------------------------------------------

    @property
    def observed(self) -> list[str]:
        logits = [f"logits/{kind}" for kind in self.lecam.kinds] if self.lecam is not None else []
        return logits + ([self.controlling_sign] if self.ada is not None else [])

    @property
    def controlling_sign(self) -> str:
        """Name in the log of the mean sign that ADA follows: the paper's D's (of its last stage), else the projected D's."""
        return "sign/real" if "discriminator" in self.networks else "sign/projected_real"

    def observe(self, stats: Mapping[str, Tensor], batch_size: int) -> None:
        if self.lecam is not None:
            self.lecam.update(stats)
        if self.ada is not None:
            self.ada.update(stats[self.controlling_sign], batch_size)

    def state(self) -> dict[str, float]:
        parts = [part for part in (self.lecam, self.ada) if part is not None]
        return {name: number for part in parts for name, number in part.state().items()}

    def restore(self, state: Mapping[str, Any]) -> None:
        device = next(self.generator.parameters()).device
        for part in (self.lecam, self.ada):
            if part is not None:
                part.restore(state, device)

    # -- parts of the updates ------------------------------------------------------------------------------------

    def augmentation_of(self, batch: Batch) -> Augmentation:
        """This step's augmentation of what D sees: one draw for each pair, for its real and its fake image of any size."""
        draw = (self.seed, self.step, batch.indices.tolist())
        return augmentation(self.settings.augment_kinds, *draw, self.ada.p if self.ada is not None else None)

    def seen(self, batch: Batch, fake_images: Tensor) -> Seen:
        """Inputs of the discriminators: the batch's images and G's, (N, 3, H, W) in [-1, 1], augmented."""
        augment = self.augmentation_of(batch)
        real, fake = augment(batch.single_size), augment(fake_images)

        # Frozen features do not change between D's step and G's: one forward pass serves both.
        projected = self.projected.project(fake) if self.projected_takes_part else None
        return Seen(real, fake, projected)

    def projected_updates(self, seen: Seen, sentence: Tensor) -> Iterator[Update]:
        """The step of the projected discriminator, if it takes part: hinge over all heads' logits; sentence (N, D)."""
        if seen.projected is None:
            return

        # Features of real images, and of fake ones without G's graph.
        network = self.projected
        with torch.no_grad():
            projected_real = network.project(seen.real)
        real = network.features(projected_real)
        fake = network.features([scale.detach() for scale in seen.projected])

        # Real pairs up; fake images and wrong captions down.
        logits = {
            "projected_real": network.logits(real, sentence),
            "projected_fake": network.logits(fake, sentence),
            # Mismatched pairs: each real image with the caption of the next one, the last with the first's.
            "projected_mismatched": network.logits(real, sentence.roll(-1, dims=0)),
        }
        losses = {"projected_hinge": hinge_discriminator_loss(*logits.values())}
        losses |= self.lecam_losses("projected", logits["projected_real"], logits["projected_fake"])
        yield Update("projected", losses, logit_stats(logits))

    def lecam_losses(self, discriminator: str, real_logits: Tensor, fake_logits: Tensor) -> dict[str, Tensor]:
        """{"lecam"} or {"projected_lecam"}, weighted, where TRAIN.LECAM asks for it and its averages are warmed up.

        discriminator: of `logit_pairs`.
        """
        averages = self.lecam.of(discriminator) if self.lecam is not None else None
        if averages is None:
            return {}
        name = "projected_lecam" if discriminator == "projected" else "lecam"
        return {name: self.settings.lecam_weight * lecam_loss(real_logits, fake_logits, *averages)}

    def augmentation_stats(self) -> dict[str, Tensor]:
        """{"augment/p"} for the log: the share of images that this step augments, where TRAIN.ADA controls it."""
        return {"augment/p": self.ada.p} if self.ada is not None else {}

    def adversarial_losses(self, seen: Seen, sentence: Tensor) -> dict[str, Tensor]:
        """The discriminators' part of G's loss: {"adversarial", "projected_adversarial"}, one for each discriminator."""
        losses = {}
        if self.paper_takes_part:
            losses["adversarial"] = hinge_generator_loss(self.discriminator(seen.fake, sentence))

        if seen.projected is not None:
            network = self.projected
            logits = network.logits(network.features(seen.projected), sentence)
            losses["projected_adversarial"] = self.settings.projected_weight * hinge_generator_loss(logits)

        return losses

    def diversity_losses(self, fake_images: Tensor, noise: Tensor, text: TextFeatures) -> dict[str, Tensor]:
        """{"diversity"}, weighted, where TRAIN.DIVERSITY asks for it: half of the captions are drawn from other noise, too.

        fake_images: (N, 3, H, W), drawn from noise (N, Z) and the text, with G's graph.
        """
        weight = self.settings.diversity_weight
        if not weight:
            return {}

        # Other noise: that of the next caption. At least two captions: batch norm cannot train on one.
        half = slice(0, max(2, len(noise) // 2))
        other_noise = noise.roll(-1, dims=0)[half]
        others = self.networks["generator"](other_noise, text.select(half)).images[-1]
        return {"diversity": weight * mode_seeking_loss(fake_images[half], others, noise[half], other_noise)}

    def damsm_losses(self, images: Tensor, text: TextFeatures, batch: Batch) -> dict[str, Tensor]:
        """DAMSM losses of images (N, 3, H, W) in [-1, 1] and their captions: {"words", "sentence"}, not weighted."""
        return matching_losses(self.image_encoder, images, text, batch, **self.settings.matching)


def check_joining(settings: AdversarialSettings) -> None:
    """Raises ConfigError where one of both discriminators joins later, which does not go with other settings."""
    if settings.steps_alone and settings.projected_joins:
        raise ConfigError(
            "GAN.PROJECTED.JOINS: with STEPS_ALONE either discriminator would wait for the other; set one of the two to 0"
        )
    if (settings.steps_alone or settings.projected_joins) and (settings.lecam_weight or settings.ada_target):
        key = "STEPS_ALONE" if settings.steps_alone else "JOINS"
        raise ConfigError(
            f"GAN.PROJECTED.{key}: TRAIN.LECAM and TRAIN.ADA follow the logits of both discriminators from the first step on; "
            f"set it, or them, to 0"
        )


def logit_stats(logits: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """{kind of pair: D's logits, of any shape} -> {name in the log: mean of the logits, and mean of their signs}."""
    # Half precision, under autocast, would round the means.
    values = {name: value.detach().float() for name, value in logits.items()}
    stats = {f"logits/{name}": value.mean() for name, value in values.items()}
    return stats | {f"sign/{name}": value.sign().mean() for name, value in values.items()}
