"""The HTTP application in this process: answers, limits and every wrong kind of body."""

import asyncio
import io

import numpy as np
import pytest
from fastapi.testclient import TestClient

from helpers import InputError
from helpers.deployment.scoring import answer_rule, open_model
from helpers.deployment.service import ServeConfig, create_app, read_token
from helpers.models.files import save_classifier
from tests.deployment.test_scoring import CLASSES, PROVENANCE, make_classifier
from tests.fake_data import make_chip, write_chip
from tests.fake_weights import tiny  # noqa: F401  a fixture


@pytest.fixture(scope="module")
def scorer(tmp_path_factory, tiny):  # noqa: F811
    path = tmp_path_factory.mktemp("run") / "model_final.safetensors"
    return open_model(save_classifier(make_classifier(), path, PROVENANCE), threads=1)


def client(scorer, token=None, logits_of=None, **limits):
    async def predict(chip):
        return scorer.logits_of(chip[None])[0]

    config = ServeConfig.checked(model_path="model", **limits)
    app = create_app(config, scorer, answer_rule(scorer, config), logits_of or predict, token)
    return TestClient(app, raise_server_exceptions=False)


def encoded(tmp_path, suffix=".png", **options):
    return write_chip(tmp_path / f"chip{suffix}", make_chip(**options)).read_bytes()


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif", ".npy"])
def test_one_image_as_body(scorer, tmp_path, suffix):
    response = client(scorer).post("/predict", content=encoded(tmp_path, suffix, size=40))
    assert response.status_code == 200, response.text
    assert response.json()["model"] == scorer.digest
    (prediction,) = response.json()["predictions"]
    assert list(prediction["probabilities"]) == list(CLASSES)
    assert sum(prediction["probabilities"].values()) == pytest.approx(1, abs=1e-6)
    assert prediction["class"] == prediction["answer"]
    assert prediction["class"] == max(CLASSES, key=prediction["probabilities"].get)


def test_several_images_in_their_order(scorer, tmp_path):
    chips = {f"{i}.npy": make_chip(i, target=i) for i in range(3)}
    files = [("images", (n, write_chip(tmp_path / n, c).read_bytes())) for n, c in chips.items()]
    predictions = client(scorer).post("/predict", files=files).json()["predictions"]
    assert [p["name"] for p in predictions] == list(chips)
    logits = scorer.logits(np.stack([chip[[2, 0, 1]] for chip in chips.values()]))
    expected = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    found = [list(p["probabilities"].values()) for p in predictions]
    np.testing.assert_allclose(found, expected, atol=2e-6)


def pickled():
    stream = io.BytesIO()
    np.save(stream, np.array([print], dtype=object), allow_pickle=True)
    return stream.getvalue()


@pytest.mark.parametrize(
    "body, status, words",
    [
        (lambda p: b"", 422, "empty"),
        (lambda p: b"GIF89a and so on", 422, "is not one of JPEG"),
        (lambda p: b'{"image": 1}', 422, "is not one of JPEG"),
        (lambda p: encoded(p)[:100], 422, "damaged, cut off"),
        (lambda p: encoded(p, ".tif")[:200], 422, "damaged, cut off"),
        (lambda p: pickled(), 422, "never unpickled"),
        (lambda p: encoded(p, bands=4), 422, "4 bands"),
        (lambda p: encoded(p, ".npy", dtype="uint16"), 422, "uint16"),
        (lambda p: encoded(p, ".png", size=600), 413, "pixels"),
        (lambda p: encoded(p, ".tif", size=400), 413, "pixels"),
        (lambda p: bytes(2**20 + 1), 413, "1 MiB"),
    ],
)
def test_wrong_bodies(scorer, tmp_path, body, status, words):
    http = client(scorer, max_megabytes=1, max_pixels=90_000)
    response = http.post("/predict", content=body(tmp_path))
    assert response.status_code == status, response.text
    assert words in response.json()["detail"]
    assert "Traceback" not in response.text


def test_wrong_forms(scorer, tmp_path):
    http, image = client(scorer, max_images=2), encoded(tmp_path)
    form = {"content-type": "multipart/form-data; boundary=b"}
    text = b'--b\r\nContent-Disposition: form-data; name="a"\r\n\r\nx\r\n--b--\r\n'
    wrong = [
        (http.post("/predict", files=[("i", image)] * 3), 413, "Too many files"),
        (http.post("/predict", files={"i": ("a.png", b"no")}), 422, "a.png: is not one of"),
        (http.post("/predict", content=text, headers=form), 422, "'a' is no file"),
        (http.post("/predict", content=b"--b--\r\n", headers=form), 422, "no image"),
        (http.post("/predict", content=b"x", headers={"content-type": "multipart/form-data"}),
         422, "boundary"),
    ]  # fmt: skip
    for response, status, words in wrong:
        assert response.status_code == status, response.text
        assert words in response.json()["detail"]


def test_token(scorer, tmp_path):
    http, image = client(scorer, token="secret"), encoded(tmp_path)
    for header in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "secret"}):
        assert http.post("/predict", content=image, headers=header).status_code == 401
        assert http.get("/model", headers=header).status_code == 401
        assert http.get("/metrics", headers=header).status_code == 401
    assert http.get("/health").json() == {"status": "ok"}
    assert "/predict" in http.get("/").json()["detail"]
    header = {"Authorization": "Bearer secret"}
    assert http.post("/predict", content=image, headers=header).status_code == 200
    assert http.get("/model", headers=header).json()["model"] == scorer.digest
    assert 'classifier_requests_total{status="200"}' in http.get("/metrics", headers=header).text


def test_an_empty_token_is_refused(monkeypatch):
    monkeypatch.setenv("SERVE_TOKEN", "")
    with pytest.raises(InputError, match="SERVE_TOKEN"):
        read_token()


def test_a_full_queue(scorer, tmp_path):
    from httpx import ASGITransport, AsyncClient

    image = encoded(tmp_path)

    async def two_at_once():
        reached, go_on = asyncio.Event(), asyncio.Event()

        async def waits(chip):
            reached.set()
            await go_on.wait()
            return scorer.logits_of(chip[None])[0]

        app = client(scorer, logits_of=waits, queue=1).app
        async with AsyncClient(transport=ASGITransport(app), base_url="http://x") as http:
            first = asyncio.create_task(http.post("/predict", content=image))
            await reached.wait()
            second = await http.post("/predict", content=image)
            go_on.set()
            return await first, second, await http.post("/predict", content=image)

    first, second, third = asyncio.run(two_at_once())
    assert (first.status_code, second.status_code, third.status_code) == (200, 503, 200)
    assert int(second.headers["Retry-After"]) > 0


def test_a_failure_is_no_traceback(scorer, tmp_path):
    async def fails(chip):
        raise RuntimeError("secret detail")

    response = client(scorer, logits_of=fails).post("/predict", content=encoded(tmp_path))
    assert response.status_code == 500
    assert "secret" not in response.text
