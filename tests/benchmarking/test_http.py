"""The service under LoadGen: requests, connections that are kept, and what is counted."""

import math
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from fastapi.testclient import TestClient

from helpers.benchmarking import http
from helpers.benchmarking.load_generator import LoadSettings, run_scenario
from helpers.deployment.scoring import answer_rule, open_model
from helpers.deployment.service import ServeConfig, create_app
from helpers.models.files import save_classifier
from helpers.reporting.service import http_answer
from tests.deployment.test_scoring import PROVENANCE, make_classifier
from tests.fake_data import make_chip, write_chip
from tests.fake_weights import tiny  # noqa: F401  a fixture

SETTINGS = LoadSettings(seconds=0.1, bisections=0)


class Answers(BaseHTTPRequestHandler):
    """Answers every request with the server's status; 0 closes the connection without one."""

    protocol_version = "HTTP/1.1"

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.server.seen.append(self.connection)
        self.close_connection = self.server.status == 0 or self.server.closes
        if self.server.status:
            self.send_response(self.server.status)
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"{}")

    def log_message(self, *_):
        """Say nothing."""


class Server(ThreadingHTTPServer):
    """One that all connections reach at once."""

    request_queue_size = http.CONNECTIONS


@pytest.fixture
def server():
    with Server(("127.0.0.1", 0), Answers) as server:
        server.status, server.closes, server.seen = 200, False, []
        threading.Thread(target=server.serve_forever, daemon=True).start()
        server.address = f"127.0.0.1:{server.server_port}"
        yield server
        server.shutdown()


@pytest.fixture
def paths(tmp_path):
    return [write_chip(tmp_path / f"{i}.png", make_chip(i, size=40)) for i in range(5)]


@pytest.mark.parametrize(("chips", "images"), [(1, [1] * 5), (3, [3, 3])])
def test_requests_are_what_the_service_takes(tiny, tmp_path, paths, chips, images):  # noqa: F811
    model = save_classifier(make_classifier(), tmp_path / "model_final.safetensors", PROVENANCE)
    scorer = open_model(model, threads=1)

    async def predict(chip):
        return scorer.logits_of(chip[None])[0]

    config = ServeConfig.checked(model_path="model")
    app = create_app(config, scorer, answer_rule(scorer, config), predict, None)
    with TestClient(app) as client:
        found = []
        for request in http.http_requests(paths, chips):
            headers = {"Content-Type": request.content_type}
            response = client.post("/predict", content=request.body, headers=headers)
            assert response.status_code == 200, response.text
            found.append(len(response.json()["predictions"]))
    assert found == images  # the last request begins again with the first chip


def test_a_connection_is_kept_and_comes_back_where_the_service_has_closed_it(server, paths):
    connection, requests = http.Connection(server.address), http.http_requests(paths, 1)
    connection(requests)
    assert len(server.seen) == 5 and len(set(server.seen)) == 1
    server.closes = True
    for _ in range(2):
        connection(requests[:1])
        time.sleep(0.05)  # until the other end is closed here too
    assert len(set(server.seen)) == 2


@pytest.mark.parametrize("status", [503, 0])
def test_what_is_not_answered_is_an_error_and_loadgen_ends(server, paths, status):
    system = http.http_system(server.address, http.http_requests(paths, 1), SETTINGS)
    server.status = status
    row = run_scenario(system, "Server", 500, percentile=90)
    assert row["errors"] == row["queries"] > 0
    server.status = 200
    assert run_scenario(system, "Server", 500, percentile=90)["errors"] == 0


def test_the_table_compares_both_ways_in_images(server, paths, monkeypatch):
    @contextmanager
    def service(*_):
        yield SimpleNamespace(address=server.address, cpu_seconds=lambda: 0.0)

    monkeypatch.setattr(http, "service", service)
    config = SimpleNamespace(load_settings=SETTINGS, load_fractions=(0.5, 1.1))
    bench = SimpleNamespace(config=config, threads=1, test_paths=paths)
    alone = {"variant": "v", "queries": 9, "refused": 0, "errors": 0, "answered_per_second": 400.0}
    alone |= {f"p{q}_ms": 2.0 for q in (50, 90, 95, 99)}
    scenarios = [alone | {"scenario": name} for name in ("SingleStream", "MultiStream", "Offline")]
    scenarios = pd.DataFrame([*scenarios, alone | {"scenario": "Offline", "variant": "other"}])
    table, curve = http.measure_http(bench, SimpleNamespace(name="v"), scenarios)
    assert (table.errors == 0).all() and (table.images_per_s > 0).all()
    found = {way: set(rows.scenario) - {"Server"} for way, rows in table.groupby("way")}
    assert found == {
        "in process": {"SingleStream", "MultiStream", "Offline"},
        "HTTP, 1 chip a request": {"SingleStream", "MultiStream", "Offline"},
        "HTTP, 8 chips a request": {"MultiStream", "Offline"},
    }
    row = table[table.way == "HTTP, 8 chips a request"].set_index("scenario")
    assert row.added_ms["MultiStream"] == pytest.approx(row.p50_ms["MultiStream"] - 2)
    assert row.share["Offline"] == pytest.approx(row.images_per_s["Offline"] / 400)
    assert math.isnan(row.share["MultiStream"]) and row.client_cpu_ms["Offline"] > 0
    assert curve.load.tolist() == [0.5, 0.5]
    np.testing.assert_allclose(curve.offered_images_per_s, 200)
    said = http_answer(table)
    assert "HTTP, 8 chips a request" in said and "nan" not in said
