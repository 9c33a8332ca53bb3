"""The page: Gradio's components, mounted in the API's app. Drawing is the batcher's; what the page may reach, page_guard.py's."""

import asyncio
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Before Gradio is imported: nothing is sent anywhere, nothing is looked up.
os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1", "GRADIO_RUN_HISTORY": "False"}

import gradio as gr
import numpy as np
from fastapi import FastAPI

from miscc.errors import UserError
from miscc.pictures import overlay, resize_pixels
from miscc.vocabulary import tokenize
from serve.batcher import ClosedError, QueueFullError
from serve.drawing import MAX_SEED, Order, Picture, Studio
from serve.guards import same_token
from serve.models import Model

SHOWN_ERRORS = (UserError, QueueFullError, ClosedError)
NO_OVERLAY = "image alone"
MOST_IMAGES = 8  # of a caption, on the page
SHOWN_SIZE = 256  # pixels at which overlays and comparisons are shown at least
DEFAULT_CAPTION = "a small red bird with black wings"
CSS = """
.gradio-container { width: 100% !important; max-width: 1100px !important; margin: 0 auto !important; }
.gradio-container main, .gradio-container .wrap { width: 100%; }
.pictures .grid-container { grid-template-columns: repeat(auto-fill, minmax(min(130px, 40vw), 1fr)) !important; }
.pictures .grid-wrap { min-height: 0 !important; max-height: none !important; }
#gallery .grid-container { grid-template-columns: repeat(auto-fill, minmax(min(230px, 35vw), 1fr)) !important; }
.small-pixels img { image-rendering: pixelated; }
"""


