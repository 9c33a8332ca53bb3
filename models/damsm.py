"""DAMSM's encoders (Xu et al., CVPR 2018, arXiv 1711.10485): captions and images into one space."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import inception_v3

from miscc.batch import Batch
from miscc.distributed import all_gather_with_grad
from miscc.losses import sentence_loss, word_loss
from miscc.settings import setting
from models.layers import resize
from models.settings import sentence_dim_setting
from models.types import CaptionEncoder, ImageEncoder, TextFeatures

GRID = 8  # regions of SmallImageEncoder, a side


class TextEncoder(CaptionEncoder):
    """Embedding, dropout, one bidirectional recurrent layer. 0 is the padding index.

    vocabulary_size: number of entries, `<end>` included.
    text_dim: length of a word feature, half of it from each direction.
    rnn_type: "LSTM" or "GRU".
    max_words: words of the longest caption in training; not used here, kept for the callers.
    embedding_dim: length of a word embedding.
    dropout: probability, on the embeddings.
    """

    compiled_methods = ()  # torch.compile does not support packed sequences

    @dataclass(frozen=True)
    class Settings:
        vocabulary_size: int
        text_dim: int = sentence_dim_setting()
        rnn_type: str = setting("RNN_TYPE", "LSTM", "recurrent cell of the text encoder", ("LSTM", "GRU"))
        max_words: int = 18
        embedding_dim: int = 300
        dropout: float = 0.5

    def __init__(self, *arguments: Any, **named: Any):
        super().__init__(*arguments, **named)
        vocabulary_size, embedding_dim = self.settings.vocabulary_size, self.settings.embedding_dim
        self.embedding = nn.Embedding(vocabulary_size, embedding_dim)
        nn.init.uniform_(self.embedding.weight, -0.1, 0.1)
        self.dropout = nn.Dropout(self.settings.dropout)

        cell = {"LSTM": nn.LSTM, "GRU": nn.GRU}[self.settings.rnn_type]
        self.rnn = cell(embedding_dim, self.settings.text_dim // 2, batch_first=True, bidirectional=True)

    def train(self, mode: bool = True) -> "TextEncoder":
        super().train(mode)

        # Always in training mode, in which alone cuDNN computes gradients. It has no dropout that this would turn on.
        self.rnn.train()
        return self

    def forward(self, captions: Tensor, lengths: Tensor) -> TextFeatures:
        """TextFeatures of N captions; features of padding are 0.

        captions: (N, T) int64, padded with 0.
        lengths: (N,) from 1 to T; best on the CPU, where reading them does not wait for the GPU.
        """
        # Packed, so that the backward direction starts at each caption's last word, not at its padding.
        embedded = self.dropout(self.embedding(captions))  # (N, T, embedding_dim)
        packed = nn.utils.rnn.pack_padded_sequence(embedded, lengths.cpu(), batch_first=True, enforce_sorted=False)
        outputs, state = self.rnn(packed)
        hidden = state[0] if isinstance(state, tuple) else state  # LSTM: (h, c); GRU: h; (2, N, D/2)

        # words (N, T, D), with the T of the captions, and the mask of their padding.
        words, _ = nn.utils.rnn.pad_packed_sequence(outputs, batch_first=True, total_length=captions.shape[1])
        positions = torch.arange(captions.shape[1], device=captions.device)
        mask = positions >= lengths.to(captions.device, non_blocking=True)[:, None]
        return TextFeatures(sentence=torch.cat([hidden[0], hidden[1]], dim=1), words=words.transpose(1, 2), mask=mask)


class InceptionEncoder(ImageEncoder):
    """Frozen Inception-v3 with two trained heads: Mixed_6e -> 17×17 regions, pooled Mixed_7c -> the global code.

    Images are resized to 299 px (bilinear) and stay in [-1, 1], as the released weights expect.

    text_dim: length of region features and code.
    """

    image_size = 299

    @dataclass(frozen=True)
    class Settings:
        text_dim: int = sentence_dim_setting()

    def __init__(self, *arguments: Any, **named: Any):
        super().__init__(*arguments, **named)
        text_dim = self.settings.text_dim

        # Without its classifier, and not initialised: the weights come from a file.
        trunk = inception_v3(weights=None, transform_input=False, aux_logits=False, init_weights=False)
        del trunk.fc
        self.trunk = trunk.requires_grad_(False)

        self.region_head = nn.Conv2d(768, text_dim, 1, bias=False)
        self.code_head = nn.Linear(2048, text_dim)
        for head in (self.region_head, self.code_head):
            nn.init.uniform_(head.weight, -0.1, 0.1)

    def train(self, mode: bool = True) -> "InceptionEncoder":
        """Only the heads change mode; the trunk keeps ImageNet's batch statistics unless `batch_statistics` is set."""
        super().train(mode)
        self.trunk.train(mode and self.batch_statistics)
        return self

    def head_parameters(self) -> list[nn.Parameter]:
        """Parameters of the heads; the trunk keeps its ImageNet weights."""
        return [*self.region_head.parameters(), *self.code_head.parameters()]

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """images (N, 3, H, W) in [-1, 1] -> regions (N, text_dim, 17, 17), code (N, text_dim)."""
        trunk = self.trunk
        x = F.interpolate(images, size=(299, 299), mode="bilinear", align_corners=False)

        # On a CPU Inception runs 1.4 times faster in this layout; the values are the same but for rounding.
        x = x.contiguous(memory_format=torch.channels_last)

        # Up to the regions: (N, 768, 17, 17).
        x = trunk.Conv2d_2b_3x3(trunk.Conv2d_2a_3x3(trunk.Conv2d_1a_3x3(x)))
        x = trunk.Conv2d_4a_3x3(trunk.Conv2d_3b_1x1(F.max_pool2d(x, 3, stride=2)))
        x = trunk.Mixed_5d(trunk.Mixed_5c(trunk.Mixed_5b(F.max_pool2d(x, 3, stride=2))))
        x = trunk.Mixed_6e(trunk.Mixed_6d(trunk.Mixed_6c(trunk.Mixed_6b(trunk.Mixed_6a(x)))))
        regions = self.region_head(x)

        # On to the global code: (N, 2048, 8, 8), averaged.
        x = trunk.Mixed_7c(trunk.Mixed_7b(trunk.Mixed_7a(x)))
        return regions, self.code_head(x.mean(dim=(2, 3)))


