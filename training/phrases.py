"""The losses of phrases in the encoders' training: what datasets/phrases.py counts, learned by the head of models/phrases.py."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from datasets.phrases import Phrases
from datasets.records import Records
from miscc.batch import Batch
from miscc.errors import CheckpointError
from models.phrases import PhraseHead
from models.types import TextFeatures


class PhraseLosses:
    """Phrases of a training set, and the head that both encoders tell them by.

    weight: of the losses, > 0.
    text_dim: length of the encoders' codes and sentences.

    Raises DataError where no phrase tells the captions apart.
    """

    def __init__(self, records: Records, weight: float, text_dim: int, device: torch.device):
        self.weight, self.device = weight, device
        self.captions = records.captions
        self.phrases = Phrases(records.captions)
        rates = torch.from_numpy(self.phrases.image_rates), torch.from_numpy(self.phrases.caption_rates)
        self.head = PhraseHead(text_dim, *rates).to(device)

    def __call__(self, batch: Batch, text: TextFeatures, code: Tensor) -> dict[str, Tensor]:
        """{"image_phrases", "caption_phrases"}, weighted.

        code: (N, D) of the images.

        An image has the phrases of all its captions, not only of the batch's one.
        """
        # (N, P) each. A caption that was shortened, by words at random, has neighbours that were none in the whole one.
        read = [row[:length] for row, length in zip(batch.captions.tolist(), batch.lengths.tolist(), strict=True)]
        numbers = zip(batch.indices.tolist(), batch.caption_numbers.tolist(), strict=True)
        whole = [self.captions[index][number].tolist() for index, number in numbers]
        of_captions = torch.from_numpy(self.phrases.of_captions(read, whole)).to(self.device)
        of_images = torch.from_numpy(self.phrases.of_images(batch.indices.tolist())).to(self.device)

        losses = self.head.losses(code, text.sentence, of_images, of_captions)
        return {name: self.weight * loss for name, loss in losses.items()}

    def parameters(self) -> list[nn.Parameter]:
        """What the encoders' optimizer trains, too."""
        return list(self.head.parameters())

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds of it."""
        return self.head.state_dict()

    def restore(self, state: Mapping[str, Any] | None) -> None:
        """Continue from a `state`. Raises CheckpointError where it is missing or another set's."""
        try:
            self.head.load_state_dict(state or {})
        except (TypeError, RuntimeError, AttributeError):
            raise CheckpointError(
                "the checkpoint's head for phrases is missing or another's; use another checkpoint, or go on from its "
                "encoders (TRAIN.NET_E)"
            ) from None
