"""A trained classifier over HTTP: the application, whatever server runs it."""

import asyncio
import hmac
import logging
import os
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from typing import Annotated

import numpy as np
from fastapi import Depends, FastAPI, Header, Request, Response
from fastapi.responses import JSONResponse
from prometheus_client import (
    CONTENT_TYPE_LATEST,
    REGISTRY,
    CollectorRegistry,
    Counter,
    Histogram,
    generate_latest,
)
from prometheus_client.multiprocess import MultiProcessCollector
from pydantic import Field, PositiveInt
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Message, Receive

from helpers import InputError
from helpers.data.chips import MOST_CHANNELS, TooLargeError, decode, suffix_of
from helpers.deployment.scoring import ModelConfig, Scorer
from helpers.evaluation.calibration import UNSURE, AnswerRule

TOKEN = "SERVE_TOKEN"  # environment variable
METRICS_FOLDER = "PROMETHEUS_MULTIPROC_DIR"  # its own: where processes add up what they count
RETRY_AFTER = "1"  # seconds; a queue of default length is worked off within that

LogitsOf = Callable[[np.ndarray], Awaitable[np.ndarray]]
"""A chip (bands, S, S) as `Scorer.prepared` makes it -> its logits (classes,)."""

_REQUESTS = Counter("classifier_requests", "Requests to /predict", ["status"])
_SECONDS = Histogram("classifier_request_seconds", "From a request's head to its answer")
_ANSWERS = Counter("classifier_answers", "Images answered", ["answer"])

_log = logging.getLogger(__name__)


class ServeConfig(ModelConfig):
    """What an application answers, and its limits."""

    queue: PositiveInt = Field(64, description="requests that are held at once; others get a 503")
    max_megabytes: PositiveInt = Field(16, description="of a request's body; more get a 413")
    max_pixels: PositiveInt = Field(
        2**24, description="of all images of a request together; more get a 413"
    )
    max_images: PositiveInt = Field(64, description="of a request; more get a 413")


def read_token() -> str | None:
    """The bearer token that requests must carry, from the environment; None where it is not set.

    Raises:
        InputError: it is empty, which would leave open what was meant to be closed.
    """
    token = os.environ.get(TOKEN)
    if token == "":
        raise InputError(f"{TOKEN}: is set in the environment and empty; give a token, or unset it")
    return token


def create_app(
    config: ServeConfig, scorer: Scorer, rule: AnswerRule, logits_of: LogitsOf, token: str | None
) -> FastAPI:
    """The application of one process.

    `POST /predict` takes an image as body or several as the files of a multipart form;
    `GET /health`, `/model` and `/metrics` answer for operators, and `/` names them. Every error is
    JSON with `detail`.

    Args:
        config: limits.
        scorer: the classifier.
        rule: from its logits to answers.
        logits_of: has the classifier predict, many chips at once.
        token: that requests must carry, apart from `/` and `/health`; None for none.
    """
    held = 0

    def authorised(authorization: Annotated[str, Header()] = "") -> None:
        expected = f"Bearer {token}".encode()
        if token and not hmac.compare_digest(authorization.encode(), expected):
            raise HTTPException(
                401, "a valid bearer token is needed", {"WWW-Authenticate": "Bearer"}
            )

    app = FastAPI(title=scorer.name, openapi_url=None)
    protected = {"dependencies": [Depends(authorised)]}

    @app.post("/predict", **protected)
    async def predict(request: Request) -> Response:
        nonlocal held
        start = time.perf_counter()
        if held >= config.queue:
            busy = f"{held} requests are waiting, no more are taken; try again later"
            response = _refusal(503, busy, {"Retry-After": RETRY_AFTER})
        else:
            held += 1
            try:
                response = await _response(answer(request))
            finally:
                held -= 1
        _SECONDS.observe(time.perf_counter() - start)
        _REQUESTS.labels(response.status_code).inc()
        return response

    async def answer(request: Request) -> dict:
        images = await _images(request, config)
        chips = await asyncio.to_thread(_chips, images, scorer, config)
        logits = await asyncio.gather(*map(logits_of, chips))
        probabilities, classes, unsure = rule(scorer.finite(np.stack(logits)))
        predictions = [
            {
                "name": name,
                "class": (label := scorer.classifier.classes[i]),
                "probabilities": dict(zip(scorer.classifier.classes, row, strict=True)),
                "answer": UNSURE if is_unsure else label,
            }
            for (name, _), i, row, is_unsure in zip(
                images, classes, probabilities.tolist(), unsure, strict=True
            )
        ]
        for prediction in predictions:
            _ANSWERS.labels(prediction["answer"]).inc()
        return {"model": scorer.digest, "predictions": predictions}

    @app.get("/")
    async def root() -> dict:
        return {"detail": "POST an image to /predict; GET /health, /model or /metrics"}

    @app.get("/health")
    async def health() -> dict:
        return {"status": "ok"}

    @app.get("/model", **protected)
    async def model() -> dict:
        return {
            "model": scorer.digest,
            "name": scorer.name,
            "classifier": asdict(scorer.classifier),
            "rule": asdict(rule),
        }

    @app.get("/metrics", **protected)
    def metrics() -> Response:
        registry = REGISTRY
        if METRICS_FOLDER in os.environ:
            MultiProcessCollector(registry := CollectorRegistry())
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    return app


