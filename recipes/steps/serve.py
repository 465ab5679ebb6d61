"""Serves a published bundle over HTTP: `POST /search`, `GET /healthz`, `GET /metrics`.

    sidtune serve --model_dir runs/quickstart/bundle --host 127.0.0.1 --port 8000
    curl -s localhost:8000/search -d '{"query": "red dress", "k": 3}'

Requests that arrive together are decoded together; every answer is the one `SidRetriever.search` gives. Fields, limits and errors
are in `decoding/serving/README.md`. Needs `pip install 'sidtune[serve]'`. There is no authentication and no TLS: put a
reverse proxy in front of it before anyone else can reach it.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, fields
from typing import Any

from sidtune.core.config import build, check_range, command
from sidtune.core.errors import ConfigError, SidtuneError
from sidtune.core.stopping import own_signals

LAUNCH = "alone"


@dataclass
class Arguments:
    """Options of serve.

    Attributes:
        model_dir: a bundle of publish; or, with sids_dir, a model folder or the folder of sft.
        sids_dir: folder of learn_sids.
        host: address to listen on; 0.0.0.0 is every network this machine is in.
        port: port to listen on; 0 picks a free one.
        device: for example cuda:0 or cpu; default the GPU if there is one.
        in_stock: file of the item ids in stock, one a line or parquet with `item_id`; read again when it changes.
        max_batch: most requests decoded together.
        max_wait_ms: longest time that requests wait for others to be decoded with; only under load.
        max_queue: most requests that wait; further ones get 503.
        timeout_s: longest time to an answer; then 504.
        header_timeout_s: longest time for the head of a request; then 408.
        max_connections: open connections at a time; fewer where the process may not open so many files.
        max_body_bytes: largest request body; above it 413.
        limits: of a single request; keys max_query_chars, max_value_chars, max_pairs, max_history, max_items,
            max_categories, max_k, max_beams.
        shutdown_s: longest time to finish what is queued after SIGTERM or SIGINT.
        access_log: log every request.
    """

    model_dir: str
    sids_dir: str | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    device: str | None = None
    in_stock: str | None = None
    max_batch: int = 16
    max_wait_ms: float = 4.0
    max_queue: int = 256
    timeout_s: float = 30.0
    header_timeout_s: float = 10.0
    max_connections: int = 1024
    max_body_bytes: int = 256 * 1024
    limits: dict = field(default_factory=dict)
    shutdown_s: float = 30.0
    access_log: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"port must be between 0 and 65535, got {self.port}.")
        check_range(self, 1, "max_batch", "max_queue", "max_connections")
        check_range(self, 1, "max_body_bytes", most=2**40)
        check_range(self, 1e-3, "timeout_s", "header_timeout_s")
        check_range(self, 0, "max_wait_ms", "shutdown_s")


def main(arguments: Arguments) -> None:
    """Serves until it is told to stop. Raises SidtuneError when the model cannot be loaded or the port is taken."""
    own_signals()  # what is queued is answered first
    server, failures = make_server(arguments)
    try:
        server.run()
    except KeyboardInterrupt:  # uvicorn raises it again when all is finished
        return
    except SystemExit:  # uvicorn has logged why it cannot listen
        if not failures:
            where = f"{arguments.host}:{arguments.port}"
            raise SidtuneError(f"The server cannot listen on {where}; choose another host or port.") from None
    if failures:
        if isinstance(failures[0], SidtuneError):
            raise failures[0]
        raise SidtuneError(f"The model in {arguments.model_dir} could not be loaded: {failures[0]}.")


def make_server(arguments: Arguments) -> tuple[Any, list[BaseException]]:
    """A uvicorn server that is ready to run, and the list in which a failure to load the model will stand.

    Everything but the model's weights is read here, so a wrong folder ends before the server listens.
    """
    try:
        import uvicorn

        from sidtune.decoding.serving.http_app import SearchService, ServingOptions, server_config
    except ImportError as error:
        raise ConfigError(
            f"Serving needs FastAPI and uvicorn ({error.name} is missing); install them with pip install 'sidtune[serve]'."
        ) from None
    from sidtune.decoding.retrieval.model_folder import ModelFolder
    from sidtune.decoding.retrieval.prompter import Prompter
    from sidtune.decoding.retrieval.retriever import SidRetriever
    from sidtune.decoding.retrieval.search_request import RequestLimits
    from sidtune.decoding.serving.stock import StockFile

    same = {
        field.name: getattr(arguments, field.name) for field in fields(ServingOptions) if hasattr(arguments, field.name)
    }
    options = ServingOptions(**{**same, "limits": build(RequestLimits, arguments.limits, "limits")})
    check_device(arguments.device)
    prompter = Prompter.of(ModelFolder.open(arguments.model_dir, arguments.sids_dir))
    stock = StockFile(arguments.in_stock, prompter.catalogue) if arguments.in_stock else None
    failures: list[BaseException] = []

    def fail(error: BaseException) -> None:
        failures.append(error)
        server.should_exit = True

    service = SearchService(
        lambda: SidRetriever.from_prompter(prompter, arguments.device),
        options,
        before_batch=stock.refresh if stock else None,
        on_failure=fail,
    )
    server = uvicorn.Server(
        server_config(
            service,
            host=arguments.host,
            port=arguments.port,
            access_log=arguments.access_log,
            log_level=logging.INFO,
            timeout_graceful_shutdown=max(1, round(arguments.shutdown_s)),
        )
    )
    return server, failures


def check_device(device: str | None) -> None:
    """Raises ConfigError when torch knows no such device or this machine has none."""
    import torch

    if device is None:
        return
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0][:120]
        raise ConfigError(
            f"The device '{device}' cannot be used ({reason}); choose cpu, or cuda:0 and the like."
        ) from None


if __name__ == "__main__":
    command(main, Arguments)
