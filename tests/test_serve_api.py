"""The API on a real server: AttnGAN's routes, drawing, errors that say what to change, and each bound of the security list."""

import base64
import io
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import zipfile

import numpy as np
import pytest
from PIL import Image
from tiny_models import CAPTIONS, tiny_checkpoint, tiny_pipeline

pytest.importorskip("fastapi", reason="the API: pip install -r requirements-serve.txt")
from serve_help import Client, running, tiny_models

from serve import guards
from serve.app import Settings
from serve.image_store import ImageStore

BIRD, BIRDS, IMAGES = "/api/v1.0/bird", "/api/v1.0/birds", "/api/v1.0/images"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with running(tiny_models("ssa_gan", "attn_gan", "df_gan"), tmp_path_factory.mktemp("server")) as (client, studio):
        client.studio = studio
        yield client


def pixels(png):
    return np.asarray(Image.open(io.BytesIO(png)))


def drawn(answer):
    assert answer.status == 200, answer.body
    return [pixels(base64.b64decode(image["png"])) for image in answer.json()["images"]]


# -- AttnGAN's routes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("system", "sizes"), [("ssa_gan", [16] * 3), ("attn_gan", [8, 16, 32]), ("df_gan", [16] * 3)])
def test_bird_answers_as_attngans_api_does(system, sizes, tmp_path):
    with running(tiny_models(system), tmp_path) as (client, _):
        answer = client.post(BIRD, {"caption": CAPTIONS[0]})
        assert answer.status == 201
        bird = answer.json()["bird"]
        assert set(bird) == {"small", "medium", "large", "map1", "map2", "caption", "elapsed"}
        assert bird["caption"] == CAPTIONS[0] and bird["elapsed"] > 0
        base = f"http://127.0.0.1:{client.port}"
        for name, size in zip(("small", "medium", "large"), sizes, strict=True):
            assert bird[name].startswith(f"{base}/images/")
            image = client.get(bird[name].removeprefix(base))
            assert image.headers["content-type"] == "image/png" and pixels(image.body).shape == (size, size, 3)
        if system == "df_gan":
            assert bird["map1"] is bird["map2"] is None
        else:
            maps = [pixels(client.get(bird[name].removeprefix(base)).body) for name in ("map1", "map2")]
            shapes = [one.shape for one in maps]
            assert shapes == [(8, 8), (16, 16)] if system == "ssa_gan" else shapes[0][1] > 128 * 7


def test_birds_are_six_different_ones(server):
    answer = server.post(BIRDS, {"caption": CAPTIONS[0]})
    birds = answer.json()["bird"]
    assert answer.status == 201 and list(birds) == [f"bird{number}" for number in range(1, 7)]
    base = f"http://127.0.0.1:{server.port}"
    assert len({server.get(bird["large"].removeprefix(base)).body for bird in birds.values()}) == 6


def test_no_caption_is_a_400_as_json_and_the_root_names_the_version(server):
    for body in ({}, {"text": "a bird"}):
        answer = server.post(BIRD, body)
        assert answer.status == 400 and answer.json() == {"error": "caption: Field required"}
    assert server.get("/").body == b"Version 1.0\n"


# -- drawing ---------------------------------------------------------------------------------------------------------------


def test_images_are_those_of_generate(server):
    asked = {"captions": CAPTIONS, "n": 2, "seed": 5, "truncation": 0.5, "masks": True, "format": "json"}
    answer = server.post(IMAGES, asked)
    expected = tiny_pipeline().generate([c for c in CAPTIONS for _ in range(2)], seed=5, truncation=0.5)
    for image, own in zip(drawn(answer), expected.images, strict=True):
        assert np.abs(image.astype(int) - own).max() <= 1
    images = answer.json()["images"]
    assert [image["caption"] for image in images] == [c for c in CAPTIONS for _ in range(2)]
    assert [image["index"] for image in images] == list(range(6)) and images[0]["seed"] == 5
    mask = pixels(base64.b64decode(images[3]["masks"][2])) / 255
    assert np.abs(mask - expected.masks[2][3]).max() < 0.01


