"""Serve a trained classifier over HTTP: `python -m helpers.serve --model_path M`."""

import socket
from contextlib import suppress

from pydantic import Field, PositiveInt

from helpers import InputError
from helpers.console import run_command
from helpers.deployment.batching import Batches
from helpers.deployment.scoring import answer_rule, open_model

try:
    import uvicorn

    from helpers.deployment.service import ServeConfig, create_app, read_token
except ModuleNotFoundError as missing:
    raise SystemExit(
        f"error: {missing.name} is not installed; pip install -r requirements-serve.txt"
    ) from None

_GRACE = 30  # seconds in which requests in flight are finished after Ctrl-C


class ServerConfig(ServeConfig):
    """Everything that decides a service."""

    host: str = Field("127.0.0.1", description="address to listen on; 0.0.0.0 for all")
    port: int = Field(8000, ge=0, le=65535, description="port to listen on; 0 for a free one")
    batch_size: PositiveInt = Field(16, description="most images per prediction")


def serve(config: ServerConfig) -> None:
    """Answer requests until Ctrl-C or SIGTERM, then finish what is in flight.

    Raises:
        InputError: as `open_model`, `answer_rule` and `read_token`; or an address or port that
            cannot be had.
    """
    token = read_token()
    listening = _listening(config.host, config.port)
    scorer = open_model(config.model_path, config.threads, config.device)
    batches = Batches(scorer.logits_of, config.batch_size)
    app = create_app(config, scorer, answer_rule(scorer, config), batches.logits_of, token)
    host, port = listening.getsockname()[:2]
    print(f"serving {scorer.name} at http://{host}:{port}; Ctrl-C ends it", flush=True)
    settings = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=_GRACE)
    with suppress(KeyboardInterrupt):  # uvicorn raises it again when all is finished
        uvicorn.Server(settings).run(sockets=[listening])
    print("all requests are answered", flush=True)


def _listening(host: str, port: int) -> socket.socket:
    """A socket that is bound, so that a taken port is an error before the model is loaded."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listening = socket.socket(family, socket.SOCK_STREAM)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
        listening.listen()
    except OSError as error:
        what = error.strerror or error
        raise InputError(f"port: {host}:{port} cannot be had ({what}); give another") from error
    return listening


def main() -> None:
    """Serve a trained classifier over HTTP."""
    serve(ServerConfig.from_arguments(main.__doc__))


if __name__ == "__main__":
    run_command(main, with_lines=False)
