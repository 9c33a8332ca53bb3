"""A CLIP of a few thousand numbers, and GALIP's networks around it, for tests. No tests here."""

import torch

from miscc.batch import Batch
from models.clip_features import untrained_clip
from models.galip import GALIPDiscriminator, GALIPGenerator

SIZES = {"image_size": 56, "patch_size": 8, "width": 64, "num_blocks": 10, "text_dim": 16, "vocabulary_size": 520}


def tiny_clip(**options):
    return untrained_clip(**SIZES, **options)


def tiny_galip(clip):
    """Networks whose gates and last weights are not zero, which would hide mistakes."""
    torch.manual_seed(0)
    generator = GALIPGenerator(nf=2, z_dim=5, image_size=56, sentence_dim=16, width=64, num_blocks=10)
    discriminator = GALIPDiscriminator(width=64, channels=24, sentence_dim=16, head_channels=8)
    for network in (generator, discriminator):
        for parameter in network.parameters():
            if parameter.dim() < 2 or not parameter.any():
                torch.nn.init.normal_(parameter, 0.0, 0.3)
    networks = {"generator": generator, "discriminator": discriminator}
    return networks | {"text_encoder": clip.text_encoder, "image_encoder": clip.visual}


def clip_batch(number=4, image_size=64):
    """Images of another size than CLIP's, captions of 4 to 7 tokens."""
    torch.manual_seed(1)
    captions, lengths = torch.zeros(number, 9, dtype=torch.int64), 4 + torch.arange(number)
    for row, length in enumerate(lengths.tolist()):
        captions[row, :length] = torch.tensor([518, *torch.randint(1, 500, (length - 2,)).tolist(), 519])
    images = torch.randn(number, 3, image_size, image_size).clamp(-1, 1)
    numbers = torch.arange(number)
    return Batch(images, captions, lengths, numbers, [str(n) for n in numbers], numbers, numbers)