def test_the_same_seed_gives_the_same_image_alone_and_in_company(server):
    asked = {"captions": [CAPTIONS[0]], "seed": 11}
    alone = drawn(server.post(IMAGES, asked))[0]
    before = server.studio.batcher.num_batches
    found, barrier = {}, threading.Barrier(8)

    def ask(number):
        barrier.wait()
        company = {"captions": [CAPTIONS[number % 3]], "seed": number}
        found[number] = drawn(server.post(IMAGES, asked if number == 0 else company))[0]

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert server.studio.batcher.num_batches - before < 8  # they were joined
    assert np.abs(found[0].astype(int) - alone).max() <= 1 and not np.array_equal(found[0], found[3])


def test_zip_and_png(server):
    answer = server.post(IMAGES, {"captions": CAPTIONS[:2], "masks": True, "format": "zip"})
    archive = zipfile.ZipFile(io.BytesIO(answer.body))
    assert answer.headers["content-type"] == "application/zip"
    masks = [f"image{image:03d}_mask{stage}.png" for image in range(2) for stage in range(3)]
    assert set(archive.namelist()) == {"image000.png", "image001.png", "images.json", *masks}
    assert json.loads(archive.read("images.json"))[1]["caption"] == CAPTIONS[1]
    one = server.post(IMAGES, {"captions": CAPTIONS[:1], "format": "png"})
    assert one.headers["content-type"] == "image/png"
    assert np.array_equal(pixels(one.body), pixels(archive.read("image000.png")))


def test_models_are_chosen_by_name_and_unknown_words_are_named(server):
    answer = server.post(IMAGES, {"captions": ["a zyzzyva bird"], "model": "attn_gan"})
    assert drawn(answer)[0].shape == (32, 32, 3)
    assert answer.json()["model"] == "attn_gan" and answer.json()["images"][0]["unknown_words"] == ["zyzzyva"]
    models = server.get("/version").json()["models"]
    assert [(m["name"], m["image_size"], m["masks"]) for m in models][:2] == [
        ("ssa_gan", 16, [4, 8, 16]),
        ("attn_gan", 32, []),
    ]


def counts(client):
    """/metrics as {name without our prefix: value}."""
    lines = client.get("/metrics").body.decode().replace("text_to_image_", "").splitlines()
    return dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))


def test_health_metrics_and_description(server):
    assert server.get("/health").json() == {"status": "ok"}
    server.post(IMAGES, {"captions": CAPTIONS})
    numbers = counts(server)
    assert float(numbers["images_total"]) >= 3 and numbers["queue_images"] == "0"
    assert f'requests_total{{route="{IMAGES}",status="200"}}' in numbers
    assert float(numbers["draw_seconds_total"]) > 0
    described = server.get("/openapi.json").json()
    assert set(described["paths"]) == {"/", "/health", "/version", "/metrics", "/images/{name}", BIRD, BIRDS, IMAGES}
    for path in ("/docs", "/redoc"):  # their scripts come from elsewhere
        assert server.get(path).status == 404


# -- refusals --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        ({"captions": []}, "captions: List should have at least 1 item"),
        ({"captions": ["a bird"] * 65}, "captions: List should have at most 64 items"),
        ({"captions": ["a bird"] * 5, "n": 16}, "more than 64 images at once"),
        ({"captions": ["a bird"], "n": 0}, "n: Input should be greater than or equal to 1"),
        ({"captions": ["a bird"], "n": "2"}, "n: Input should be a valid integer"),
        ({"captions": ["a bird"], "seed": -1}, "seed: "),
        ({"captions": ["a bird"], "seed": 2**32}, "seed: "),
        ({"captions": ["a bird"], "truncation": 0}, "truncation: "),
        ({"captions": ["a bird"], "truncation": float("nan")}, "truncation: "),
        ({"captions": ["a bird"], "model": "none"}, "model: there is none of this name; take one of ssa_gan"),
        ({"captions": ["a bird"], "masks": True, "model": "df_gan"}, "masks: df_gan predicts none"),
        ({"captions": ["a bird", "a bird"], "format": "png"}, "png holds one image"),
        ({"captions": ["a bird"], "format": "gif"}, "format: "),
        ({"captions": ["a bird"], "colour": "red"}, "colour: Extra inputs are not permitted"),
        ({"captions": [" \n "]}, "caption: is empty"),
        ({"captions": ["a bird", " "]}, "caption 2 of 2: is empty"),
        ({"captions": ["zyzzyva qwerty"]}, "none of its words"),
        ({"captions": ["a bird " * 100]}, "has 700 characters; write at most 500"),
        ({"captions": ["a \x00 bird"]}, "control characters"),
        ([], "body: send a JSON object"),
        (b"{", "body: is no JSON"),
        (b"\xff\xfe", "body"),
        (b'{"captions": ["a \\ud800 bird"]}', "half a character"),
        (b'{"captions": ["a bird"], "\\ud800": 1}', "unable to parse"),
        (b"[" * 30_000, ""),
        (b'{"captions": ["a bird"], "seed": 1' + b"0" * 5000 + b"}", ""),
    ],
)
def test_errors_say_what_to_change(server, asked, reason):
    answer = server.post(IMAGES, asked)
    assert answer.status == 400, answer
    assert reason in answer.json()["error"] and "Traceback" not in answer.body.decode()


