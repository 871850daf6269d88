"""The service as a person runs it, and chips of many requests in one prediction."""

import asyncio
import os
import signal
import subprocess
import sys

import numpy as np
import pytest

from helpers.deployment.batching import Batches
from helpers.records import ROOT
from tests.fake_data import make_chip, write_chip
from tests.faults.rows_predict import model

httpx = pytest.importorskip("httpx")


def test_the_command_answers_and_ends_without_loss(tmp_path):
    """Requests that are in flight at Ctrl-C get their answer, and the status is 0."""
    model(tmp_path)
    chip = write_chip(tmp_path / "chip.png", make_chip(size=40)).read_bytes()
    command = [
        sys.executable,
        "-m",
        "helpers.serve",
        "--model_path",
        "model.safetensors",
        "--port",
        "0",
    ]
    environment = {**os.environ, "SERVE_TOKEN": "secret", "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True,
    ) as service:  # fmt: skip
        try:
            started = service.stdout.readline()
            address = started.split(" at ")[1].split(";")[0]
            assert address.startswith("http://127.0.0.1:")
            with httpx.Client(base_url=address, timeout=60) as client:
                assert client.get("/health").json() == {"status": "ok"}
                assert client.post("/predict", content=chip).status_code == 401
                client.headers["Authorization"] = "Bearer secret"
                files = [("images", (f"{i}.png", chip)) for i in range(20)]
                answer = client.post("/predict", files=files)
                assert answer.status_code == 200 and len(answer.json()["predictions"]) == 20
                assert 'status="200"} 1.0' in client.get("/metrics").text
            service.send_signal(signal.SIGINT)
            out, err = service.communicate(timeout=60)
        finally:
            service.kill()
    assert service.returncode == 0 and "all requests are answered" in out and not err


def test_chips_that_wait_are_predicted_together():
    sizes = []

    def predict(chips):
        sizes.append(len(chips))
        return chips.mean(axis=(2, 3))

    async def ask():
        batches = Batches(predict, batch_size=4)
        chips = [np.full((2, 3, 3), i, np.float32) for i in range(9)]
        return await asyncio.gather(*map(batches.logits_of, chips))

    answers = asyncio.run(ask())
    np.testing.assert_array_equal(answers, [[i, i] for i in range(9)])
    assert sum(sizes) == 9 and max(sizes) == 4


def test_what_a_prediction_raises_reaches_those_who_asked_for_it():
    def predict(chips):
        if chips.max() > 0:
            raise ValueError("broken")
        return chips.mean(axis=(2, 3))

    async def ask():
        batches = Batches(predict, batch_size=1)
        chips = [np.full((1, 2, 2), i, np.float32) for i in (0, 1, 0)]
        return await asyncio.gather(*map(batches.logits_of, chips), return_exceptions=True)

    good, bad, after = asyncio.run(ask())
    assert good == after == [0] and isinstance(bad, ValueError)
