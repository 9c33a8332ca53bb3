"""The whole server from its parts: API, page, guards, temporary folder; started and stopped by uvicorn."""

import errno
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import uvicorn
from fastapi.middleware.cors import CORSMiddleware

from miscc.errors import UserError
from miscc.progress import wants_colour
from serve.api import build_api
from serve.batcher import Batcher
from serve.drawing import Limits, Studio
from serve.guards import App, BearerToken, BodyLimit, KnownHosts, RateLimit, SecurityHeaders
from serve.image_store import ImageStore
from serve.metrics import Metrics
from serve.models import Model
from serve.page_guard import PageGuard

LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
PAGE = "/page"
TOKEN_VARIABLE = "TEXT_TO_IMAGE_TOKEN"


@dataclass(frozen=True)
class Settings:
    """How the server is run. The defaults are the safe ones: this machine alone, nothing from elsewhere, small requests."""

    host: str = "127.0.0.1"
    port: int = 7860
    page: bool = True
    batch_size: int = 16
    queue_size: int = 256  # images
    caption_length: int = 500  # characters
    body_bytes: int = 64 * 1024
    images_bytes: int = 256 * 2**20  # of the images kept for /bird and /birds
    rate: int | None = (
        None  # drawing requests of a client in a minute, 0: no limit; None: no limit on this machine, else 120
    )
    hosts: tuple[str, ...] = ()  # further names that the server answers to
    cors: tuple[str, ...] = ()  # origins whose scripts may call the API
    token: str = ""  # that the API asks for; "": none

    @property
    def is_local(self) -> bool:
        """Whether only this machine can reach the server."""
        return self.host in (*LOOPBACK, "::1")

    @property
    def requests_per_minute(self) -> int:
        return self.rate if self.rate is not None else 0 if self.is_local else 120


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """A folder of the server's own, readable by its user alone, gone at the end. Raises UserError where none can be made."""
    try:
        folder = Path(tempfile.mkdtemp(prefix="text-to-image-"))
    except OSError as error:
        raise UserError(
            f"no temporary folder can be made ({error.strerror}); set TMPDIR to a folder with free space"
        ) from None
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def build_app(models: dict[str, Model], settings: Settings, folder: Path) -> tuple[App, Studio]:
    """The guarded app, and what draws for it.

    folder: for temporary files.
    """
    # The batcher and the image store; the API over both.
    batcher = Batcher(settings.batch_size, settings.queue_size)
    most_images = min(Limits.images, settings.queue_size)  # more would never find room in the queue
    studio = Studio(models, batcher, Limits(caption_length=settings.caption_length, images=most_images))
    store = ImageStore(folder / "images", settings.images_bytes)
    api = build_api(studio, store, Metrics(batcher), PAGE + "/" if settings.page else None)
    if settings.page:
        from serve.page import mount_page  # Gradio, which --no-page does without

        mount_page(api, studio, PAGE, folder / "page", settings.token)

    # From the inside out: the first to see a request stands last.
    app: App = api
    if settings.page:
        app = PageGuard(app, PAGE, folder / "page", bool(settings.token))
    if settings.token:
        app = BearerToken(app, settings.token)
    app = BodyLimit(RateLimit(app, settings.requests_per_minute), settings.body_bytes)
    if settings.is_local:
        app = KnownHosts(app, [*LOOPBACK, *settings.hosts])

    # Outside the guards: a preflight carries no token, and a script can read a refusal only with these headers.
    if settings.cors:
        app = CORSMiddleware(
            app, allow_origins=list(settings.cors), allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type"],
        )  # fmt: skip
    return SecurityHeaders(app), studio


def serve(models: dict[str, Model], settings: Settings) -> None:
    """Run until SIGTERM or Ctrl-C; what is running then is finished first. Raises UserError for a host or port that is taken."""
    # uvicorn raises the signal again once it has stopped: then the temporary folder must go, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))

    with temporary_folder() as folder, _listen(settings.host, settings.port) as listener:
        app, studio = build_app(models, settings, folder)

        # Nothing is told about who asked, or what runs here.
        config = uvicorn.Config(
            app,
            log_level="warning",
            use_colors=None if wants_colour() else False,
            access_log=False,
            server_header=False,
            date_header=False,
            timeout_graceful_shutdown=30,
            limit_concurrency=1000,
        )

        # The address is printed once the port is bound.
        shown = f"[{settings.host}]" if ":" in settings.host else settings.host
        port = listener.getsockname()[1]
        print(f"http://{shown}:{port}{PAGE + '/' if settings.page else '/openapi.json'}", flush=True)
        try:
            uvicorn.Server(config).run(sockets=[listener])
        finally:
            studio.batcher.close(timeout=30)


def _listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0: any free one. Raises UserError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=1024)
    except OSError as error:
        # All but two errors are the address's; create_server raises a plain OSError for unknown names, too.
        reason = (error.strerror or "").partition(" (while")[0]
        if error.errno in (errno.EADDRINUSE, errno.EACCES):
            raise UserError(f"--port {port}: cannot be listened on ({reason}); take another") from None
        raise UserError(
            f"--host {host}: cannot be listened on ({reason}); give an address of this machine, such as 127.0.0.1"
        ) from None