def test_malformed_requests_get_a_4xx_with_a_reason(server):
    """The first of `python -m bench.serve --malformed 1000`."""
    from bench.serve import malformed

    rng = random.Random(0)
    for _ in range(100):
        method, path, body, headers = malformed(rng)
        answer = server.request(method, path, body, headers)
        assert 400 <= answer.status < 500, (method, path, body, headers, answer)
        assert answer.json()["error"] and b"Traceback" not in answer.body
    assert server.get("/health").status == 200


def test_large_bodies_are_refused_before_they_are_read(tmp_path):
    with running(tiny_models(), tmp_path, body_bytes=1000) as (client, _):
        for body in (b"x" * 1001, iter([b"x" * 600] * 3)):  # of a known length, and in chunks
            answer = client.request("POST", IMAGES, body, {"Content-Type": "application/json"})
            assert answer.status == 413 and "larger than 1000 bytes" in answer.json()["error"]
        assert client.post(IMAGES, {"captions": CAPTIONS[:1]}).status == 200
        # A length that is only claimed is refused at once.
        with socket.create_connection(("127.0.0.1", client.port), timeout=10) as connection:
            connection.sendall(f"POST {BIRD} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999999\r\n\r\n".encode())
            assert b"413" in connection.recv(100)


def test_a_full_queue_says_so(tmp_path):
    with running(tiny_models(), tmp_path, queue_size=16, batch_size=16) as (client, studio):
        gate, model = threading.Event(), studio.first
        plain, model.draw = model.draw, lambda *arguments: gate.wait(20) and plain(*arguments)
        waiting = [
            threading.Thread(target=client.post, args=(IMAGES, {"captions": ["a bird"], "n": 16})) for _ in range(2)
        ]
        for thread in waiting:
            thread.start()
            time.sleep(0.3)
        answer = client.post(IMAGES, {"captions": ["a bird"]})
        assert answer.status == 503 and answer.headers["retry-after"] == "1"
        assert answer.json()["error"] == "the queue is full (16 of 16 images wait); ask again soon"
        gate.set()
        for thread in waiting:
            thread.join()
        assert client.post(IMAGES, {"captions": ["a bird"]}).status == 200


def test_what_a_client_gave_up_is_dropped(tmp_path):
    with running(tiny_models(), tmp_path) as (client, studio):
        gate, model = threading.Event(), studio.first
        plain, model.draw = model.draw, lambda *arguments: gate.wait(20) and plain(*arguments)
        body = json.dumps({"captions": ["a bird"], "n": 8}).encode()
        head = f"POST {IMAGES} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        head += f"Content-Length: {len(body)}\r\n\r\n"
        first = threading.Thread(target=client.post, args=(IMAGES, {"captions": ["a bird"], "n": 16}))
        first.start()
        time.sleep(0.3)
        with socket.create_connection(("127.0.0.1", client.port)) as connection:
            connection.sendall(head.encode() + body)
            wait_until(lambda: studio.batcher.waiting == 8)
        wait_until(lambda: studio.batcher.waiting == 0)
        gate.set()
        first.join()
        wait_until(lambda: studio.batcher.num_images == 16)
        assert client.post(IMAGES, {"captions": ["a bird"]}).status == 200
        assert studio.batcher.num_images == 17