class SmallImageEncoder(ImageEncoder):
    """A small convolutional encoder, trained from scratch, for small images and CPUs. Ours, from no paper.

    Regions are an 8×8 grid.

    text_dim: length of region features and code.
    image_size: pixels, a power of two from 16 on; images of other sizes are resized to it.
    nf: base number of channels.
    """

    @dataclass(frozen=True)
    class Settings(InceptionEncoder.Settings):
        image_size: int = 64
        nf: int = 32

    def __init__(self, *arguments: Any, **named: Any):
        super().__init__(*arguments, **named)
        text_dim, nf = self.settings.text_dim, self.settings.nf
        self.image_size = image_size = self.settings.image_size

        # Downsample to the grid, with up to 8·nf channels.
        layers, channels, size = [], 3, image_size
        while size > GRID:
            wider = nf if channels == 3 else min(2 * channels, 8 * nf)
            layers += self._layer(channels, wider, stride=2)
            channels, size = wider, size // 2
        self.trunk = nn.Sequential(*layers, *self._layer(channels, 8 * nf, stride=1))

        # Regions from the grid; the code from one more downsampling, averaged.
        self.region_head = nn.Conv2d(8 * nf, text_dim, 1, bias=False)
        self.global_trunk = nn.Sequential(*self._layer(8 * nf, 8 * nf, stride=2))
        self.code_head = nn.Linear(8 * nf, text_dim)

    @staticmethod
    def _layer(channels_in: int, channels_out: int, stride: int) -> list[nn.Module]:
        convolution = nn.Conv2d(channels_in, channels_out, 3, stride=stride, padding=1, bias=False)
        return [convolution, nn.BatchNorm2d(channels_out), nn.LeakyReLU(0.2, inplace=True)]

    def head_parameters(self) -> list[nn.Parameter]:
        """All parameters: there are no ImageNet weights to keep."""
        return list(self.parameters())

    def features(self, images: Tensor) -> Tensor:
        """images (N, 3, H, W) in [-1, 1] -> (N, 8·nf, 8, 8)."""
        return self.trunk(resize(images, self.image_size))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """images (N, 3, H, W) in [-1, 1] -> regions (N, text_dim, 8, 8), code (N, text_dim)."""
        x = self.features(images)
        return self.region_head(x), self.code_head(self.global_trunk(x).mean(dim=(2, 3)))


def matching_losses(
    image_encoder: ImageEncoder,
    images: Tensor,
    text: TextFeatures,
    batch: Batch,
    gamma1: float,
    gamma2: float,
    gamma3: float,
    mask_classes: bool = True,
) -> dict[str, Tensor]:
    """DAMSM losses of images and their captions: {"words", "sentence"}, each the sum of both directions.

    images: (N, 3, H, W) in [-1, 1].
    batch: gives lengths (N,) and class_ids (N,) of the captions, see miscc.losses.word_loss.
    gamma1, gamma2, gamma3: see miscc.losses.word_loss.
    mask_classes: whether captions of the same class do not count as mismatches of each other's images.

    Inside `miscc.distributed.global_damsm` the images and captions of all processes form one batch.
    """
    rows = (*image_encoder(images), text.words, text.sentence, batch.lengths, batch.class_ids)
    regions, code, words, sentence, lengths, class_ids = all_gather_with_grad(*rows)

    return losses_of_features(regions, code, words, sentence, lengths, class_ids, gamma1, gamma2, gamma3, mask_classes)


def losses_of_features(
    regions: Tensor,
    code: Tensor,
    words: Tensor,
    sentence: Tensor,
    lengths: Tensor,
    class_ids: Tensor,
    gamma1: float,
    gamma2: float,
    gamma3: float,
    mask_classes: bool = True,
) -> dict[str, Tensor]:
    """DAMSM losses of encoded images and captions: {"words", "sentence"}, as `matching_losses`.

    regions: (N, D, h, w), and code: (N, D), of the images.
    words: (N, D, T), sentence: (N, D), and lengths: (N,), of their captions.
    class_ids: (N,).
    gamma1, gamma2, gamma3: see miscc.losses.word_loss.
    mask_classes: see `matching_losses`.
    """
    classes = class_ids if mask_classes else None
    by_word = word_loss(regions, words, lengths, classes, gamma1, gamma2, gamma3)
    by_sentence = sentence_loss(code, sentence, classes, gamma3)
    return {"words": by_word[0] + by_word[1], "sentence": by_sentence[0] + by_sentence[1]}
