"""README.md of a published model: what it is, how it was trained, what it scored, sample pictures. Text in, text out."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sampling.published import PICTURE

TITLES = {
    "ssa_gan": "SSA-GAN", "df_gan": "DF-GAN", "sema": "SEMA", "attn_gan": "AttnGAN", "attn_dcgan": "AttnDCGAN",
    "galip": "GALIP",
}  # fmt: skip


def model_card(
    name: str,
    about: Mapping[str, Any],
    evaluations: Sequence[Mapping[str, Any]] = (),
    sha256: str | None = None,
    pictured: bool = False,
) -> str:
    """The text of README.md.

    name: the model's.
    about: what its config.json says.
    evaluations: the records of evaluation.json.
    sha256: of the checkpoint that was published, to tell scores of that file from those of others.
    pictured: samples.png is there.
    """
    settings = about.get("settings") or {}
    system, data = TITLES.get(about["system"], about["system"]), settings.get("DATASET_NAME") or "unknown data"
    kind = "the average of its training (EMA)" if about.get("averaged") else "as the optimizer left it"

    # Front matter, which model hubs read, then what the model is.
    lines = [
        "---", "pipeline_tag: text-to-image", "tags:", "- text-to-image", "- gan", f"- {about['system']}", "---", "",
        f"# {name}", "",
        f"{system}: a sentence in, an image of {about['image_size']} x {about['image_size']} pixels out. Trained on {data} "
        f"for {_counted(about)}; the generator is {kind}.", "",
    ]  # fmt: skip

    # What a reader looks for first: pictures, and how to use it.
    if pictured:
        lines += [f"![Captions and what the model drew for them]({PICTURE})", ""]
    lines += [
        "## Use", "",
        "```python", "from sampling.pipeline import TextToImage", "",
        'model = TextToImage.from_pretrained("path/to/this/folder")',
        f"images = model.generate([{_example(about)!r}], seed=0).images  # (N, H, W, 3) uint8", "```", "",
        "Every command of the project that takes `--checkpoint` takes this folder, `python -m serve` among them. Loading it "
        "runs no code from it.", "",
        f"The model knows {about['num_words']} words (`vocabulary.json`); others are left out and named. It reads the first "
        f"{about['max_words']} words of a caption.", "",
        *_precision(about), *_trainable(about), *_scores(evaluations, sha256), *_settings(settings),
        "## Limits", "",
        f"It draws what {data} shows and nothing else, and repeats what is one-sided there. Its images are no evidence of "
        "anything.", "",
    ]  # fmt: skip
    return "\n".join(lines)


def _counted(about: Mapping[str, Any]) -> str:
    step, epoch = about.get("step"), about.get("epoch")
    return f"{step} steps ({epoch} epochs)" if step else "a number of steps that its file does not tell"


def _precision(about: Mapping[str, Any]) -> list[str]:
    if not about.get("half"):
        return []
    return [
        "Its matrices and kernels are rounded to half precision: single values of an image may differ by a few levels of 255 "
        "from what the scored checkpoint draws.", "",
    ]  # fmt: skip


def _trainable(about: Mapping[str, Any]) -> list[str]:
    if not about.get("trainable"):
        return []
    return [
        "`discriminators.safetensors` is for a training that goes on from this folder (`TRAIN.NET_G`); drawing does not need it.",
        "",
    ]  # fmt: skip


def _example(about: Mapping[str, Any]) -> str:
    return next(iter(about.get("examples") or []), "a small red bird with black wings")


def is_result(record: Any) -> bool:
    """Whether this is a result of an evaluation as far as the card reads it."""
    if not isinstance(record, Mapping) or not isinstance(record.get("scores"), list):
        return False
    parts = [record.get(name) or {} for name in ("protocol", "checkpoint", "overrides", "not_computed")]
    if not all(isinstance(part, Mapping) for part in parts) or not isinstance(record.get("warnings") or [], list):
        return False

    # Every score has a name and a number.
    return all(
        isinstance(score, Mapping)
        and isinstance(score.get("name"), str)
        and isinstance(score.get("value"), (int, float))
        and isinstance(score.get("std") or 0.0, (int, float))
        for score in record["scores"]
    )


def _scores(evaluations: Sequence[Mapping[str, Any]], sha256: str | None) -> list[str]:
    """A table of every score with its protocol and the hash of what was scored, then the warnings."""
    lines = ["## Scores", ""]
    rows, remarks = [], []
    for record in evaluations:
        # Which protocol, and what was changed of it.
        protocol, checkpoint = record.get("protocol") or {}, record.get("checkpoint") or {}
        changed = ", ".join(f"{key} {value}" for key, value in (record.get("overrides") or {}).items())
        title = f"{protocol.get('name', 'unnamed')}{f' (changed: {changed})' if changed else ''}"
        scored = str(checkpoint.get("sha256") or "")

        # A row a score; those of another file are marked.
        for score in record["scores"]:
            spread = "" if score.get("std") is None else f" ± {score['std']:.3g}"
            other = "" if sha256 in (None, scored) else ", another file"
            hashed = f"`{scored[:16]}`{other}" if scored else "none"
            name = f"{score['name']}{' (flatters)' if score.get('flattering') else ''}"
            rows.append(f"| {name} | {score['value']:.6g}{spread} | {title} | {record.get('num_images', '')} | "
                        f"step {checkpoint.get('step')}, {hashed} |")  # fmt: skip

        # Below the table: what limits these scores, and what is missing.
        remarks += [f"- {title}: {warning}" for warning in record.get("warnings") or []]
        remarks += [
            f"- {title}: not computed: {what}: {why}" for what, why in (record.get("not_computed") or {}).items()
        ]
    if not rows:
        return [*lines, "None were computed.", ""]
    lines += ["| score | value | protocol | images | checkpoint (SHA-256) |", "|---|---|---|---|---|", *rows, ""]
    return [*lines, *(["Warnings:", "", *dict.fromkeys(remarks), ""] if remarks else [])]


def _settings(settings: Mapping[str, Any]) -> list[str]:
    """The settings of the training, one a line; nothing where the file has none."""
    # Nested settings with dotted keys, as `--set` takes them.
    pairs = list(_flat(settings))
    if not pairs:
        return []
    return [
        "## Settings",
        "",
        "| key | value |",
        "|---|---|",
        *(f"| `{key}` | `{value}` |" for key, value in pairs),
        "",
    ]


def _flat(settings: Mapping[str, Any], before: str = "") -> list[tuple[str, Any]]:
    pairs = []
    for key, value in settings.items():
        pairs += _flat(value, f"{before}{key}.") if isinstance(value, Mapping) else [(before + key, value)]
    return pairs


def without_local_paths(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings but for absolute paths, which mean nothing on another machine and tell of this one."""
    kept: dict[str, Any] = {}
    for key, value in settings.items():
        # Relative paths stay: they mean the project's own folders.
        if isinstance(value, Mapping):
            kept[key] = without_local_paths(value)
        elif not (isinstance(value, str) and (Path(value).is_absolute() or value.startswith("~"))):
            kept[key] = list(value) if isinstance(value, tuple) else value
    return kept
