"""What a server meets besides good requests: scripts of other origins, small queues, taken ports, full disks, long captions."""

import errno
import shutil
import socket
import tempfile
import threading
import time
from pathlib import Path

import pytest
from tiny_models import CAPTIONS, tiny_checkpoint

pytest.importorskip("fastapi", reason="the API: pip install -r requirements-serve.txt")
from serve_help import running, tiny_models

from miscc.errors import UserError, WriteError
from serve import app as serving
from serve.__main__ import main, parse_arguments
from serve.image_store import ImageStore

BIRD, IMAGES = "/api/v1.0/bird", "/api/v1.0/images"
ORIGIN = "https://app.example"


# -- cors ------------------------------------------------------------------------------------------------------------------


def test_cors_works_with_a_token_and_refusals_can_be_read(tmp_path):
    with running(tiny_models(), tmp_path, cors=(ORIGIN,), token="secret", rate=3, body_bytes=1000) as (client, _):
        asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
        preflight = client.request("OPTIONS", IMAGES, headers={"Origin": ORIGIN, **asked})
        assert preflight.status == 200 and preflight.headers["access-control-allow-origin"] == ORIGIN
        assert "authorization" in preflight.headers["access-control-allow-headers"].lower()

        # 200, and the refusal of each guard.
        one, token = {"captions": CAPTIONS[:1]}, {"Origin": ORIGIN, "Authorization": "Bearer secret"}
        answers = [client.post(IMAGES, one, **token), client.post(IMAGES, one, Origin=ORIGIN),
                   client.post(IMAGES, {"captions": ["a bird " * 300]}, **token),
                   *(client.post(IMAGES, one, **token) for _ in range(2))]  # fmt: skip
        assert [answer.status for answer in answers] == [200, 401, 413, 200, 429]
        assert {answer.headers.get("access-control-allow-origin") for answer in answers} == {ORIGIN}

        # Other origins get neither, and the headers of security are there as before.
        other = client.post(IMAGES, one, Origin="https://evil.example")
        assert "access-control-allow-origin" not in other.headers
        assert preflight.headers["x-content-type-options"] == "nosniff"


# -- small queues, and what cannot be started ------------------------------------------------------------------------------


def test_a_request_larger_than_the_queue_is_a_400(tmp_path):
    with running(tiny_models(), tmp_path, queue_size=8, batch_size=4) as (client, _):
        answer = client.post(IMAGES, {"captions": CAPTIONS[:1], "n": 9})
        assert answer.status == 400 and "are more than 8 images at once" in answer.json()["error"]
        assert client.post(IMAGES, {"captions": CAPTIONS[:1], "n": 8}).status == 200


@pytest.mark.parametrize(("queue", "batch", "least"), [(7, 4, 8), (11, 12, 12)])
def test_a_queue_holds_what_is_drawn_at_once(tmp_path, queue, batch, least):
    checkpoint = str(tiny_checkpoint(tmp_path / "last.pth"))
    arguments = ["--gpu", "-1", "--checkpoint", checkpoint, "--queue", str(queue), "--batch-size", str(batch)]
    with pytest.raises(
        UserError, match=f"--queue {queue}: must be at least {least}; a batch has {batch} images, a walk 8"
    ):
        main(arguments)


@pytest.mark.parametrize("port", ["70000", "65536", "-1"])
def test_impossible_ports_are_refused_before_models_load(port, capsys):
    with pytest.raises(SystemExit):
        parse_arguments(["--port", port])
    assert f"must be 0 to 65535, not {port}" in capsys.readouterr().err
    assert [parse_arguments(["--port", port]).port for port in ("0", "65535")] == [0, 65535]


@pytest.mark.parametrize("host", ["nohost.invalid", "8.8.8.8"])  # an unknown name, another machine's address
def test_a_bad_host_is_not_the_ports_fault(host):
    with pytest.raises(UserError, match=f"--host {host}: cannot be listened on") as caught:
        serving._listen(host, 0)
    assert "--port" not in str(caught.value) and "while attempting" not in str(caught.value)


def test_a_taken_port_is_named():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"--port {port}: cannot be listened on .*; take another"):
            serving._listen("127.0.0.1", port)


def test_a_missing_temporary_folder_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    with pytest.raises(UserError, match="no temporary folder can be made .* set TMPDIR"), serving.temporary_folder():
        pass


# -- images that are kept --------------------------------------------------------------------------------------------------


def test_a_full_disk_leaves_no_part_of_an_image_and_is_a_503(tmp_path, monkeypatch):
    def full(path, content):
        with path.open("wb") as stream:
            stream.write(content[:5])
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    with running(tiny_models(), tmp_path) as (client, _):
        monkeypatch.setattr(Path, "write_bytes", full)
        answer = client.post(BIRD, {"caption": CAPTIONS[0]})
        assert answer.status == 503 and "cannot keep any (No space left on device)" in answer.json()["error"]
        assert str(tmp_path) not in answer.json()["error"] and not list((tmp_path / "images").iterdir())
        assert client.post(IMAGES, {"captions": CAPTIONS[:1]}).status == 200

        # There is room again.
        monkeypatch.undo()
        assert client.post(BIRD, {"caption": CAPTIONS[0]}).status == 201


def test_a_folder_that_was_cleaned_away_is_made_again(tmp_path):
    store = ImageStore(tmp_path / "server" / "images")
    store.add(b"before")
    shutil.rmtree(tmp_path / "server")
    assert store.read(store.add(b"after")) == b"after"
    assert (tmp_path / "server" / "images").stat().st_mode & 0o777 == 0o700

    # A folder that cannot be made.
    shutil.rmtree(tmp_path / "server")
    (tmp_path / "server").write_text("in the way")
    with pytest.raises(WriteError, match="cannot keep any"):
        store.add(b"never")


# -- captions and settings -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("path", "asked"), [(IMAGES, {"captions": CAPTIONS[:1]}), (BIRD, {"caption": CAPTIONS[0]})])
def test_others_are_answered_while_captions_are_encoded(tmp_path, monkeypatch, path, asked):
    with running(tiny_models(), tmp_path) as (client, studio):
        gate, reached, plain = threading.Event(), threading.Event(), studio.submit

        def slow(*arguments):
            reached.set()
            gate.wait(10)
            return plain(*arguments)

        monkeypatch.setattr(studio, "submit", slow)
        answers = []
        drawing = threading.Thread(target=lambda: answers.append(client.post(path, asked)))
        drawing.start()
        assert reached.wait(10)
        start = time.monotonic()
        assert client.get("/health").status == 200 and time.monotonic() - start < 5
        gate.set()
        drawing.join()
        assert answers[0].status in (200, 201)


def test_a_models_own_truncation_is_kept_within_the_limit(tmp_path):
    models = tiny_models()
    with running(models, tmp_path) as (client, studio):
        for own, used in ((6.0, 5.0), (0.5, 0.5), (None, None)):
            models["ssa_gan"].truncation = own
            assert studio.truncation == used and client.post(BIRD, {"caption": CAPTIONS[0]}).status == 201