def wait_until(condition):
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_failure_inside_is_a_500_without_its_traceback(tmp_path):
    with running(tiny_models(), tmp_path) as (client, studio):
        studio.first.draw = None
        answer = client.post(IMAGES, {"captions": ["a bird"]})
        assert answer.status == 500 and answer.json() == {"error": "drawing failed; the server's log says why"}


# -- the security list -----------------------------------------------------------------------------------------------------


def test_only_this_machine_is_served_by_default():
    assert Settings().host == "127.0.0.1" and Settings().is_local
    assert Settings().requests_per_minute == 0 and Settings(host="0.0.0.0").requests_per_minute == 120
    from serve.__main__ import parse_arguments

    assert parse_arguments([]).host == "127.0.0.1"


def test_foreign_host_headers_are_refused(tmp_path):
    with running(tiny_models(), tmp_path, hosts=("birds.example",)) as (client, _):
        for host, status in (("evil.example", 421), ("127.0.0.1.evil.example", 421), ("localhost:7860", 200),
                             ("birds.example", 200), ("[::1]:1", 200)):  # fmt: skip
            assert client.get("/health", Host=host).status == status


def test_a_token_guards_the_api_and_is_compared_in_constant_time(tmp_path, monkeypatch):
    compared, plain = [], guards.hmac.compare_digest
    monkeypatch.setattr(guards.hmac, "compare_digest", lambda a, b: compared.append((a, b)) or plain(a, b))
    with running(tiny_models(), tmp_path, token="söcret") as (client, _):
        for path in (IMAGES, BIRD, BIRDS):
            answer = client.post(path, {"captions": ["a bird"]})
            assert answer.status == 401 and answer.headers["www-authenticate"] == "Bearer"
        assert client.get("/metrics").status == client.get("/openapi.json").status == 401
        assert client.get("/health").status == client.get("/version").status == 200
        given = ["söcret".encode().decode("latin-1"), "s", "söcreT".encode().decode("latin-1"), ""]
        status = [
            client.post(IMAGES, {"captions": ["a bird"]}, Authorization=f"Bearer {token}").status for token in given
        ]
        assert status == [200, 401, 401, 401]
        assert client.post(IMAGES, {"captions": ["a bird"]}, Authorization="Basic söcret".encode()).status == 401
    assert len(compared) >= 4 and {b for _, b in compared} == {"söcret".encode()}


def test_cors_is_off_unless_asked_for(server, tmp_path):
    preflight = {"Origin": "https://app.example", "Access-Control-Request-Method": "POST"}
    for answer in (
        server.request("OPTIONS", IMAGES, headers=preflight),
        server.get("/health", Origin="https://app.example"),
    ):
        assert not any(name.startswith("access-control") for name in answer.headers)
    with running(tiny_models(), tmp_path, cors=("https://app.example",)) as (client, _):
        allowed = client.request("OPTIONS", IMAGES, headers=preflight)
        assert allowed.headers["access-control-allow-origin"] == "https://app.example"
        other = client.request("OPTIONS", IMAGES, headers=preflight | {"Origin": "https://evil.example"})
        assert "access-control-allow-origin" not in other.headers


def test_the_rate_is_limited_and_fills_up_again(tmp_path):
    with running(tiny_models(), tmp_path, rate=3) as (client, _):
        status = [client.post(IMAGES, {"captions": ["a bird"]}).status for _ in range(5)]
        assert status == [200, 200, 200, 429, 429] and client.get("/health").status == 200
        answer = client.post(BIRD, {"caption": "a bird"})
        assert "3 a minute are allowed" in answer.json()["error"] and int(answer.headers["retry-after"]) > 0
    now = [0.0]
    limit = guards.RateLimit(None, 60, clock=lambda: now[0])
    scope = {"method": "POST", "path": IMAGES, "client": ("10.0.0.1", 1)}
    assert [limit.check(scope) for _ in range(60)] == [None] * 60 and limit.check(scope)[0] == 429
    assert limit.check(scope | {"client": ("10.0.0.2", 1)}) is None
    now[0] = 2.0
    assert [limit.check(scope) is None for _ in range(3)] == [True, True, False]


def test_headers_keep_a_browser_at_home(server):
    headers = server.get("/nothing").headers
    assert "default-src 'self'" in headers["content-security-policy"] and headers["x-content-type-options"] == "nosniff"
    assert "server" not in server.get("/").headers or "uvicorn" in server.get("/").headers["server"]


