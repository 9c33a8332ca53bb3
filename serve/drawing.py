"""From what a client asks to jobs for the batcher, and from their results to pixels; page and API share it. No HTTP here."""

import unicodedata
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np

from miscc.errors import UserError
from miscc.pictures import attention_picture, unit_to_uint8
from miscc.randomness import noise_array
from miscc.vocabulary import encode_rows
from serve.batcher import Batcher, Call, Job
from serve.models import Drawn, Model

MAX_SEED = 2**32 - 1
WALK_STEPS = 8


@dataclass(frozen=True)
class Limits:
    """What a client may ask for at once."""

    caption_length: int = 500  # characters
    captions: int = 64
    per_caption: int = 16
    images: int = 64  # captions times images of each
    truncation: float = 5.0


@dataclass(frozen=True)
class Picture:
    """One image that was asked for: which caption, which noise, and what was drawn."""

    caption: str
    seed: int
    index: int  # of the noise, as in TextToImage.generate
    truncation: float | None
    words: list[str]  # as the model read them
    unknown: list[str]
    drawn: Drawn

    @property
    def image(self) -> np.ndarray:
        """(H, W, 3) uint8, of the last stage."""
        return self.drawn.images[-1]

    def mask(self, stage: int) -> np.ndarray:
        """(h, w) uint8."""
        return unit_to_uint8(self.drawn.masks[stage])

    def attention_strip(self, stage: int) -> np.ndarray:
        """The image and, word by word, where the caption attends: (.., .., 3) uint8."""
        return attention_picture([self.image], [self.words], [self.drawn.attention[stage]], cell_size=128)

    def maps(self) -> list[np.ndarray]:
        """At most two pictures of where the text acts: AttnGAN's attention, SSA-GAN's last masks; [] without either."""
        if self.drawn.attention:
            return [self.attention_strip(stage) for stage in range(len(self.drawn.attention))][-2:]
        return [self.mask(stage) for stage in range(len(self.drawn.masks))][-2:]


class Studio:
    """The models, the batcher that draws with them, and what may be asked of them."""

    def __init__(self, models: Mapping[str, Model], batcher: Batcher, limits: Limits | None = None):
        self.models, self.batcher, self.limits = dict(models), batcher, limits or Limits()

    @property
    def first(self) -> Model:
        return next(iter(self.models.values()))

    @property
    def truncation(self) -> float | None:
        """The first model's own truncation, up to the limit."""
        own = self.first.truncation
        return None if own is None else min(own, self.limits.truncation)

    def model(self, name: str | None = None) -> Model:
        """The model of this name, None: the first. Raises UserError."""
        if name is None:
            return self.first
        if name not in self.models:
            raise UserError(f"model: there is none of this name; take one of {', '.join(self.models)}")
        return self.models[name]

    def check_caption(self, caption: str, name: str = "caption") -> str:
        """The caption with single spaces between its words. Raises UserError where it is empty, too long or no text.

        name: of the caption in the message.
        """
        if len(caption) > self.limits.caption_length:
            raise UserError(
                f"{name}: has {len(caption)} characters; write at most {self.limits.caption_length}, of which the model "
                f"reads the first words"
            )

        # As people write: spaces do not count.
        caption = " ".join(caption.split())
        if not caption:
            raise UserError(f"{name}: is empty; write one such as 'a small red bird with black wings'")
        if any(unicodedata.category(character) in ("Cc", "Cs") for character in caption):
            raise UserError(f"{name}: holds control characters or half a character; write plain text")
        return caption

    def _check_noise(self, seed: int, truncation: float | None) -> None:
        if not 0 <= seed <= MAX_SEED:
            raise UserError(f"seed: give a whole number from 0 to {MAX_SEED}")
        if truncation is not None and not 0 < truncation <= self.limits.truncation:
            raise UserError(f"truncation: give a number above 0 and up to {self.limits.truncation:g}, or none")

    def submit(
        self,
        captions: Sequence[str],
        per_caption: int = 1,
        seed: int = 0,
        truncation: float | None = None,
        model: str | None = None,
    ) -> "Order":
        """Queue `per_caption` images of each caption; the i-th has the noise of (seed, i), as TextToImage.generate gives.

        Raises UserError for what the limits or the vocabulary forbid, QueueFullError.
        """
        # Limits: each says which field to change.
        chosen, limits = self.model(model), self.limits
        if not 1 <= len(captions) <= limits.captions:
            raise UserError(f"captions: give 1 to {limits.captions}, not {len(captions)}")
        if not 1 <= per_caption <= limits.per_caption:
            raise UserError(f"n: give 1 to {limits.per_caption} images of a caption, not {per_caption}")
        if len(captions) * per_caption > limits.images:
            raise UserError(
                f"n: {len(captions)} captions times {per_caption} are more than {limits.images} images at once"
            )
        self._check_noise(seed, truncation)

        # Words and noise of each image, as TextToImage.generate gives them.
        numbered = [f"caption {number} of {len(captions)}" for number in range(1, len(captions) + 1)]
        checked = list(map(self.check_caption, captions, numbered if len(captions) > 1 else ["caption"]))
        tokens, lengths, unknown = encode_rows(checked, chosen.vocabulary, chosen.max_words)
        rows = [row for row in range(len(captions)) for _ in range(per_caption)]
        repeated = [checked[row] for row in rows]
        noise = noise_array(seed, 0, range(len(repeated)), chosen.noise_dim, truncation)

        # Jobs are queued together or not at all.
        jobs = [Job(chosen, tokens[row], int(lengths[row]), noise[i]) for i, row in enumerate(rows)]
        futures = self.batcher.submit(jobs)
        return Order(chosen, repeated, seed, truncation, jobs, [unknown[row] for row in rows], futures)

    def submit_walk(
        self, first: str, second: str, seed: int = 0, truncation: float | None = None, model: str | None = None
    ) -> tuple[Future, list[str]]:
        """Queue a walk from one caption to another: a future of WALK_STEPS images (H, W, 3), and the words that are left out.

        Raises as `submit`, and UserError for a model that cannot mix captions.
        """
        chosen = self.model(model)
        if not chosen.mixes_captions:
            raise UserError(
                f"model: {chosen.name}, an exported one, cannot mix two captions; serve its checkpoint instead"
            )
        self._check_noise(seed, truncation)
        start, end = self.check_caption(first, "first caption"), self.check_caption(second, "second caption")
        left_out = encode_rows([start, end], chosen.vocabulary, chosen.max_words)[2]
        unknown = list(dict.fromkeys(word for words in left_out for word in words))

        # One call: the steps of a walk share its two captions.
        call = Call(lambda: chosen.walk(start, end, WALK_STEPS, seed, truncation), images=WALK_STEPS)
        return self.batcher.submit([call])[0], unknown


@dataclass(frozen=True)
class Order:
    """Images that are queued; `pictures` once their futures are done."""

    model: Model
    captions: list[str]
    seed: int
    truncation: float | None
    jobs: list[Job]
    unknown: list[list[str]]
    futures: list[Future]

    def pictures(self) -> list[Picture]:
        """Waits until all are drawn. Raises what drawing raised."""
        return [
            Picture(
                caption=self.captions[index],
                seed=self.seed,
                index=index,
                truncation=self.truncation,
                words=self.model.words_of(self.jobs[index].tokens, self.jobs[index].length),
                unknown=self.unknown[index],
                drawn=future.result(),
            )
            for index, future in enumerate(self.futures)
        ]

    def cancel(self) -> None:
        """Drop what has not begun: its client no longer waits."""
        for future in self.futures:
            future.cancel()
