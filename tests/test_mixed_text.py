"""The sentence of two encoders: the mean by hand, the mask, what is stored, and what is said where something is missing."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch
from tiny_systems import run_main, tiny_overrides
from torch import nn

from miscc.checkpoint import load_checkpoint
from miscc.errors import CheckpointError
from models import TEXT_ENCODERS
from models.damsm import TextEncoder
from models.mixed_text import MixedTextEncoder, mixed_text_encoder
from models.registry import from_state, to_state
from sampling.pipeline import TextToImage

PIECES = [[], [11, 12], [13], [14, 15, 16], [17]]  # of `<end>` and four words
FIRST, LAST = 1, 2


class FakeTransformer(nn.Module):
    """The hidden state of a piece is (piece, position, 1, ...); it counts the attended pieces into every state."""

    def __init__(self, width):
        super().__init__()
        self.config = SimpleNamespace(hidden_size=width)
        self.scale = nn.Parameter(torch.ones(()))
        self.seen = []

    def forward(self, input_ids, attention_mask):
        self.seen.append((input_ids.tolist(), attention_mask.tolist()))
        states = torch.ones(*input_ids.shape, self.config.hidden_size)
        states[..., 0] = input_ids
        states[..., 1] = torch.arange(input_ids.shape[1])
        return SimpleNamespace(last_hidden_state=states * self.scale)


def make_encoder(width, text_dim=4):
    torch.manual_seed(0)
    recurrent = {"vocabulary_size": 5, "text_dim": text_dim, "embedding_dim": 3}
    return MixedTextEncoder(
        transformer={}, pieces=PIECES, first=FIRST, last=LAST, module=FakeTransformer(width), **recurrent
    ).eval()


CAPTIONS, LENGTHS = torch.tensor([[1, 3, 2], [4, 2, 0]]), torch.tensor([3, 2])


def test_half_and_half_with_the_mean_over_real_pieces_only():
    encoder = make_encoder(width=4)
    text, own = encoder(CAPTIONS, LENGTHS), encoder.recurrent(CAPTIONS, LENGTHS)
    ids, mask = encoder.transformer.seen[0]
    assert ids == [[1, 11, 12, 14, 15, 16, 13, 2], [1, 17, 13, 2, 0, 0, 0, 0]]
    assert mask == [[1] * 8, [1] * 4 + [0] * 4]
    means = torch.tensor([[84 / 8, 28 / 8, 1.0, 1.0], [33 / 4, 6 / 4, 1.0, 1.0]])
    torch.testing.assert_close(text.sentence, 0.5 * own.sentence + 0.5 * means)
    assert torch.equal(text.words, own.words) and torch.equal(text.mask, own.mask)
    assert encoder.projection is None and encoder.embedding.num_embeddings == 5


def test_other_widths_are_projected_without_stretching():
    encoder = make_encoder(width=6)
    torch.testing.assert_close(encoder.projection @ encoder.projection.T, torch.eye(4))
    text, own = encoder(CAPTIONS, LENGTHS), encoder.recurrent(CAPTIONS, LENGTHS)
    mean = torch.tensor([33 / 4, 6 / 4, 1.0, 1.0, 1.0, 1.0])
    torch.testing.assert_close(text.sentence[1], (own.sentence[1] + encoder.projection @ mean) / 2)
    assert torch.equal(encoder.projection, make_encoder(width=6).projection)  # the same in every run
    assert {"projection"} == {name for name, _ in encoder.named_buffers() if name in encoder.state_dict()}


def test_the_transformer_is_frozen_and_stays_in_eval_mode():
    encoder = make_encoder(width=4).train()
    assert encoder.training and not encoder.transformer.training
    assert not any(parameter.requires_grad for parameter in encoder.transformer.parameters())


def test_a_missing_folder_or_package_is_said(tmp_path, monkeypatch):
    with pytest.raises(CheckpointError, match="TEXT.TRANSFORMER: /nowhere is no folder"):
        mixed_text_encoder(TextEncoder(5), ["<end>", "a", "b", "c", "d"], "/nowhere")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(CheckpointError, match="pip install transformers"):
        mixed_text_encoder(TextEncoder(5), ["<end>", "a", "b", "c", "d"], tmp_path)
    with pytest.raises(CheckpointError, match="pip install transformers"):
        from_state(to_state("mixed", make_encoder(width=4)), TEXT_ENCODERS)


def write_bert(folder, words):
    """A tiny random BERT as save_pretrained leaves one; every word but the first is cut in two pieces."""
    transformers = pytest.importorskip("transformers")
    halves = sorted({piece for word in words[1:] for piece in (word[:1], "##" + word[1:]) if piece != "##"})
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", words[0], *[h for h in halves if h != words[0]]]
    config = transformers.BertConfig(
        vocab_size=len(vocabulary), hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
    )
    torch.manual_seed(0)
    transformers.BertModel(config).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "BertTokenizer", "do_lower_case": True})
    )
    return transformers


def test_against_transformers_own_tokenizer_and_model(tmp_path):
    words = ["<end>", "bird", "red", "yellow", "wings"]
    transformers = write_bert(tmp_path, words[1:])
    recurrent = TextEncoder(5).eval()
    encoder = mixed_text_encoder(recurrent, words, tmp_path)
    captions, lengths = torch.tensor([[2, 1, 4], [3, 0, 0]]), torch.tensor([3, 1])
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    given = tokenizer(["red bird wings", "yellow"], padding=True, return_tensors="pt")
    assert given["attention_mask"].sum(dim=1).tolist() == [7, 4]
    with torch.no_grad():
        states = transformers.AutoModel.from_pretrained(tmp_path).eval()(**given).last_hidden_state
        means = torch.stack([states[0].mean(dim=0), states[1, :4].mean(dim=0)])
        expected = 0.5 * recurrent(captions, lengths).sentence + 0.5 * means @ encoder.projection.T
        torch.testing.assert_close(encoder(captions, lengths).sentence, expected)
        again = from_state(to_state("mixed", encoder), TEXT_ENCODERS).eval()
        torch.testing.assert_close(again(captions, lengths).sentence, expected)


def test_a_run_with_a_transformer_draws_from_its_checkpoint_alone(drawn_folder, encoders, tmp_path):
    bert = tmp_path / "bert"
    bert.mkdir()
    write_bert(bert, load_checkpoint(encoders)["vocabulary"][1:])
    overrides = tiny_overrides(drawn_folder, encoders, tmp_path) | {"TEXT.TRANSFORMER": str(bert)}
    assert run_main("cfg/coco_sema.yml", overrides) == 0
    for path in bert.iterdir():
        path.unlink()
    (last,) = tmp_path.glob("*/checkpoints/last.pth")
    pipeline = TextToImage.load(last, "cpu")
    assert isinstance(pipeline.text_encoder, MixedTextEncoder)
    assert pipeline.generate(["a small red bird"]).images.shape == (1, 16, 16, 3)
    resumed = overrides | {"TRAIN.MAX_STEPS": "3"}
    assert run_main("cfg/coco_sema.yml", resumed, "--resume") == 0
