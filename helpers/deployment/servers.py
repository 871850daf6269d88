"""What stands behind a service's port: this process, several that share it, or replicas on Ray."""

import logging
import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import threading
from contextlib import suppress
from functools import partial
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from typing import Literal

import uvicorn
from fastapi import FastAPI
from pydantic import Field, PositiveInt, ValidationInfo, field_validator
from uvicorn.config import STARTUP_FAILURE
from uvicorn.supervisors import Multiprocess

from helpers import InputError
from helpers.cluster import cluster, workers_of
from helpers.console import one_line
from helpers.deployment.batching import Batches
from helpers.deployment.scoring import answer_rule, open_model
from helpers.deployment.service import METRICS_FOLDER, ServeConfig, create_app, read_token

_GRACE = 30  # seconds in which requests in flight are finished after Ctrl-C
_HUNG = 60  # seconds without a sign after which a replica is replaced; importing torch takes some
_ENDED = "a replica could not start, so the service has ended"

_RAY_SERVE = {"RAY_SERVE_ENABLE_HA_PROXY": "1", "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1"}


class ServerConfig(ServeConfig):
    """Everything that decides a service."""

    host: str = Field("127.0.0.1", description="address to listen on; 0.0.0.0 for all")
    port: int = Field(8000, ge=0, le=65535, description="port to listen on; 0 for a free one")
    batch_size: PositiveInt = Field(16, description="most images per prediction")
    replicas: PositiveInt = Field(
        1, description="processes behind the port, each with the model; they share the cores"
    )

    engine: Literal["local", "ray"] = Field(
        "local", description="of replicas: processes of this machine, or Ray Serve"
    )
    ray_address: str | None = Field(None, description="of a Ray cluster; None: started here")
    max_replicas: PositiveInt | None = Field(
        None, description="on Ray: as many while requests wait, `replicas` else; None: no more"
    )

    @field_validator("max_replicas")
    @classmethod
    def _scales(cls, most: int | None, info: ValidationInfo) -> int | None:
        if most is None:
            return None
        if info.data.get("engine") == "local":
            raise ValueError("replicas of one machine are not scaled; leave it out, or take ray")
        if most < info.data.get("replicas", 1):
            raise ValueError("is below replicas, the least; give as many or more")
        return most

    @property
    def threads_each(self) -> int:
        """Threads of one prediction: as asked for, or a replica's share of the cores."""
        return self.threads or max(1, os.cpu_count() // (self.max_replicas or self.replicas))

    @property
    def ray_replicas(self) -> dict:
        """How many replicas Ray Serve is asked for, as options of a deployment.

        One more is wanted when each has more requests than are predicted at once.
        """
        if self.max_replicas is None:
            return {"num_replicas": self.replicas}
        bounds = {"min_replicas": self.replicas, "max_replicas": self.max_replicas}
        return {"autoscaling_config": bounds | {"target_ongoing_requests": self.batch_size}}


def application(config: ServerConfig) -> FastAPI:
    """The application with a classifier of its own; raises as what it calls."""
    scorer = open_model(config.model_path, config.threads_each, config.device)
    batches = Batches(scorer.logits_of, config.batch_size)
    rule = answer_rule(scorer, config)
    return create_app(config, scorer, rule, batches.logits_of, read_token())


def run_here(app: FastAPI, listening: socket.socket) -> None:
    """Answer from this process until Ctrl-C or SIGTERM, then finish what is in flight."""
    with suppress(KeyboardInterrupt):  # uvicorn raises it again when all is finished
        uvicorn.Server(_settings(app)).run(sockets=[listening])


class _Supervisor(Multiprocess):
    """Of the replicas of one machine."""

    def keep_subprocess_alive(self) -> None:
        """Replace who died; at once even where its sign is waited for.

        A replica has the other end of the pipe to itself, so that its death ends the waiting.
        """
        for process in self.processes:
            process.child_conn.close()
        super().keep_subprocess_alive()


def run_replicas(config: ServerConfig, listening: socket.socket) -> None:
    """The same from `config.replicas` processes that accept from one socket.

    One that dies, or gives no sign for a minute, is replaced; only what it had in flight is lost.

    Raises:
        InputError: one could not load the classifier; the others have finished what was in flight.
    """
    failures = multiprocessing.get_context("spawn").SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        os.environ[METRICS_FOLDER] = folder  # the replicas' counts are added up there
        settings = _settings(
            partial(_replica, config, failures),
            factory=True,
            workers=config.replicas,
            timeout_worker_healthcheck=_HUNG,
        )
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # the reason follows here
        _Supervisor(settings, [listening]).run()
    if not failures.empty():
        raise InputError(f"{_ENDED}: {failures.get()}")


def run_on_ray(config: ServerConfig, host: str, port: int) -> None:
    """The same from replicas on a Ray cluster, behind its HAProxy.

    Raises:
        InputError: the cluster has no room for so many, or one could not load the classifier.
        OSError: no cluster, or replicas that do not start on it.
    """
    os.environ |= _RAY_SERVE  # read when Ray is imported, and by what it starts
    changes = {"model_path": str(Path(config.model_path).resolve()), "threads": config.threads_each}
    config = config.model_copy(update=changes)
    for number in (signal.SIGINT, signal.SIGTERM):  # a shell's background job ignores the first
        signal.signal(number, signal.default_int_handler)
    with suppress(KeyboardInterrupt), cluster(config.ray_address) as ray:
        from ray import serve
        from ray.util.queue import Queue

        logging.getLogger("ray.serve").setLevel(logging.ERROR)  # the import has set another
        threads = config.threads
        gpus, room = workers_of(ray, threads, config.device)
        if room < config.replicas:
            raise InputError(
                f"replicas: the cluster has room for {room} with {threads} threads each; give "
                "fewer, or fewer threads"
            )
        # It takes no core, and is there again when its machine is lost.
        options = {"num_cpus": 0, "max_restarts": -1, "max_task_retries": -1}
        failures = Queue(actor_options=options)
        classifier = serve.deployment(
            **config.ray_replicas,
            max_ongoing_requests=2 * config.queue,  # past its queue the application refuses
            ray_actor_options={"num_cpus": threads, "num_gpus": gpus},
            graceful_shutdown_timeout_s=_GRACE,
        )(serve.ingress(lambda: _loaded(config, failures))())
        try:
            serve.start(http_options={"host": host, "port": port})
            serve.run(classifier.bind(), name="classifier")
            print(f"{config.replicas} replicas are ready", flush=True)
            raise InputError(f"{_ENDED}: {failures.get()}")  # Ray would try for ever
        except RuntimeError as error:  # replicas that do not start
            raise ConnectionError(f"ray: {error}") from error
        finally:
            serve.shutdown()


def _loaded(config: ServerConfig, failures) -> FastAPI:
    """The application of a replica; where there is none, the reason goes to a queue."""
    try:
        return application(config)
    except Exception as error:  # whatever it is, the next replica would fail alike
        failures.put(one_line(error))
        raise


def _settings(app, **options) -> uvicorn.Config:
    return uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=_GRACE, **options)


def _replica(config: ServerConfig, failures: SimpleQueue) -> FastAPI:
    """`_loaded` in a process that ends with the one that supervises it, or ends that."""

    def follow() -> None:
        multiprocessing.parent_process().join()
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=follow, daemon=True).start()
    try:
        app = _loaded(config, failures)
    except Exception:
        sys.exit(STARTUP_FAILURE)
    print(f"a replica is ready, process {os.getpid()}", flush=True)
    return app
