"""Faults in how a classifier is served."""

import os
import socket

from tests.faults.fault import Fault
from tests.faults.rows_predict import model

SERVE = "serve --model_path model.safetensors --port 0"
TAKEN = socket.socket()
TAKEN.bind(("127.0.0.1", 0))
TAKEN.listen()

ROWS = [
    Fault("serve without parameters", None, "serve", ("model_path: is needed",)),
    Fault("serve no model", None, SERVE, ("model.safetensors",)),
    Fault(
        "a port that is taken",
        model,
        SERVE.replace("--port 0", f"--port {TAKEN.getsockname()[1]}"),
        ("port: 127.0.0.1:", "cannot be had", "give another"),
    ),
    Fault("a port that is none", model, SERVE.replace("0", "70000"), ("port: ", "65535")),
    Fault("an address of another machine", model, f"{SERVE} --host 192.0.2.1", ("192.0.2.1",)),
    Fault("a host that is none", model, f"{SERVE} --host no.such.invalid", ("no.such.invalid",)),
    Fault(
        "an empty token",
        model,
        SERVE,
        ("SERVE_TOKEN: is set in the environment and empty",),
        patch=("os.environ", {**os.environ, "SERVE_TOKEN": ""}),
    ),
    Fault("no replica", model, f"{SERVE} --replicas 0", ("replicas: ", "greater than 0")),
    Fault("replicas without a model", None, f"{SERVE} --replicas 2", ("model.safetensors",)),
    Fault(
        "replicas of one machine that shall scale",
        model,
        f"{SERVE} --max_replicas 2",
        ("max_replicas: ", "take ray"),
    ),
    Fault(
        "fewer replicas at most than at least",
        model,
        f"{SERVE} --engine ray --replicas 2 --max_replicas 1",
        ("max_replicas: is below replicas",),
    ),
    Fault("a queue of none", model, f"{SERVE} --queue 0", ("queue: ", "greater than 0")),
    Fault(
        "an error rate without a validation split",
        model,
        f"{SERVE} --error_rate 0.1",
        ("error_rate: ", "validation split"),
    ),
]
