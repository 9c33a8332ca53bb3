"""The report: one file that asks for nothing else, with every part of a run, and a line where a part is missing."""

import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib", reason="the report: pip install -r requirements-report.txt")

from datasets.records import evenly_spaced
from datasets.settings import DataSettings
from eval.report import Run, main, report
from eval.report_plots import plots, read_stats
from eval.report_samples import nearest_images
from miscc.distributed import World
from miscc.errors import DataError, UserError
from miscc.settings import from_config
from training.data import read_records
from training.trainer import train


class Page(HTMLParser):
    """Headings, words, and every address that a browser would fetch."""

    def __init__(self, text):
        super().__init__()
        self.headings, self.words, self.addresses, self._in = [], [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self._in = tag
        self.addresses += [
            value for name, value in attributes if name in ("src", "href", "data", "action", "xlink:href")
        ]

    def handle_data(self, data):
        (self.headings if self._in in ("h2", "h3") else self.words).append(data)


@pytest.fixture
def run_folder(tiny, tmp_path):
    train(tiny(("TRAIN.MAX_STEPS", "2"), ("TRAIN.SAMPLE_EVERY", "1")), World(0, 1, torch.device("cpu")))
    changed = tiny(("TRAIN.MAX_STEPS", "3"), ("TRAIN.GENERATOR_LR", "0.5"))
    train(changed, World(0, 1, torch.device("cpu")), resume=True)
    return tmp_path / "output" / "00000-tiny-ssa_gan"


def test_a_runs_report_has_every_part_and_asks_no_network(run_folder):
    record = {
        "protocol": {"name": "small", "real_crop": "centre"}, "overrides": {}, "judged": "generated", "num_images": 7,
        "real": {"num_images": 12, "data_set": "folder", "split": "test", "real_crop": "centre"},
        "scores": [{"name": "FD[x]", "value": 12.5, "std": None, "protocol": {}}], "not_computed": {},
        "warnings": ["<b>few</b> images"], "seconds": {"all": 1.0}, "device": "cpu", "num_processes": 1,
        "checkpoint": {"path": "last.pth", "step": 3, "sha256": "ab" * 32},
    }  # fmt: skip
    (run_folder / "checkpoints" / "evaluation.json").write_text(json.dumps([record]))
    main([str(run_folder), "--captions", "5", "--training-images", "9"])
    text = (run_folder / "report.html").read_text()
    page = Page(text)
    expected = ["Curves", "Pictures over time", "Evaluations", "Masks", "Nearest training images",
                "Captions with the lowest similarity", "Changed on resume", "Settings"]  # fmt: skip
    assert [heading for heading in page.headings if heading != run_folder.name] == expected
    words = " ".join(page.words)
    assert (
        "Missing:" not in words
        and "FD[x]" in words
        and "ab" * 32 in words
        and "protocol: name small, real_crop centre" in words
    )
    assert "<b>few</b>" not in text and "&lt;b&gt;few&lt;/b&gt; images" in text  # nothing of a file becomes markup
    assert re.search(r"TRAIN.GENERATOR_LR: 0\.0001 -> 0\.5", words) and "TRAIN.NF" in words
    assert "nearest of 9 of 40 training images" in words and words.count("similarity ") == 5
    assert page.addresses and all(address.startswith(("data:image/png", "#")) for address in page.addresses)
    assert "url(http" not in text and "@import" not in text
    for label in ("training step", "loss (no unit)", "mean logit", "gradient norm", "images a second"):
        assert f"<!-- {label} -->" in text
    assert text.count("<input type=range") == 1 and "step 0000001" in words


def test_encoders_have_retrieval_attention_and_confusions(encoders, drawn_folder):
    text = report([Run(encoders.parent)], str(drawn_folder), num_captions=12)
    page = Page(text)
    assert "Confusions on the test set" in page.headings and "Missing:" not in text
    assert re.search(r"of 12 images find their own caption first \(chance 8.3%\)", text)
    assert "<!-- share that finds its pair -->" in text and "attention" in str(
        list(encoders.parent.glob("attention/*"))
    )


def test_several_runs_share_plots_and_a_table(run_folder, encoders, drawn_folder):
    text = report([Run(run_folder), Run(encoders.parent)], str(drawn_folder), 5, 5)
    page = Page(text)
    assert page.headings[:2] == ["Runs", "Curves"] and text.count("<svg") == len(
        set(re.findall(r"<svg", text))
    ) * text.count("<svg")
    assert f"<!-- {run_folder.name}: hinge -->" in text and f"<!-- {encoders.parent.name}: image_to_text_r1 -->" in text


def test_missing_data_costs_its_sections_alone(run_folder, tmp_path):
    text = report([Run(run_folder)], str(tmp_path / "gone"), 5, 5)
    assert text.count("Missing: ") == 3 and "does not exist" in text and "<svg" in text


def test_the_nearest_training_image_of_a_copy_is_itself(drawn_folder, tiny):
    training = read_records(from_config(DataSettings, tiny()), "train")
    from eval.report_samples import _crop

    shown = nearest_images(_crop(training, 7, 16)[None], ["a copy"], training, 40, 16)[0]
    assert shown.pictures[1][1] == f"{training.keys[7]}: 0.0" and len(shown.pictures) == 4
    assert np.array_equal(shown.pictures[1][0], shown.pictures[0][0])
    assert float(shown.pictures[2][1].rsplit(" ", 1)[1]) > 0


def test_a_report_replaces_no_file_of_the_user(run_folder, tmp_path):
    (tmp_path / "README.md").write_text("a user's")
    with pytest.raises(UserError, match="README.md: exists already; give --overwrite or another file"):
        main([str(run_folder), "--out", str(tmp_path / "README.md")])
    assert (tmp_path / "README.md").read_text() == "a user's"


def test_a_run_whose_checkpoint_is_damaged_is_reported_without_drawings(run_folder):
    (run_folder / "checkpoints" / "last.pth").write_bytes(b"half a file")
    text = report([Run(run_folder)])
    assert "Nothing was drawn: " in text and "Pictures over time" in text and "Settings" in text


def test_curves_are_read_line_by_line(tmp_path):
    (tmp_path / "stats.jsonl").write_text(
        '{"step": 1, "epoch": 0.5, "loss/a": 2}\n{"step": 2, "loss/a": null, "v/x_r1": 0.5}\n'
    )
    curves = read_stats(tmp_path / "stats.jsonl")
    assert curves == {"loss/a": [(1, 2.0)], "v/x_r1": [(2, 0.5)]}
    assert list(plots({"run": curves})) == ["loss", "retrieval"]
    assert read_stats(tmp_path / "none.jsonl") == {}
    (tmp_path / "stats.jsonl").write_bytes(
        b'{"step": 1, "a": 2}\n{"step": 2, "a": \xff'
    )  # of a process that was killed
    assert read_stats(tmp_path / "stats.jsonl") == {"a": [(1, 2.0)]}
    (tmp_path / "stats.jsonl").write_text('{"step": 1}\nno json\n{"step": 2}\n')
    with pytest.raises(DataError, match="line 2 is no line of stats"):
        read_stats(tmp_path / "stats.jsonl")
    assert evenly_spaced(10, 3) == [0, 4, 9] and evenly_spaced(2, 5) == [0, 1][:2]


def test_other_folders_are_refused(tmp_path):
    with pytest.raises(DataError, match="is no run"):
        main([str(tmp_path)])
