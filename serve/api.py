"""The HTTP API: AttnGAN's own two routes, drawing for programs, health and counts. FastAPI alone; the page is page.py's."""

import asyncio
import base64
import io
import json
import logging
import secrets
import time
import zipfile
from collections.abc import Callable
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, RedirectResponse, Response
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException

from miscc.errors import UserError, WriteError
from miscc.pictures import encode_png
from serve.batcher import ClosedError, QueueFullError
from serve.drawing import MAX_SEED, Limits, Order, Picture, Studio
from serve.image_store import ImageStore
from serve.metrics import CountRequests, Metrics

logger = logging.getLogger(__name__)

VERSION = "1.0"
NUM_BIRDS = 6  # that AttnGAN's /birds draws
ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"description": "what to change in the request"},
    429: {"description": "too many requests"},
    503: {"description": "the queue is full, ask again; or the server cannot write files"},
}
_LIMITS = Limits()


class Caption(BaseModel):
    """A sentence to draw, as AttnGAN's API takes it."""

    model_config = ConfigDict(strict=True)
    caption: str = Field(examples=["a small red bird with black wings"])


class Images(BaseModel):
    """Images to draw."""

    model_config = ConfigDict(strict=True, extra="forbid")
    captions: list[str] = Field(min_length=1, max_length=_LIMITS.captions, examples=[["a small red bird"]])
    n: int = Field(1, ge=1, le=_LIMITS.per_caption, description="images of each caption")
    seed: int = Field(0, ge=0, le=MAX_SEED, description="the same seed gives the same images")
    truncation: Annotated[float, Field(gt=0, le=_LIMITS.truncation, allow_inf_nan=False)] | None = None
    masks: bool = Field(False, description="the masks of every stage, too (SSA-GAN)")
    format: Literal["json", "zip", "png"] = Field("json", description="JSON with base64, a zip file, or one PNG")
    model: str | None = Field(None, description="its name, as /version lists it; without it the first")


class GoneError(Exception):
    """The client no longer waits."""


def build_api(studio: Studio, store: ImageStore, metrics: Metrics, page: str | None = None) -> FastAPI:
    """The app without guards.

    page: where the page is, for browsers that ask for /; None without one.
    """
    # Errors and counts first: they are around every route.
    app = FastAPI(title="Text to image", version=VERSION, docs_url=None, redoc_url=None)
    _handle_errors(app)
    app.add_middleware(CountRequests, metrics=metrics)
    _add_drawing(app, studio)
    _add_attngan(app, studio, store)

    @app.get("/", response_class=PlainTextResponse, summary="The version; a browser is sent to the page")
    async def root(request: Request) -> Response:
        if page and "text/html" in request.headers.get("accept", ""):
            return RedirectResponse(page, status_code=307)
        return PlainTextResponse(f"Version {VERSION}\n")

    @app.get("/favicon.ico", include_in_schema=False)
    async def icon() -> Response:
        return Response(status_code=204)

    @app.get("/health", summary="Whether the server draws")
    async def health() -> Response:
        alive = studio.batcher.alive
        return JSONResponse({"status": "ok" if alive else "stopped"}, 200 if alive else 503)

    @app.get("/version", summary="Version and models")
    async def version() -> dict[str, Any]:
        return {"version": VERSION, "models": [model.describe() for model in studio.models.values()]}

    @app.get("/metrics", response_class=PlainTextResponse, summary="Counts for Prometheus")
    async def counts() -> Response:
        return PlainTextResponse(metrics.text(), media_type="text/plain; version=0.0.4")

    @app.get("/images/{name}", response_class=Response, summary="An image that /bird or /birds drew")
    async def image(name: str) -> Response:
        png = store.read(name)
        if png is None:
            raise HTTPException(404, "images: there is none of this name (any more); draw it again")
        return Response(png, media_type="image/png", headers={"cache-control": "private, max-age=3600"})

    return app