def mount_page(app: FastAPI, studio: Studio, path: str, folder: Path, token: str = "") -> None:
    """Put the page under `path`.

    folder: where Gradio keeps what it shows.
    token: asked for as a password, "" for none.

    Every default of Gradio that opens something is set here, as mounting has other ones than `launch`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["GRADIO_TEMP_DIR"] = str(folder)

    gr.mount_gradio_app(
        app,
        build_page(studio),
        path,
        server_name="127.0.0.1",
        footer_links=[],
        run_history=False,
        auth=(lambda user, password: same_token(password, token)) if token else None,
        auth_message="Any name, and this server's token as the password." if token else None,
        allowed_paths=[],
        show_error=False,
        max_file_size="1kb",
        ssr_mode=False,
        enable_monitoring=False,
        pwa=False,
        mcp_server=False,
        theme=gr.themes.Default(
            font=["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"],
            font_mono=["ui-monospace", "Consolas", "monospace"],
        ),
        css=CSS,
    )


def build_page(studio: Studio) -> gr.Blocks:
    """Three tabs: draw, compare, walk."""
    with gr.Blocks(title="Text to image", analytics_enabled=False, delete_cache=(600, 1800)) as page:
        gr.Markdown("# Text to image\n" + "  \n".join(_described(model) for model in studio.models.values()))
        with gr.Tab("Draw"):
            _draw_tab(studio)
        with gr.Tab("Compare"):
            _compare_tab(studio)
        if any(model.mixes_captions for model in studio.models.values()):
            with gr.Tab("Walk"):
                _walk_tab(studio)
    # A queue of its own before the batcher's: it shows users their position.
    page.queue(max_size=64, default_concurrency_limit=16, api_open=False)
    return page


# -- draw ------------------------------------------------------------------------------------------------------------------


def _draw_tab(studio: Studio) -> None:
    # What to draw.
    first = studio.first
    caption = _caption_box(studio, "Caption")
    words = gr.HighlightedText(
        label="What the model reads", value=read_words(studio, caption.value, first.name),
        color_map={"unknown": "red", "left out": "gray"}, show_legend=False, elem_id="words",
    )  # fmt: skip
    with gr.Row():
        model = _model_choice(list(studio.models), "Model")
        number = gr.Slider(1, MOST_IMAGES, value=4, step=1, label="Images", elem_id="number")
        seed, truncation = _noise_inputs(studio)

    # What was drawn, and how it is shown.
    button = gr.Button("Draw", variant="primary", elem_id="draw")
    status = gr.Markdown(elem_id="status")
    gallery = _image_gallery(studio)
    with gr.Row(visible=bool(first.mask_sizes)) as mask_row:
        shown = gr.Radio(_overlays(first), value=NO_OVERLAY, label="Mask laid over", elem_id="overlay")
        strength = gr.Slider(0, 1, value=0.7, step=0.05, label="Strength of the mask", elem_id="strength")
    attention = _attention_gallery(first)

    # Captions to start from.
    examples = first.examples or [DEFAULT_CAPTION]
    offered = gr.Dataset(
        components=[caption], samples=[[one] for one in examples], label="Examples", elem_id="examples"
    )

    drawn = gr.State(None)  # arguments of `Studio.submit`, not what was drawn: images come again from their seed

    # What happens; a mask laid over draws again, which keeps no images in the browser's session.
    async def draw(text, how_many, number_of_noise, cut, name, overlaid, how_strong):
        arguments = {
            "captions": [text], "per_caption": int(how_many), "seed": _seed(number_of_noise), "truncation": cut or None,
            "model": name,
        }  # fmt: skip
        pictures, seconds = await _drawn(studio, arguments)
        said = _status(pictures, seconds, arguments)
        strips = _strips(pictures) if studio.model(name).attends else []
        return _shown(pictures, overlaid, how_strong), said, strips, arguments

    async def lay_over(arguments, overlaid, how_strong):
        if arguments is None:
            return gr.skip()
        pictures, _ = await _drawn(studio, arguments)
        return _shown(pictures, overlaid, how_strong)

    # Events: of drawing, and those that only change what is shown, without a place in the queue.
    events = {"api_visibility": "private", "concurrency_limit": 16}
    silent: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden", "concurrency_limit": None}

    inputs = [caption, number, seed, truncation, model, shown, strength]
    gr.on([button.click, caption.submit], draw, inputs, [gallery, status, attention, drawn], **events)
    gr.on([shown.input, strength.release], lay_over, [drawn, shown, strength], gallery, **events)
    caption.change(
        lambda text, name: read_words(studio, text, name), [caption, model], words, trigger_mode="always_last", **silent
    )
    chosen = [mask_row, shown, attention, words]
    model.change(lambda name, text: _of_model(studio, name, text), [model, caption], chosen, **silent)
    offered.click(lambda sample: sample[0], offered, caption, **silent)


def _of_model(studio: Studio, name: str, text: str) -> tuple:
    """What another model changes on the tab: masks, overlays, attention, and the words that are read."""
    chosen = studio.model(name)
    return (
        gr.update(visible=bool(chosen.mask_sizes)),
        gr.update(choices=_overlays(chosen), value=NO_OVERLAY),
        gr.update(visible=chosen.attends),
        read_words(studio, text, name),
    )


def _image_gallery(studio: Studio) -> gr.Gallery:
    """The drawn images, which can be downloaded."""
    return gr.Gallery(
        label="Images", format="png", columns=4, height="auto", object_fit="contain", interactive=False,
        buttons=["download", "fullscreen"], elem_id="gallery", elem_classes=_picture_classes(studio),
    )  # fmt: skip


def _attention_gallery(model: Model) -> gr.Gallery:
    """Where each word looks; hidden for models without word attention."""
    return gr.Gallery(
        label="Where each word looks", format="png", columns=1, object_fit="contain", visible=model.attends,
        interactive=False, buttons=["download", "fullscreen"], elem_id="attention",
    )  # fmt: skip


def read_words(studio: Studio, caption: str | None, name: str | None = None) -> list[tuple[str, float | str | None]]:
    """The words of a caption, each with why the model does not read it: "unknown", "left out" beyond its length, or None."""
    model, known, read = studio.model(name), 0, []

    # Only known words count: those beyond the longest caption that the model takes are left out.
    for word in tokenize((caption or "")[: studio.limits.caption_length])[:100]:
        is_known = word in model.vocabulary and word != model.vocabulary.words[0]
        known += is_known
        read.append((f"{word} ", "unknown" if not is_known else "left out" if known > model.max_words else None))
    return read


def _shown(pictures: Sequence[Picture], overlaid: str, strength: float) -> list[tuple[np.ndarray, str]]:
    """Images for a gallery, each under its seed; with the mask of a stage over them, enlarged so that it can be seen."""
    labels = [f"#{picture.index}, seed {picture.seed}" for picture in pictures]
    overlays = _overlays(pictures[0])
    if overlaid not in overlays[1:]:  # none, or of a model chosen since
        return [(picture.image, label) for picture, label in zip(pictures, labels, strict=True)]

    # A mask is smaller than the image may be: both at a size that shows it.
    stage = overlays.index(overlaid) - 1
    return [
        (overlay(_enlarged(picture.image), picture.drawn.masks[stage], strength), f"{label}, {overlaid}")
        for picture, label in zip(pictures, labels, strict=True)
    ]


def _strips(pictures: Sequence[Picture]) -> list[tuple[np.ndarray, str]]:
    stages = range(len(pictures[0].drawn.attention))
    return [(p.attention_strip(stage), f"image {p.index}, stage {stage + 2}") for p in pictures for stage in stages]


def _overlays(model: Model | Picture) -> list[str]:
    """What may lie over an image: nothing, or the mask of a stage by its size in pixels."""
    sizes = model.mask_sizes if isinstance(model, Model) else [mask.shape[0] for mask in model.drawn.masks]
    return [NO_OVERLAY, *(f"{size} px" for size in sizes)]


# -- compare ---------------------------------------------------------------------------------------------------------------


def _compare_tab(studio: Studio) -> None:
    captions = [*studio.first.examples, "a large blue bird with white wings"]
    with gr.Row():
        with gr.Column():
            left, left_model = _caption_box(studio, "Left caption"), _model_choice(list(studio.models), "Left model")
        with gr.Column():
            right = _caption_box(studio, "Right caption", captions[1 if len(captions) > 2 else -1])
            right_model = _model_choice(list(studio.models), "Right model", -1)
    with gr.Row():
        seed, truncation = _noise_inputs(studio)

    # Both images under a slider.
    button = gr.Button("Compare", variant="primary", elem_id="compare")
    status = gr.Markdown()
    slider = gr.ImageSlider(
        label="Left and right, from the same noise", format="png", interactive=False, buttons=["fullscreen"],
        elem_id="slider", elem_classes=_picture_classes(studio),
    )  # fmt: skip

    async def compare(left_text, right_text, left_name, right_name, number_of_noise, cut):
        noise = {"seed": _seed(number_of_noise), "truncation": cut or None}
        sides = [
            _drawn(studio, {"captions": [text], "model": name} | noise)
            for text, name in ((left_text, left_name), (right_text, right_name))
        ]

        # At one size, so that the slider fits.
        (one, seconds), (other, more) = await asyncio.gather(*sides)
        size = max(SHOWN_SIZE, *(picture.image.shape[0] for picture in (*one, *other)))
        pair = tuple(resize_pixels(picture.image, size) for picture in (*one, *other))
        unknown = list(dict.fromkeys(word for picture in (*one, *other) for word in picture.unknown))
        return pair, f"seed {noise['seed']}, {max(seconds, more):.2f} s{_left_out(unknown)}"

    inputs = [left, right, left_model, right_model, seed, truncation]
    gr.on(
        [button.click, left.submit, right.submit], compare, inputs, [slider, status],
        api_visibility="private", concurrency_limit=16,
    )  # fmt: skip


# -- walk ------------------------------------------------------------------------------------------------------------------


def _walk_tab(studio: Studio) -> None:
    with gr.Row():
        first = _caption_box(studio, "From")
        second = _caption_box(studio, "To", "a large blue bird with white wings")
    names = [name for name, model in studio.models.items() if model.mixes_captions]
    with gr.Row():
        model = _model_choice(names, "Model")
        seed, truncation = _noise_inputs(studio)

    button = gr.Button("Walk", variant="primary", elem_id="walk")
    status = gr.Markdown()
    gallery = gr.Gallery(
        label="From one caption to the other", format="png", columns=8, object_fit="contain", interactive=False,
        buttons=["download", "fullscreen"], elem_id="steps", elem_classes=_picture_classes(studio),
    )  # fmt: skip

    # One call draws all steps.
    async def walk(start, end, number_of_noise, cut, name):
        begun = time.monotonic()
        try:
            arguments = start, end, _seed(number_of_noise), cut or None, name
            future, unknown = await asyncio.to_thread(studio.submit_walk, *arguments)
            images = await asyncio.wrap_future(future)
        except SHOWN_ERRORS as error:
            raise gr.Error(str(error), print_exception=False) from None

        # Each under its way from one caption to the other.
        steps = [(image, f"{100 * step // (len(images) - 1)} %") for step, image in enumerate(images)]
        return steps, f"{len(images)} images in {time.monotonic() - begun:.2f} s{_left_out(unknown)}"

    gr.on(
        [button.click, first.submit, second.submit], walk, [first, second, seed, truncation, model], [gallery, status],
        api_visibility="private", concurrency_limit=16,
    )  # fmt: skip


# -- shared ----------------------------------------------------------------------------------------------------------------


async def _drawn(studio: Studio, arguments: dict[str, Any]) -> tuple[list[Picture], float]:
    """Pictures and the seconds they took. Gives them up where the page that asked is closed; errors become messages."""
    begun = time.monotonic()
    order: Order | None = None
    try:
        order = await asyncio.to_thread(studio.submit, **arguments)
        await asyncio.gather(*(asyncio.wrap_future(future) for future in order.futures))
        return order.pictures(), time.monotonic() - begun
    except SHOWN_ERRORS as error:
        raise gr.Error(str(error), print_exception=False) from None
    except asyncio.CancelledError:
        if order is not None:
            order.cancel()
        raise


def _status(pictures: Sequence[Picture], seconds: float, arguments: dict[str, Any]) -> str:
    cut = "no truncation" if arguments["truncation"] is None else f"truncation {arguments['truncation']:g}"
    many = "1 image" if len(pictures) == 1 else f"{len(pictures)} images"
    return f"{many} in {seconds:.2f} s, seed {arguments['seed']}, {cut}{_left_out(pictures[0].unknown)}"


def _left_out(unknown: Sequence[str]) -> str:
    return f"; unknown to the model and left out: {', '.join(unknown)}" if unknown else ""


def _caption_box(studio: Studio, label: str, text: str = "") -> gr.Textbox:
    value = text or next(iter(studio.first.examples), DEFAULT_CAPTION)
    return gr.Textbox(
        value, label=label, lines=1, max_lines=3, max_length=studio.limits.caption_length, submit_btn=False
    )


def _model_choice(names: Sequence[str], label: str, index: int = 0) -> gr.Dropdown:
    return gr.Dropdown(list(names), value=names[index], label=label, visible=len(names) > 1, filterable=False)


def _noise_inputs(studio: Studio) -> tuple[gr.Number, gr.Slider]:
    seed, own = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=MAX_SEED), studio.truncation or 0
    return seed, gr.Slider(0, max(2, own), value=own, step=0.05, label="Truncation (0: none)")


def _picture_classes(studio: Studio) -> list[str]:
    small = all(model.image_size < 128 for model in studio.models.values())
    return ["pictures", *(["small-pixels"] if small else [])]


def _seed(value: float | None) -> int:
    if value is None:
        raise gr.Error("seed: give a whole number", print_exception=False)
    return int(value)


def _enlarged(image: np.ndarray) -> np.ndarray:
    return resize_pixels(image, SHOWN_SIZE) if image.shape[0] < SHOWN_SIZE else image


def _described(model: Model) -> str:
    origin = model.origin
    trained = f", trained on {origin['data']}" if origin.get("data") else ""
    steps = f" for {origin['step']} steps" if origin.get("step") else ""
    return f"{model.name}: {model.system}, {model.image_size} px, {len(model.vocabulary)} words{trained}{steps}"
