"""The service as a person runs it, and chips of many requests in one prediction."""

import asyncio
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial

import httpx
import numpy as np
import psutil
import pytest

from helpers import serve
from helpers.deployment import servers
from helpers.deployment.batching import Batches
from helpers.deployment.servers import ServerConfig
from helpers.records import ROOT
from tests.fake_data import make_chip, write_chip
from tests.faults.rows_predict import model

CLIENTS = 4
TOKEN = {"Authorization": "Bearer secret"}


@contextmanager
def service(folder, *options):
    """The command in a process of its own, and the address that it says it serves at.

    Started as the background job of a shell's script is: with SIGINT ignored.
    """
    model(folder)
    command = [sys.executable, "-m", "helpers.serve", "--model_path", "model.safetensors"]
    environment = {**os.environ, "SERVE_TOKEN": "secret", "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [*command, "--port", "0", *options], cwd=folder, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
    ) as process:  # fmt: skip
        try:
            yield process, process.stdout.readline().split(" at ")[1].split(";")[0]
        finally:
            process.kill()


def ends_without_loss(process):
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    return process.returncode == 0 and "all requests are answered" in out and not err


def chip_file(folder):
    return write_chip(folder / "chip.png", make_chip(size=40)).read_bytes()


def test_the_command_answers_and_ends_without_loss(tmp_path):
    """Requests that are in flight at Ctrl-C get their answer, and the status is 0."""
    chip = chip_file(tmp_path)
    with service(tmp_path) as (process, address):
        assert address.startswith("http://127.0.0.1:")
        with httpx.Client(base_url=address, timeout=60) as client:
            assert client.get("/health").json() == {"status": "ok"}
            assert client.post("/predict", content=chip).status_code == 401
            client.headers.update(TOKEN)
            files = [("images", (f"{i}.png", chip)) for i in range(20)]
            answer = client.post("/predict", files=files)
            assert answer.status_code == 200 and len(answer.json()["predictions"]) == 20
            assert 'status="200"} 1.0' in client.get("/metrics").text
        assert ends_without_loss(process)


@contextmanager
def asked_all_the_time(address, chip):
    """Statuses of the answers so far, and errors of requests without one, of several clients."""
    statuses, lost, over = [], [], threading.Event()

    def ask():
        with httpx.Client(base_url=address, timeout=60, headers=TOKEN) as client:
            while not over.is_set():
                try:
                    statuses.append(client.post("/predict", content=chip).status_code)
                except httpx.TransportError as error:
                    lost.append(error)

    with ThreadPoolExecutor(CLIENTS) as pool:
        for _ in range(CLIENTS):
            pool.submit(ask)
        try:
            wait_until(lambda: len(statuses) >= 8)
            yield statuses, lost
        finally:
            over.set()


def wait_until(what, seconds=300):
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)


def new_replica(process):
    """Number of the next process that says it is ready."""
    return int(process.stdout.readline().removeprefix("a replica is ready, process "))


def ends_with_one_error(process):
    """A replica has nothing to load, says the service, and does not claim that all is well."""
    out, err = process.communicate(timeout=120)
    assert process.returncode == 2 and "all requests are answered" not in out
    assert err.startswith("error: a replica could not start") and err.count("\n") == 1
    return "model.safetensors" in err


@pytest.mark.parametrize("waited_for", [False, True])
def test_a_killed_replica_loses_what_it_had_in_flight_and_comes_back(tmp_path, waited_for):
    """Also one whose sign is waited for when it dies: the minute of a hung one is not over then."""
    with service(tmp_path, "--replicas", "2") as (process, address):
        replicas = {new_replica(process), new_replica(process)}
        with asked_all_the_time(address, chip_file(tmp_path)) as (statuses, lost):
            if waited_for:
                os.kill(min(replicas), signal.SIGSTOP)
                time.sleep(2)  # the supervisor asks twice a second
            killed = time.monotonic()
            os.kill(min(replicas), signal.SIGKILL)
            replicas.add(new_replica(process))
            assert time.monotonic() - killed < servers._HUNG - 2
        assert len(replicas) == 3 and len(lost) <= CLIENTS
        assert set(statuses) == {200}
        counts = httpx.get(f"{address}/metrics", headers=TOKEN).text
        (answered,) = re.findall(r'requests_total{status="200"} ([0-9.]+)', counts)
        assert len(statuses) <= float(answered) <= len(statuses) + len(lost)
        assert ends_without_loss(process)