def test_images_are_kept_up_to_a_size_and_under_names_that_cannot_be_guessed(tmp_path, server):
    store = ImageStore(tmp_path / "images", limit_bytes=2500)
    names = [store.add(bytes([number]) * 1000) for number in range(4)]
    assert [store.read(name) is not None for name in names] == [False, False, True, True]
    assert store.num_bytes == 2000 and len(list((tmp_path / "images").iterdir())) == 2
    assert len(set(names)) == 4 and all(len(name) == 26 for name in names)
    (tmp_path / "secret.png").write_bytes(b"secret")
    for name in ("../secret.png", "..%2fsecret.png", "secret.png", names[3] + "\n", ""):
        assert store.read(name) is None
    for path in ("/images/..%2f..%2fetc%2fpasswd", "/images/%2e%2e/secret.png", "/images/" + "a" * 22 + ".png"):
        assert server.get(path).status == 404


# -- as a process ----------------------------------------------------------------------------------------------------------


def start(arguments, page=False, **environment):
    options = [] if page else ["--no-page"]
    command = [sys.executable, "-m", "serve", "--gpu", "-1", "--port", "0", *options, *arguments]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
    )
    line = process.stdout.readline()
    assert line.startswith("http://127.0.0.1:"), process.stderr.read()
    return process, Client(int(line.split(":")[2].split("/")[0]))


def test_sigterm_finishes_what_is_running_and_leaves_nothing_behind(tmp_path):
    (tmp_path / "tmp").mkdir()
    checkpoint = tiny_checkpoint(tmp_path / "last.pth")
    process, client = start(["--checkpoint", str(checkpoint)], TMPDIR=str(tmp_path / "tmp"))
    answers = []
    asked = {"captions": [f"a {colour} bird" for colour in ("red", "blue", "yellow", "black")] * 4, "n": 4}
    ask = threading.Thread(target=lambda: answers.append(client.post(IMAGES, asked)))
    assert list((tmp_path / "tmp").iterdir())
    ask.start()
    wait_until(lambda: any(counts(client)[name] != "0" for name in ("queue_images", "images_total")))
    process.send_signal(signal.SIGTERM)
    ask.join(30)
    assert process.wait(30) == 0
    assert len(drawn(answers[0])) == 64
    assert not list((tmp_path / "tmp").iterdir())


def test_it_runs_where_gradio_is_missing(tmp_path):
    (tmp_path / "gradio.py").write_text("raise ImportError('no gradio', name='gradio')")
    checkpoint = tiny_checkpoint(tmp_path / "last.pth")
    process, client = start(["--checkpoint", str(checkpoint)], PYTHONPATH=str(tmp_path))
    assert client.post(IMAGES, {"captions": ["a bird"]}).status == 200
    process.terminate()
    assert process.wait(30) == 0


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ([], "nothing to serve; give --checkpoint"),
        (["--checkpoint", "/nothing/here.pth"], "no such weight file"),
        (["--checkpoint", "{checkpoint}", "--caption", "a bird"], "give both, or neither"),
        (["--checkpoint", "{checkpoint}", "--queue", "4"], "--queue 4: must be at least 16"),
        (["--checkpoint", "{checkpoint}", "--port", "{port}"], "take another"),
    ],
)
def test_bad_arguments_get_one_line(tmp_path, arguments, reason, server):
    checkpoint = tiny_checkpoint(tmp_path / "last.pth")
    filled = [word.format(checkpoint=checkpoint, port=server.port) for word in arguments]
    command = [sys.executable, "-m", "serve", "--gpu", "-1", "--no-page", *filled]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and reason in done.stderr and len(done.stderr.strip().splitlines()) == 1


def test_one_image_without_a_server_is_generates(tmp_path):
    checkpoint = tiny_checkpoint(tmp_path / "last.pth")
    command = [sys.executable, "-m", "serve", "--gpu", "-1", "--checkpoint", str(checkpoint), "--caption", "a red zyzzyva bird",
               "--seed", "3", "--out", str(tmp_path / "bird.png")]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "zyzzyva" in done.stderr
    expected = tiny_pipeline().generate(["a red bird"], seed=3).images[0]
    assert np.abs(pixels((tmp_path / "bird.png").read_bytes()).astype(int) - expected).max() <= 1
