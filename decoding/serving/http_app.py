"""The HTTP face of a retriever: `POST /search`, `GET /healthz`, `GET /metrics`, limits, and one JSON sentence for every fault.

The event loop reads and checks bodies; the model and everything else that is not thread-safe runs on the one worker thread
of a `MicroBatcher`. Status codes: 400 no JSON, 408 the body came too slowly, 413 too large, 422 a field is wrong, 500 a
defect (the log has the details, the answer has none), 503 loading or busy (with Retry-After), 504 not answered in time.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import threading
import time
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from sidtune.core.config import check_range
from sidtune.core.errors import ConfigError, DataError, SidtuneError
from sidtune.decoding.retrieval.retriever import SidRetriever
from sidtune.decoding.retrieval.search_request import NoJson, RequestLimits, SearchRequest, load_json, parse_request
from sidtune.decoding.serving.connections import BACKLOG, bounded, most_connections
from sidtune.decoding.serving.micro_batcher import Answer, Closed, MicroBatcher, QueueFull
from sidtune.decoding.serving.server_counts import CONTENT_TYPE, ServerCounts

logger = logging.getLogger(__name__)

_ROUTES = "this server has POST /search, GET /healthz and GET /metrics"
_PAIRS = {
    "description": "A mapping name: text, or a list of {name, value}.",
    "anyOf": [
        {"type": "object", "additionalProperties": {"type": "string"}},
        {"type": "array", "items": {"type": "object", "required": ["name", "value"]}},
    ],
}
_TEXTS = {"type": "array", "items": {"type": "string"}}
_TURN = {
    "type": "object",
    "required": ["item_id"],
    "properties": {"item_id": {"type": "string"}, "query": {"type": "string"}, "context": _PAIRS},
}
_FIELDS = {
    "query": {"type": "string", "description": "What the user typed; leave it out for recommendations."},
    "profile": _PAIRS,
    "context": _PAIRS,
    "history": {"type": "array", "items": {"anyOf": [{"type": "string"}, _TURN]}, "description": "Oldest first."},
    "k": {"type": "integer", "minimum": 1, "default": 10},
    "num_beams": {"type": "integer", "minimum": 1, "description": "Default: k, at least 10."},
    "exclude_items": _TEXTS,
    "exclude_seen": {"type": "boolean", "default": False},
    "only_items": _TEXTS,
    "only_categories": _TEXTS,
    "only_brands": _TEXTS,
    "price_min": {"type": "number"},
    "price_max": {"type": "number"},
    "in_stock_only": {"type": "boolean", "default": False},
}
_SEARCH_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {"schema": {"type": "object", "properties": _FIELDS, "additionalProperties": False}}
        },
    }
}
_DISCARDED = 1 << 20  # of a body that is too large, so that the client gets to read the answer


@dataclass(frozen=True)
class ServingOptions:
    """Limits of a server.

    Attributes:
        limits: of a single request.
        max_batch, max_wait_ms, max_queue: see `MicroBatcher`.
        timeout_s: longest time from a complete body to the answer; also for the body to arrive.
        max_body_bytes: largest body.
        retry_after_s: what a refused client is told to wait.
        shutdown_s: longest time to finish what is queued at the end.
        header_timeout_s: longest time for the head of a request to arrive.
        max_connections: open connections at a time; fewer where the process may not open so many files.
    """

    limits: RequestLimits = field(default_factory=RequestLimits)
    max_batch: int = 16
    max_wait_ms: float = 4.0
    max_queue: int = 256
    timeout_s: float = 30.0
    max_body_bytes: int = 256 * 1024
    retry_after_s: int = 1
    shutdown_s: float = 30.0
    header_timeout_s: float = 10.0
    max_connections: int = 1024

    def __post_init__(self) -> None:
        check_range(self, 1, "max_connections")
        check_range(self, 1e-3, "header_timeout_s")
        if self.timeout_s <= 0 or self.max_body_bytes < 1 or self.shutdown_s < 0:
            raise ConfigError("timeout_s and max_body_bytes must be above 0 and shutdown_s at least 0; raise them.")


class HttpError(Exception):
    """An answer that is no result: status, one full sentence, and extra headers."""

    def __init__(self, status: int, sentence: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(sentence)
        self.status, self.sentence, self.headers = status, sentence, headers or {}


class SearchService:
    """A retriever that loads in the background and answers in batches.

    Args:
        load: makes the retriever; called once, on a thread.
        options: limits.
        before_batch: called on the worker before each batch, for example to read a stock list again.
        on_failure: called with the error when loading fails.
    """

    def __init__(
        self,
        load: Callable[[], SidRetriever],
        options: ServingOptions | None = None,
        before_batch: Callable[[], None] | None = None,
        on_failure: Callable[[BaseException], None] | None = None,
    ) -> None:
        self.options = options or ServingOptions()
        self.retriever: SidRetriever | None = None
        self.counts = ServerCounts()
        self._load, self._before_batch, self._on_failure = load, before_batch, on_failure
        self._batcher: MicroBatcher | None = None
        self._facts: dict[str, Any] = {}
        self._answered = self._failed = 0
        self._closing = False

    def start(self) -> None:
        """Begins to load."""
        threading.Thread(target=self._start, name="model-loader", daemon=True).start()

    def _start(self) -> None:
        try:
            self.retriever = self._load()
            self._facts = _facts(self.retriever)
            options = self.options
            self._batcher = MicroBatcher(
                self._run,
                max_batch=options.max_batch,
                max_wait_ms=options.max_wait_ms,
                max_queue=options.max_queue,
            )
            logger.info("Ready: %d items.", self._facts["items"])
        except BaseException as error:
            if not isinstance(error, SidtuneError):
                logger.exception("The model could not be loaded.")
            if self._on_failure is not None:
                self._on_failure(error)

    @property
    def ready(self) -> bool:
        """Whether requests are answered now."""
        return self._batcher is not None and self._batcher.alive and not self._closing

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return 0 if self._batcher is None else self._batcher.waiting

    def health(self) -> dict[str, Any]:
        """What `/healthz` shows."""
        if not self.ready:
            state = "stopping" if self._closing else "loading" if self._batcher is None else "failed"
            return {"status": state}
        counts = {"waiting": self.waiting, "answered": self._answered, "failed": self._failed}
        return {"status": "ready", **self._facts, "in_stock": self.retriever.catalogue.stock, **counts}  # type: ignore[union-attr]

    async def answer(self, request: SearchRequest) -> Answer:
        """Waits for the answer of one request. Raises HttpError, or DataError for a request that is wrong."""
        if self._batcher is None:
            raise self._later("The model is still loading; try again in a moment.")
        try:
            future = asyncio.wrap_future(self._batcher.submit(request))
        except (QueueFull, Closed) as error:
            raise self._later(str(error)) from None
        try:
            return await asyncio.wait_for(future, self.options.timeout_s)
        except TimeoutError:
            raise HttpError(
                504,
                f"The answer took longer than {self.options.timeout_s:g} seconds; try again, or ask for fewer beams.",
            ) from None

    def _later(self, sentence: str) -> HttpError:
        return HttpError(503, sentence, {"Retry-After": str(self.options.retry_after_s)})

    def close(self) -> bool:
        """Answers what is queued and takes no more. False when that took longer than `shutdown_s`."""
        self._closing = True
        return self._batcher is None or self._batcher.close(self.options.shutdown_s)

    def _run(self, requests: list[SearchRequest]) -> list[Any]:
        """Hits or the error of each request; runs on the worker."""
        retriever = self.retriever
        assert retriever is not None
        if self._before_batch is not None:
            self._before_batch()
        results: list[Any] = [None] * len(requests)
        prompts, targets, places = [], [], []
        for place, request in enumerate(requests):
            try:
                pieces = retriever.prompter.pieces(request)
                retriever.prompter.check_length(pieces)
                target = retriever.prompter.target(request)
            except (DataError, ConfigError) as error:
                results[place] = error
                continue
            prompts.append(pieces)
            targets.append(target)
            places.append(place)
        found = retriever.rank_targets(prompts, targets, self.options.max_batch) if prompts else []
        for place, rows_and_scores in zip(places, found, strict=True):
            results[place] = retriever.hits(*rows_and_scores)
        self._answered += len(places)
        self._failed += len(requests) - len(places)
        return results


def _facts(retriever: SidRetriever) -> dict[str, Any]:
    model = retriever.model
    return {
        "items": len(retriever.sids),
        "sids": retriever.trie.num_leaves,
        "levels": list(retriever.sids.level_sizes),
        "categories": None if retriever.catalogue.categories is None else len(retriever.catalogue.categories),
        "model": getattr(getattr(model, "config", None), "model_type", type(model).__name__),
        "parameters": sum(p.numel() for p in model.parameters()),
        "device": str(next(model.parameters()).device),
    }


def make_app(service: SearchService) -> FastAPI:
    """The application; starting it starts the service, stopping it finishes what is queued."""

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.start()
        yield
        if not await asyncio.to_thread(service.close):
            logger.warning("Not everything queued could be answered in %g s.", service.options.shutdown_s)

    # A redirect from `/search/` would be to whatever Host the client sent.
    app = FastAPI(title="sidtune", lifespan=lifespan, docs_url=None, redoc_url=None, redirect_slashes=False)

    async def search(request: Request) -> Response:
        begin = time.perf_counter()
        asked = parse_request(load_json(await _body(request, service.options)), service.options.limits)
        answer = await _while_there(request, service.answer(asked))
        hits = [{"item_id": h.item_id, "title": h.title, "sid": h.sid, "score": h.score} for h in answer.value]
        timing = {"total": time.perf_counter() - begin, "queue": answer.queue_s, "model": answer.run_s}
        shown = {name: round(1000 * seconds, 3) for name, seconds in timing.items()}
        return _json(200, {"hits": hits, "timing_ms": shown, "batch": answer.batch})

    async def metrics() -> Response:
        return Response(service.counts.text(service.waiting, service.ready), media_type=CONTENT_TYPE)

    async def healthz() -> Response:
        return _json(200 if service.ready else 503, service.health())

    app.add_api_route(
        "/search",
        _guarded(search, service.counts),
        methods=["POST"],
        openapi_extra=_SEARCH_BODY,
        response_class=Response,
    )
    app.add_api_route("/metrics", metrics, methods=["GET"], response_class=Response)
    app.add_api_route("/healthz", healthz, methods=["GET"], response_class=Response)
    app.add_api_route("/healthz", healthz, methods=["HEAD"], include_in_schema=False)

    @app.exception_handler(HTTPException)
    async def other(request: Request, error: HTTPException) -> Response:
        if error.status_code == 404:
            return _fault(HttpError(404, f"There is no such page; {_ROUTES}."))
        headers = dict(error.headers or {})
        return _fault(HttpError(error.status_code, f"This page takes no {request.method[:20]}; {_ROUTES}.", headers))

    return app


def server_config(service: SearchService, **options: Any) -> uvicorn.Config:
    """uvicorn's settings for the application of `service`, with its limits on connections; `options` are uvicorn's own."""
    limits = service.options
    protocol = bounded(most_connections(limits.max_connections), limits.header_timeout_s, service.counts)
    fixed = {"http": protocol, "loop": "asyncio", "backlog": BACKLOG, "server_header": False}
    return uvicorn.Config(make_app(service), **fixed, **options)


async def _while_there(request: Request, answer: Coroutine[Any, Any, Answer]) -> Answer:
    """Waits for an answer as long as the client is there; a job that still waits in the queue is then given up.

    Raises:
        ClientDisconnect: the client hung up.
    """
    asked, gone = (
        asyncio.ensure_future(answer),
        asyncio.ensure_future(request.receive()),
    )  # all that can come is the end
    try:
        await asyncio.wait((asked, gone), return_when=asyncio.FIRST_COMPLETED)
        if not asked.done():
            raise ClientDisconnect
        return asked.result()
    finally:
        asked.cancel()
        gone.cancel()


def _guarded(handler: Callable[[Request], Any], counts: ServerCounts) -> Callable[[Request], Any]:
    """Turns every error of a handler into a JSON sentence, and counts the answers."""

    async def guarded(request: Request) -> Response:
        begin = time.perf_counter()
        try:
            response = await handler(request)
        except ClientDisconnect:
            counts.given_up += 1
            return Response(status_code=400)  # nobody reads it
        except Exception as error:
            response = _fault(_told(error))
        counts.answered(response.status_code, time.perf_counter() - begin)
        return response

    return guarded


def _told(error: Exception) -> HttpError:
    if isinstance(error, HttpError):
        return error
    if isinstance(error, NoJson):
        return HttpError(400, str(error))
    if isinstance(error, (DataError, ConfigError)):
        return HttpError(422, str(error))
    if isinstance(error, SidtuneError):
        logger.error("%s", error)
        return HttpError(500, str(error))
    reference = uuid.uuid4().hex[:8]
    logger.error("Request %s failed.", reference, exc_info=error)
    return HttpError(500, f"The server failed on this request; its log tells why under {reference}.")


def _fault(error: HttpError) -> Response:
    return _json(error.status, {"error": error.sentence}, error.headers)


def _json(status: int, value: Any, headers: dict[str, str] | None = None) -> Response:
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    return Response(text.encode(), status, headers, media_type="application/json")


async def _body(request: Request, options: ServingOptions) -> bytes:
    """The whole body. Raises HttpError when it is too large or too slow."""
    most, parts, size = options.max_body_bytes, [], 0
    try:
        async with asyncio.timeout(options.timeout_s):
            async for part in request.stream():
                size += len(part)
                if size <= most:
                    parts.append(part)
                elif size > most + _DISCARDED:
                    break
    except TimeoutError:
        raise HttpError(
            408, f"The request did not arrive within {options.timeout_s:g} seconds; send it faster."
        ) from None
    if size > most:
        raise HttpError(413, f"The request is larger than {most} bytes; shorten its lists or its texts.")
    return b"".join(parts)