def test_a_replica_without_its_model_ends_the_service(tmp_path):
    with service(tmp_path, "--replicas", "2") as (process, _):
        replicas = {new_replica(process), new_replica(process)}
        (tmp_path / "model.safetensors").unlink()
        os.kill(min(replicas), signal.SIGKILL)
        assert ends_with_one_error(process)


@contextmanager
def service_on_ray(folder, *options):
    """`service` of two replicas on Ray that are ready; skips where Ray cannot be started."""
    pytest.importorskip("ray.serve", reason="requirements-ray.txt is not installed")
    options = ("--engine", "ray", "--replicas", "2", "--threads", "1", *options)
    with service(folder, *options) as (process, address):
        if not process.stdout.readline():
            error = process.stderr.read()
            assert "ray: cannot be started here" in error  # ray-project/ray issue 65983
            pytest.skip(f"Ray gives its helpers 15 s, and this machine is too busy: {error}")
        yield process, address


def replicas_on_ray(process):
    """Numbers of the processes that Ray calls its replicas and that answer its proxy."""
    found = set()
    for child in psutil.Process(process.pid).children(recursive=True):
        with suppress(psutil.Error):
            if "ray::ServeReplica" in " ".join(child.cmdline()):
                sockets = child.net_connections("tcp4")
                if any(s.status == "LISTEN" and s.laddr.ip == "127.0.0.1" for s in sockets):
                    found.add(child.pid)
    return found


def test_a_killed_replica_on_ray_loses_what_it_had_in_flight_and_comes_back(tmp_path):
    with service_on_ray(tmp_path) as (process, address):
        wait_until(lambda: len(replicas_on_ray(process)) == 2)
        before = replicas_on_ray(process)
        with asked_all_the_time(address, chip_file(tmp_path)) as (statuses, lost):
            os.kill(min(before), signal.SIGKILL)
            wait_until(lambda: len(replicas_on_ray(process) - before) == 1)
            answered = len(statuses)
            wait_until(lambda: len(statuses) > answered + 8)
        unanswered = [status for status in statuses if status != 200]
        assert len(lost) + len(unanswered) <= CLIENTS
        assert ends_without_loss(process)


def test_a_replica_on_ray_without_its_model_ends_the_service(tmp_path):
    with service_on_ray(tmp_path) as (process, _):
        wait_until(lambda: len(replicas_on_ray(process)) == 2)
        (tmp_path / "model.safetensors").unlink()
        os.kill(min(replicas_on_ray(process)), signal.SIGKILL)
        assert ends_with_one_error(process)


@pytest.mark.parametrize(
    "parameters, expected",
    [
        ({"replicas": 3}, {"num_replicas": 3}),
        (
            {"replicas": 2, "max_replicas": 5, "batch_size": 8},
            {
                "autoscaling_config": {
                    "min_replicas": 2,
                    "max_replicas": 5,
                    "target_ongoing_requests": 8,
                }
            },
        ),
    ],
)
def test_how_many_replicas_ray_is_asked_for(parameters, expected):
    config = ServerConfig.checked(model_path="model", engine="ray", **parameters)
    assert config.ray_replicas == expected


def test_replicas_share_the_cores_also_when_there_are_most(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    config = partial(ServerConfig.checked, model_path="model", engine="ray", replicas=2)
    assert config().threads_each == 8
    assert config(max_replicas=4).threads_each == 4
    assert config(max_replicas=4, threads=2).threads_each == 2


def test_answers_are_sent_at_once():
    """Without TCP_NODELAY the second packet of an answer waits for the client's delayed ACK."""
    found = []

    async def answer(reader, writer):
        connection = writer.get_extra_info("socket")
        found.append(connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
        writer.close()

    async def connect():
        listening = serve._listening("127.0.0.1", 0)
        async with await asyncio.start_server(answer, sock=listening):
            reader, writer = await asyncio.open_connection(*listening.getsockname())
            await reader.read()
            writer.close()

    asyncio.run(connect())
    assert found and found[0]


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
