"""SEMA's text encoder: half of the sentence from DAMSM's recurrent encoder, half from a Transformer.

The paper's: 0.5·LSTM + 0.5·BERT, where BERT's part is the mean of its last hidden states under the attention mask.

Ours: a frozen projection where the two widths differ; and BERT reads the words of the vocabulary, not the raw caption. So
the word pieces of each word are a table in the checkpoint, which does not need BERT's own files.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from miscc.errors import CheckpointError
from models.damsm import TextEncoder
from models.types import CaptionEncoder, TextFeatures

# Entries of a Transformer's configuration that name code to run, or choose how to run it: ignored.
IGNORED_ENTRIES = ("auto_map", "quantization_config", "attn_implementation", "_attn_implementation",
                   "_attn_implementation_internal", "_attn_implementation_autoset")  # fmt: skip


class MixedTextEncoder(CaptionEncoder):
    """Words of the recurrent encoder; sentence = (its sentence + the Transformer's) / 2. The Transformer is never trained.

    transformer: its Hugging Face configuration.
    pieces: indices of the word pieces of each word of the vocabulary.
    first, last: indices of the pieces before and after a caption ([CLS], [SEP]).
    module: the Transformer; None: a randomly initialised one of that configuration.

    All other arguments: see models.damsm.TextEncoder. Raises CheckpointError for a configuration that cannot be built.
    """

    compiled_methods = ()

    @dataclass(frozen=True, kw_only=True)
    class Settings(TextEncoder.Settings):
        transformer: Mapping[str, Any]
        pieces: Sequence[Sequence[int]]
        first: int
        last: int

    def __init__(self, module: Any = None, **arguments: Any):
        super().__init__(**arguments)
        pieces, transformer = self.settings.pieces, self.settings.transformer

        # The two encoders.
        own = ("transformer", "pieces", "first", "last")
        self.recurrent = TextEncoder(**{name: value for name, value in arguments.items() if name not in own})
        module = _untrained(transformer) if module is None else module
        self.transformer = module.eval().requires_grad_(False)

        # Word pieces of each word, (vocabulary, longest), -1 behind them. Not in the state dict: the arguments have them.
        self.first, self.last = self.settings.first, self.settings.last
        longest = max(map(len, pieces), default=0)
        table = [[*row, *[-1] * (longest - len(row))] for row in pieces]
        self.register_buffer("table", torch.tensor(table, dtype=torch.int64), persistent=False)

        # Where the widths differ: a random orthogonal projection, frozen, the same in every run.
        width, text_dim = module.config.hidden_size, self.settings.text_dim
        projection = None
        if width != text_dim:
            generator = torch.Generator().manual_seed(0)
            projection = nn.init.orthogonal_(torch.empty(text_dim, width), generator=generator)
        self.register_buffer("projection", projection)

    @property
    def embedding(self) -> nn.Embedding:  # pyrefly: ignore[bad-override]  # read-only: callers only read it
        """One row for each word of the vocabulary."""
        return self.recurrent.embedding

    def train(self, mode: bool = True) -> "MixedTextEncoder":
        super().train(mode)
        self.transformer.eval()
        return self

    def forward(self, captions: Tensor, lengths: Tensor) -> TextFeatures:
        """captions (N, T) int64 padded with 0, lengths (N,) from 1 to T, best on the CPU -> TextFeatures."""
        text = self.recurrent(captions, lengths)

        # Mean of the Transformer's states over the pieces of each caption.
        tokens, attended = self._tokens(captions, text.mask)  # (N, L) both
        with torch.no_grad():
            states = self.transformer(input_ids=tokens, attention_mask=attended).last_hidden_state  # (N, L, width)
            weights = attended[:, :, None].to(states.dtype)
            mean = (states * weights).sum(dim=1) / weights.sum(dim=1)
            if self.projection is not None:
                mean = mean @ self.projection.T

        return text._replace(sentence=(text.sentence + mean) / 2)

    def _tokens(self, captions: Tensor, padding: Tensor) -> tuple[Tensor, Tensor]:
        """captions and padding (N, T) -> word pieces with [CLS] and [SEP], and the attention mask, (N, L) int64 both.

        L: pieces of the longest caption. Both are 0 behind the last piece.
        """
        pieces = self.table[captions].masked_fill(padding[:, :, None], -1).flatten(1)
        ends = [torch.full_like(pieces[:, :1], piece) for piece in (self.first, self.last)]
        pieces = torch.cat([ends[0], pieces, ends[1]], dim=1)  # with gaps, -1, after words of few pieces

        # Close the gaps: a stable sort moves them behind the pieces, whose order it keeps.
        gaps = pieces < 0
        order = gaps.long().argsort(dim=1, stable=True)
        longest = int((~gaps).sum(dim=1).max())
        pieces = pieces.gather(1, order)[:, :longest]
        return pieces.clamp_min(0), (pieces >= 0).long()


def mixed_text_encoder(text_encoder: CaptionEncoder, words: Sequence[str], folder: str | Path) -> MixedTextEncoder:
    """The recurrent encoder together with the Transformer in a folder, frozen and in eval mode.

    text_encoder: the recurrent encoder, or a mixed one whose Transformer is replaced.
    words: the vocabulary, `<end>` first.
    folder: model and tokenizer as transformers' save_pretrained writes them.

    Raises CheckpointError where the package or the weights are missing, or the tokenizer is not of BERT's kind.
    """
    # Load the Transformer.
    if not Path(folder).is_dir():
        raise CheckpointError(
            f"TEXT.TRANSFORMER: {folder} is no folder; copy a Hugging Face BERT there (config.json, tokenizer and weights), "
            f"or leave the key empty for the LSTM alone"
        )
    transformers = _package()
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        module = transformers.AutoModel.from_pretrained(folder, local_files_only=True).float()
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"TEXT.TRANSFORMER: {folder} cannot be loaded as a Transformer: {reason}") from None

    # Word pieces of each word; `<end>` has none. A caption of up to 49 words must give the same pieces as its words do.
    pieces = [[], *tokenizer(list(words[1:]), add_special_tokens=False)["input_ids"]]
    checked = list(range(1, min(len(words), 50)))
    whole = tokenizer(" ".join(words[i] for i in checked))["input_ids"]
    first, last = tokenizer.cls_token_id, tokenizer.sep_token_id
    if first is None or whole != [first, *(piece for i in checked for piece in pieces[i]), last]:
        raise CheckpointError(
            f"TEXT.TRANSFORMER: the tokenizer in {folder} does not cut captions word by word between [CLS] and [SEP]; "
            f"take a BERT"
        )

    # Both as one encoder.
    recurrent = text_encoder.recurrent if isinstance(text_encoder, MixedTextEncoder) else text_encoder
    config = json.loads(module.config.to_json_string())
    mixed = MixedTextEncoder(
        transformer=config, pieces=pieces, first=first, last=last, module=module, **recurrent.arguments
    )
    mixed.recurrent.load_state_dict(recurrent.state_dict())
    return mixed.eval().requires_grad_(False)


def _untrained(config: Mapping[str, Any]) -> Any:
    """A randomly initialised Transformer of a checkpoint's configuration.

    Entries that could name code to download or to run are ignored. Raises CheckpointError where it cannot be built.
    """
    transformers = _package()
    plain = {name: value for name, value in config.items() if name not in IGNORED_ENTRIES}
    try:
        made = transformers.AutoConfig.for_model(**plain)
        return transformers.AutoModel.from_config(made, attn_implementation="eager")
    except (KeyError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"the checkpoint's Transformer cannot be built by this transformers: {reason}") from None


def _package() -> Any:
    """The package `transformers`, an optional dependency. Raises CheckpointError where it is missing."""
    try:
        import transformers
    except ImportError:
        raise CheckpointError(
            "half of this model's sentence comes from a Transformer: that needs the package `transformers` (pip install "
            "transformers)"
        ) from None
    return transformers
