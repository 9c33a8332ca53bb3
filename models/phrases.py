"""What the encoders learn beside DAMSM's match: which phrases a caption and its image have.

DAMSM asks only that a caption finds its image in the batch. A detail that seldom decides it, such as the colour of a beak, is
learned by neither encoder: the image's features do not show it while the sentence does not say it, and the other way round.
Here each of them is trained by itself to tell which words and pairs of words there are, as Joulin et al. (ECCV 2016, arXiv
1511.02251) and Li et al. (ICCV 2017, arXiv 1612.09161) train image encoders on captions alone. The head is the same for
both, so that both say a phrase in the same direction. Ours, from no paper on generation.
"""

import torch
from torch import Tensor, nn

from miscc.losses import phrase_loss


class PhraseHead(nn.Module):
    """A linear layer from an image's code, or a caption's sentence, to a logit for each of P phrases.

    Its biases, of which images and captions have their own, start from the phrases' rates, so that the first steps are not
    spent on them.
    """

    def __init__(self, dim: int, image_rates: Tensor, caption_rates: Tensor):
        """
        dim: length of code and sentence.
        image_rates, caption_rates: (P,), shares of the images and of the captions that have each phrase.
        """
        super().__init__()
        self.weight = nn.Parameter(0.02 * torch.randn(len(image_rates), dim))
        self.image_bias = nn.Parameter(torch.logit(image_rates, eps=1e-4))
        self.caption_bias = nn.Parameter(torch.logit(caption_rates, eps=1e-4))

    def losses(
        self, code: Tensor, sentence: Tensor, image_phrases: Tensor, caption_phrases: Tensor
    ) -> dict[str, Tensor]:
        """{"image_phrases", "caption_phrases"}: see miscc.losses.phrase_loss.

        code: (N, D) of the images.
        sentence: (N, D) of their captions.
        image_phrases, caption_phrases: (N, P), 1 where there is the phrase, else 0.
        """
        return {
            "image_phrases": phrase_loss(code @ self.weight.T + self.image_bias, image_phrases),
            "caption_phrases": phrase_loss(sentence @ self.weight.T + self.caption_bias, caption_phrases),
        }