def _add_drawing(app: FastAPI, studio: Studio) -> None:
    """POST /api/v1.0/images."""

    @app.post("/api/v1.0/images", responses=ERRORS, summary="Draw captions")
    async def images(body: Images, request: Request) -> Response:
        # What does not go together is refused before anything is queued.
        start = time.monotonic()
        num_images, model = len(body.captions) * body.n, studio.model(body.model)
        if body.masks and not model.mask_sizes:
            raise UserError(f"masks: {model.name} predicts none; leave masks out")
        if body.format == "png" and (num_images != 1 or body.masks):
            raise UserError("format: png holds one image without masks; take zip or json for more")

        # Captions are encoded and files packed in threads, or other clients would wait for both.
        arguments = body.captions, body.n, body.seed, body.truncation, body.model
        order = await asyncio.to_thread(studio.submit, *arguments)
        pictures = await finished(order, request)
        elapsed = time.monotonic() - start
        return await asyncio.to_thread(_response, pictures, body, model.name, elapsed)


def _add_attngan(app: FastAPI, studio: Studio, store: ImageStore) -> None:
    """POST /api/v1.0/bird and /birds, as the API of AttnGAN's authors answers; the seed is new each time."""

    async def draw(body: Caption, request: Request, number: int) -> list[dict[str, Any]]:
        # A new seed each time, the model's own truncation.
        start = time.monotonic()
        arguments = [body.caption], number, secrets.randbelow(MAX_SEED), studio.truncation
        order = await asyncio.to_thread(studio.submit, *arguments)
        pictures = await finished(order, request)

        # Files that the answer names by URL.
        keep = _keeper(store, str(request.base_url))
        birds = [await asyncio.to_thread(_bird, picture, keep) for picture in pictures]
        elapsed = time.monotonic() - start
        return [bird | {"caption": body.caption, "elapsed": elapsed} for bird in birds]

    @app.post("/api/v1.0/bird", status_code=201, responses=ERRORS, summary="Draw a caption once")
    async def bird(body: Caption, request: Request) -> dict[str, Any]:
        return {"bird": (await draw(body, request, 1))[0]}

    @app.post("/api/v1.0/birds", status_code=201, responses=ERRORS, summary="Draw a caption six times")
    async def birds(body: Caption, request: Request) -> dict[str, Any]:
        drawn = await draw(body, request, NUM_BIRDS)
        return {"bird": {f"bird{number}": bird for number, bird in enumerate(drawn, start=1)}}


