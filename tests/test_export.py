"""Exported models: the same images as the checkpoint, from one file, without torch; refused where they differ."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from tiny_models import CAPTIONS, GENERATORS, tiny_checkpoint, tiny_pipeline

from miscc.errors import CheckpointError, UserError
from models.damsm import TextEncoder
from serve import export as exporting
from serve.export import ExportableTextEncoder, compare, export, output_names

TORCH_FREE = "import sys; sys.modules['torch'] = None; sys.argv = ['serve', *{arguments!r}]; import runpy; " \
             "runpy.run_module('serve', run_name='__main__')"  # fmt: skip


def need_onnx():
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason="export: pip install -r requirements-export.txt")


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A file for each system, made once."""
    need_onnx()
    made = {}

    def file(system):
        if system not in made:
            path = tmp_path_factory.mktemp("exported") / f"{system}.onnx"
            made[system] = (path, export(tiny_pipeline(system), path))
        return made[system]

    return file


@pytest.mark.parametrize("rnn_type", ["LSTM", "GRU"])
def test_two_one_way_passes_are_the_packed_sequences(rnn_type):
    encoder = tiny_pipeline(rnn_type=rnn_type).text_encoder
    longest = encoder.max_words
    tokens = torch.randint(1, 40, (longest, longest), generator=torch.Generator().manual_seed(0))
    lengths = torch.arange(1, longest + 1)
    tokens = tokens * (torch.arange(longest) < lengths[:, None])
    with torch.inference_mode():
        expected, actual = encoder(tokens, lengths), ExportableTextEncoder(encoder)(tokens, lengths)
    assert torch.equal(expected.mask, actual.mask)
    assert (expected.sentence - actual.sentence).abs().max() < 2e-7
    assert (expected.words - actual.words).abs().max() < 2e-7 and expected.words.abs().max() > 0.05


@pytest.mark.parametrize("system", GENERATORS)
def test_parity_under_onnxruntime_for_batches_and_all_lengths(exported, system):
    from serve.export import _onnx_runner

    path, reported = exported(system)
    pipeline = tiny_pipeline(system)
    names = output_names(pipeline)
    found = compare(pipeline, names, _onnx_runner(path, names))
    assert found == reported and all(value <= 1e-4 for value in found.values())
    kinds = {"ssa_gan": {"mask0", "mask1", "mask2"}, "df_gan": set(), "attn_gan": {"attention0", "attention1"}}
    assert set(found) == {"values"} | kinds[system]


@pytest.mark.parametrize("system", GENERATORS)
def test_the_file_draws_what_the_checkpoint_draws(exported, system):
    from serve.batcher import Batcher
    from serve.drawing import Studio
    from serve.onnx_model import load_onnx_model

    model = load_onnx_model(exported(system)[0])
    pipeline = tiny_pipeline(system)
    assert (model.system, model.image_size, model.vocabulary) == (system, pipeline.image_size, pipeline.vocabulary)
    assert model.mask_sizes == ([4, 8, 16] if system == "ssa_gan" else []) and model.attends == (system == "attn_gan")
    studio = Studio({"onnx": model}, Batcher())
    for captions in (CAPTIONS[:1], CAPTIONS[:2], [*CAPTIONS, *CAPTIONS[:2]]):
        expected = pipeline.generate(captions, seed=3, truncation=0.7).images.astype(int)
        pictures = studio.submit(captions, 1, 3, 0.7).pictures()
        assert np.abs(np.stack([picture.image for picture in pictures]) - expected).max() <= 1
    with pytest.raises(UserError, match="cannot mix two captions"):
        studio.submit_walk(*CAPTIONS[:2])[0].result(10)


