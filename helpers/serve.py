"""Serve a trained classifier over HTTP: `python -m helpers.serve --model_path M`."""

import socket

from helpers import InputError
from helpers.cluster import require_ray
from helpers.console import run_command
from helpers.deployment.servers import (
    ServerConfig,
    application,
    run_here,
    run_on_ray,
    run_replicas,
)
from helpers.deployment.service import read_token


def serve(config: ServerConfig) -> None:
    """Answer requests until Ctrl-C or SIGTERM, then finish what is in flight.

    Raises:
        InputError: as `application` and `read_token`; or an address or port that cannot be had.
    """
    read_token()
    if config.engine == "ray":
        require_ray()
    listening = _listening(config.host, config.port)
    # Here also for replicas, which load their own: what cannot be served is one error, at once.
    app = application(config)
    host, port = listening.getsockname()[:2]
    print(f"serving {app.title} at http://{host}:{port}; Ctrl-C ends it", flush=True)
    if config.engine == "local" and config.replicas == 1:
        run_here(app, listening)
    else:
        del app  # its memory
        if config.engine == "ray":
            listening.close()
            run_on_ray(config, host, port)
        else:
            run_replicas(config, listening)
    print("all requests are answered", flush=True)


def _listening(host: str, port: int) -> socket.socket:
    """A socket that is bound, so that a taken port is an error before the model is loaded."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        # Named TCP: asyncio sends at once only on such, and else answers wait 40 ms for an ACK.
        listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
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