async def finished(order: Order, request: Request) -> list[Picture]:
    """The pictures, once all are drawn. Raises GoneError, and drops what has not begun, where the client goes away."""
    # Whichever comes first: all images, or the client's leaving.
    drawing = asyncio.gather(*(asyncio.wrap_future(future) for future in order.futures))
    leaving = asyncio.ensure_future(_leaves(request))
    try:
        await asyncio.wait({drawing, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not drawing.done():
            raise GoneError
        await drawing  # raises what drawing raised
        return order.pictures()
    finally:
        leaving.cancel()
        if not drawing.done():
            drawing.cancel()
            order.cancel()


async def _leaves(request: Request) -> None:
    """Returns when the client closes the connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _response(pictures: list[Picture], body: Images, model: str, elapsed: float) -> Response:
    """The images in the format that was asked for."""
    if body.format == "png":
        return Response(encode_png(pictures[0].image), media_type="image/png")

    # What each image is, and its files.
    described = [
        {"caption": p.caption, "seed": p.seed, "index": p.index, "truncation": p.truncation, "unknown_words": p.unknown}
        for p in pictures
    ]
    files = [{"png": encode_png(picture.image)} for picture in pictures]
    if body.masks:
        for entry, picture in zip(files, pictures, strict=True):
            entry |= {f"mask{stage}": encode_png(picture.mask(stage)) for stage in range(len(picture.drawn.masks))}

    # As one file, or inside JSON.
    if body.format == "zip":
        return Response(_zip(described, files), media_type="application/zip")
    images = []
    for about, entry in zip(described, files, strict=True):
        encoded = {name: base64.b64encode(data).decode("ascii") for name, data in entry.items()}
        masks = [encoded[name] for name in encoded if name != "png"]
        images.append(about | {"png": encoded["png"]} | ({"masks": masks} if body.masks else {}))
    return JSONResponse({"model": model, "elapsed": elapsed, "images": images})


def _zip(described: list[dict[str, Any]], files: list[dict[str, bytes]]) -> bytes:
    """image000.png, image000_mask0.png ... and images.json, which says what they are."""
    # Uncompressed: PNG files do not get smaller.
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as archive:
        for index, entry in enumerate(files):
            for name, data in entry.items():
                archive.writestr(f"image{index:03d}{'' if name == 'png' else f'_{name}'}.png", data)
        archive.writestr("images.json", json.dumps(described, indent=1, ensure_ascii=False))
    return stream.getvalue()


def _keeper(store: ImageStore, base_url: str) -> Callable[[Any], str]:
    """keep(pixels) -> the URL under which the image can be fetched from this server."""
    return lambda pixels: f"{base_url}images/{store.add(encode_png(pixels))}"


def _bird(picture: Picture, keep: Callable[[Any], str]) -> dict[str, Any]:
    """URLs of three sizes and two maps. A system with fewer sizes repeats its last, one without maps has null."""
    # AttnGAN has three sizes and two maps.
    sizes, maps = picture.drawn.images, picture.maps()
    urls = [keep(size) for size in sizes[-3:]]
    small, medium, large = [*urls, *[urls[-1]] * (3 - len(urls))]

    map_urls = [keep(pixels) for pixels in maps]
    map1, map2 = [*map_urls, *[map_urls[-1] if map_urls else None] * (2 - len(map_urls))]
    return {"small": small, "medium": medium, "large": large, "map1": map1, "map2": map2}


def _handle_errors(app: FastAPI) -> None:
    """Every error as {"error": what to change}."""

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        return JSONResponse({"error": "; ".join(map(_told, error.errors()[:5]))}, 400)

    @app.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> Response:
        # Starlette's own texts do not say what to change.
        hints = {
            404: "there is no such address; /openapi.json lists what there is",
            405: "another method is expected here",
        }
        known = error.detail if error.detail not in ("Not Found", "Method Not Allowed") else hints[error.status_code]
        return JSONResponse({"error": known}, error.status_code, error.headers)

    @app.exception_handler(UserError)
    async def user(request: Request, error: UserError) -> Response:
        return JSONResponse({"error": str(error)}, 400)

    @app.exception_handler(WriteError)
    async def unwritten(request: Request, error: WriteError) -> Response:
        return JSONResponse({"error": str(error)}, 503)

    @app.exception_handler(QueueFullError)
    @app.exception_handler(ClosedError)
    async def full(request: Request, error: Exception) -> Response:
        return JSONResponse({"error": str(error)}, 503, {"retry-after": "1"})

    @app.exception_handler(GoneError)
    async def gone(request: Request, error: GoneError) -> Response:
        return Response(status_code=499)

    @app.exception_handler(Exception)
    async def broken(request: Request, error: Exception) -> Response:
        return JSONResponse({"error": "drawing failed; the server's log says why"}, 500)


def _told(error: dict[str, Any]) -> str:
    """One of pydantic's errors in a few words, without the value that was sent."""
    place = ".".join(str(part) for part in error["loc"] if part != "body") or "body"

    # The body as a whole, then a single field.
    if error["type"] == "json_invalid":
        return "body: is no JSON; send the object that /openapi.json describes for this path"
    if error["type"] in ("model_attributes_type", "dict_type") or (error["type"] == "missing" and place == "body"):
        return "body: send a JSON object with Content-Type: application/json"
    return f"{place[:80]}: {error['msg'][:200]}"