def test_the_file_alone_draws_without_torch(exported, tmp_path):
    from PIL import Image

    arguments = ["--onnx", str(exported("ssa_gan")[0]), "--caption", "a red zyzzyva bird", "--seed", "3",
                 "--out", str(tmp_path / "bird.png")]  # fmt: skip
    command = [sys.executable, "-c", TORCH_FREE.format(arguments=arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "left out: zyzzyva" in done.stderr, done.stderr
    expected = tiny_pipeline().generate(["a red bird"], seed=3).images[0].astype(int)
    assert np.abs(np.asarray(Image.open(tmp_path / "bird.png")) - expected).max() <= 1


def test_the_api_serves_the_file_without_torch(exported):
    pytest.importorskip("fastapi", reason="the API: pip install -r requirements-serve.txt")
    from serve_help import Client

    arguments = ["--onnx", str(exported("attn_gan")[0]), "--no-page", "--port", "0"]
    command = [sys.executable, "-c", TORCH_FREE.format(arguments=arguments)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        line = process.stdout.readline()
        assert line.startswith("http"), process.stderr.read()
        client = Client(int(line.split(":")[2].split("/")[0]))
        bird = client.post("/api/v1.0/bird", {"caption": CAPTIONS[0]})
        assert bird.status == 201 and bird.json()["bird"]["map2"]
        assert client.get("/version").json()["models"][0]["image_size"] == 32
    finally:
        process.terminate()
    assert process.wait(30) == 0


def test_pt2_is_the_same_and_carries_the_vocabulary(tmp_path):
    import json

    pipeline = tiny_pipeline()
    (tmp_path / "model.pt2").write_text("before")
    differences = export(pipeline, tmp_path / "model.pt2", "pt2", overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt2"]
    assert all(value <= 1e-4 for value in differences.values())
    extra = {"model.json": ""}
    module = torch.export.load(tmp_path / "model.pt2", extra_files=extra).module()
    assert json.loads(extra["model.json"])["vocabulary"] == pipeline.vocabulary.words
    assert module(torch.ones(3, 18, dtype=torch.int64), torch.tensor([1, 5, 18]), torch.zeros(3, 100))[0].shape == (
        3,
        16,
        16,
        3,
    )


def test_an_export_that_differs_is_refused_and_leaves_what_was_there(tmp_path, monkeypatch):
    class Wrong(ExportableTextEncoder):
        """As a GRU came out of some torch versions: no error, other values."""

        def forward(self, captions, lengths):
            text = super().forward(captions, lengths)
            return text._replace(sentence=text.sentence.roll(1, dims=1))

    monkeypatch.setitem(exporting.EXPORTABLE, TextEncoder, Wrong)
    with pytest.raises(UserError, match="not written, as .* differs from the checkpoint .*values by "):
        export(tiny_pipeline(), tmp_path / "model.pt2", "pt2")
    assert not list(tmp_path.iterdir())
    (tmp_path / "model.pt2").write_text("before")
    with pytest.raises(UserError, match="differs from the checkpoint"):
        export(tiny_pipeline(), tmp_path / "model.pt2", "pt2", overwrite=True)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["before"]


@pytest.mark.parametrize("failure", ["package", "interrupted"])
def test_an_export_that_fails_leaves_what_was_there(tmp_path, monkeypatch, failure):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setitem(sys.modules, "onnx", None)
    monkeypatch.setattr(exporting, "compare", interrupted)
    path = tmp_path / "model"
    path.write_text("before")
    with pytest.raises(UserError if failure == "package" else KeyboardInterrupt):
        export(tiny_pipeline(), path, "onnx" if failure == "package" else "pt2", overwrite=True)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["before"]


def test_other_files_are_refused_in_one_line(tmp_path, exported):
    import onnx

    from serve.onnx_model import load_onnx_model

    with pytest.raises(CheckpointError, match="no such file; write one with"):
        load_onnx_model(tmp_path / "none.onnx")
    (tmp_path / "text.onnx").write_text("hello")
    with pytest.raises(CheckpointError, match="cannot be read as an ONNX model"):
        load_onnx_model(tmp_path / "text.onnx")
    proto = onnx.load(exported("df_gan")[0])
    del proto.metadata_props[:]
    onnx.save(proto, tmp_path / "bare.onnx")
    with pytest.raises(CheckpointError, match="is not a model that serve.export of this version wrote"):
        load_onnx_model(tmp_path / "bare.onnx")


def test_the_default_file_has_the_models_name(tmp_path, monkeypatch):
    (tmp_path / "pub-v1.5").mkdir()
    assert exporting.default_file(str(tmp_path / "pub-v1.5"), "onnx") == tmp_path / "pub-v1.5.onnx"
    assert exporting.default_file(str(tmp_path / "last.pth"), "pt2") == tmp_path / "last.pt2"
    monkeypatch.chdir(tmp_path / "pub-v1.5")
    assert exporting.default_file(".", "onnx") == tmp_path / "pub-v1.5.onnx"


def test_the_command_writes_beside_the_checkpoint_and_keeps_what_is_there(tmp_path):
    checkpoint = tiny_checkpoint(tmp_path / "last.pth", "df_gan")
    exporting.main(["--checkpoint", str(checkpoint), "--format", "pt2"])
    assert (tmp_path / "last.pt2").is_file()
    with pytest.raises(UserError, match="exists already; give --overwrite"):
        exporting.main(["--checkpoint", str(checkpoint), "--format", "pt2"])