async def _response(answer: Awaitable[dict]) -> Response:
    """The answer, or what kept it from coming, and never a traceback."""
    try:
        return JSONResponse(await answer)
    except TooLargeError as error:
        return _refusal(413, str(error))
    except InputError as error:
        return _refusal(422, str(error))
    except ClientDisconnect:
        return _refusal(400, "the client has gone")
    except Exception:
        _log.exception("a prediction failed")
        return _refusal(500, "the prediction failed; the service's log says why")


def _refusal(status: int, detail: str, headers: dict[str, str] | None = None) -> Response:
    return JSONResponse({"detail": detail}, status, headers)


async def _images(request: Request, config: ServeConfig) -> list[tuple[str, bytes]]:
    """Name and bytes of each image; the name of a body is empty."""
    request = Request(request.scope, _limited(request.receive, config.max_megabytes))
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "multipart/form-data":
        return [("", await request.body())]
    try:
        form = await request.form(max_files=config.max_images)
    except HTTPException as error:
        kind = TooLargeError if error.detail.startswith("Too many") else InputError
        raise kind(f"multipart: {error.detail}") from None
    try:
        parts = form.multi_items()
        if text := [name for name, part in parts if isinstance(part, str)]:
            raise InputError(f"multipart: {text[0]!r} is no file; send every image as a file")
        if not parts:
            raise InputError("multipart: holds no image; send at least one as a file")
        return [(part.filename or name, await part.read()) for name, part in parts]
    finally:
        await form.close()


def _limited(receive: Receive, megabytes: int) -> Receive:
    """The same stream of a body, with TooLargeError as soon as it has more bytes."""
    count = 0

    async def counted() -> Message:
        nonlocal count
        message = await receive()
        count += len(message.get("body", b""))
        if count > megabytes * 2**20:
            raise TooLargeError(f"body: more than {megabytes} MiB; send smaller images, or fewer")
        return message

    return counted


def _chips(
    images: list[tuple[str, bytes]], scorer: Scorer, config: ServeConfig
) -> list[np.ndarray]:
    """Chips (bands, S, S) as `logits_of` takes them."""
    pixels, chips = config.max_pixels, []
    bands = max(MOST_CHANNELS, scorer.classifier.chip_bands or 0)
    too_large = f"images: more than {pixels:,} pixels together; send smaller ones, or fewer"
    for name, data in images:
        name = name or "body"
        try:
            stored = decode(data, suffix_of(data), pixels * bands)
        except TooLargeError:
            raise TooLargeError(too_large) from None
        except InputError as error:
            raise InputError(f"{name}: {error}") from None
        _, height, width = stored.values.shape
        pixels -= height * width
        if pixels < 0:
            raise TooLargeError(too_large)
        scorer.check_pixels(name, len(stored.values), str(stored.values.dtype))
        try:
            chips.append(scorer.prepared(stored))
        except InputError as error:
            raise InputError(f"{name}: {error}") from None
    return chips
