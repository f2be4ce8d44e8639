"""A package behind HTTP, in KServe's form: `sp-fx serve PACKAGE`. Needs the extra `serve`.

    POST /v1/models/NAME:predict    {"instances": [...]}  ->  {"predictions": [...]}
    POST /v1/models/NAME:explain    {"instances": [...], "parameters": {...}}  ->  {"predictions": [...], "explanations": [...]}
    GET  /v1/models, /v1/models/NAME, /healthz, /readyz, /metrics

`requests.py` says what instances and parameters may be.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from typing import Any

from ..program.program import Program
from .batching import Closed, Full
from .metrics import exposition
from .requests import Limits, Parameters, Refused
from .service import Served
from .texts import service_of


def application(served: Served) -> Any:
    """Returns the ASGI application; it closes the batcher when it stops."""
    from contextlib import asynccontextmanager

    from starlette.applications import Starlette
    from starlette.responses import JSONResponse, PlainTextResponse, Response
    from starlette.routing import Route

    decoding = asyncio.Semaphore(served.limits.decoding)

    @asynccontextmanager
    async def lifespan(app: Any):
        yield
        await asyncio.to_thread(served.batcher.close, served.limits.timeout)

    async def model(request: Any) -> Response:
        name, _, verb = request.path_params["call"].partition(":")
        started = time.perf_counter()
        headers = {}
        try:
            if name != served.name:
                raise Refused(404, f"no model {name[:50]!r}; this service has {served.name!r}")
            if request.method == "GET":
                return JSONResponse({"name": name, "ready": True, "manifest": served.public_manifest()})
            if verb not in ("predict", "explain"):
                raise Refused(404, f"a model answers :predict and :explain, got {verb[:50]!r}")
            served.open += 1
            try:
                reply = await asyncio.wait_for(answer(served, request, verb, decoding), served.limits.timeout)
                response = Response(reply, media_type="application/json")
            finally:
                served.open -= 1
        except Refused as error:
            headers = {"Retry-After": "1"} if error.status in (429, 503) else {}
            response = JSONResponse({"error": error.reason}, error.status, headers)
        except TimeoutError:
            response = JSONResponse({"error": f"not answered within {served.limits.timeout} s"}, 504)
        except Exception:  # the engine's
            logging.getLogger(__name__).exception("%s was not answered", request.url.path)
            response = JSONResponse({"error": "this failed here, and is in the service's log"}, 500)
        counted = verb if verb in ("predict", "explain") else "other"
        served.metrics.count(counted, response.status_code, time.perf_counter() - started)
        return response

    async def models(request: Any) -> Response:
        return JSONResponse({"models": [served.name]})

    async def health(request: Any) -> Response:
        alive = served.batcher.worker.is_alive() and not served.batcher.closed
        return JSONResponse({"status": "ok" if alive else "stopping"}, 200 if alive else 503)

    async def metrics(request: Any) -> Response:
        return PlainTextResponse(exposition(served.metrics, served.batcher))

    routes = [
        Route("/v1/models", models),
        Route("/v1/models/{call}", model, methods=["GET", "POST"]),
        Route("/healthz", health),
        Route("/readyz", health),
        Route("/metrics", metrics),
    ]
    return Starlette(routes=routes, lifespan=lifespan)


async def answer(served: Served, request: Any, verb: str, decoding: asyncio.Semaphore) -> bytes:
    """Returns the JSON that answers a Starlette `request` to "predict" or "explain". `decoding` bounds the bodies read at once.

    Raises:
        Refused: what was sent cannot be taken, the queue is full, the service is stopping, or the client went away.
    """
    body = await read_body(request, served.limits.body)
    content_type = request.headers.get("content-type", "application/json").split(";")[0].strip().lower()
    if not content_type.startswith("image/") and content_type != "application/json":
        raise Refused(415, f"expected application/json or image/..., got {content_type[:50]!r}")
    query = dict(request.query_params)
    async with decoding:
        instances, fields = await asyncio.to_thread(served.reader.instances, content_type, body, query)
    parameters = Parameters.parse(fields)
    targets = served.reader.targets(parameters.target, len(instances), verb == "explain")
    try:
        futures = served.batcher.submit(list(zip(instances, targets)))
    except Full as error:
        raise Refused(429, str(error)) from error
    except Closed as error:
        raise Refused(503, str(error)) from error
    samples: list[asyncio.Future[Any]] = [asyncio.wrap_future(future) for future in futures]
    # Not asyncio.gather: where it is cancelled, it ends with a CancelledError that nobody has asked for, and that is logged.
    work, gone = asyncio.ensure_future(asyncio.wait(samples)), asyncio.ensure_future(disconnected(request))
    try:
        await asyncio.wait([work, gone], return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise Refused(499, "the client went away")
        for sample in samples:
            sample.exception()  # asked of each, or that of the second is logged as well
        answers = [sample.result() for sample in samples]
    finally:
        for task in (gone, work, *samples):
            task.cancel()
    explained = targets if verb == "explain" else None
    return await asyncio.to_thread(served.reply, answers, explained, parameters.below, parameters.format)


async def read_body(request: Any, limit: int) -> bytes:
    """Returns the body, given up as soon as it is longer than `limit` bytes.

    Raises:
        Refused: it is longer, or says so in its header.
    """
    length = request.headers.get("content-length", "0")
    if length.isdecimal() and int(length) > limit:
        raise Refused(413, f"a body of {length} bytes, the limit is {limit}")
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > limit:
            raise Refused(413, f"a body of more than {limit} bytes")
        parts.append(part)
    return b"".join(parts)


async def disconnected(request: Any) -> None:
    """Returns when the client has disconnected."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def serve(program: Program, name: str, host: str, port: int, limits: Limits) -> None:
    """Print the address, and serve until SIGINT or SIGTERM: then take no more, answer what waits, and return."""
    import uvicorn

    app = application(service_of(program, name, limits))  # needs the extra `serve` too: what is missing comes before the address
    print(f"sp-fx: {name} at http://{host}:{port}/v1/models/{name}:explain", flush=True)
    uvicorn.run(
        app,
        host=host,
        port=port,
        log_level="warning",
        access_log=False,
        limit_concurrency=4 * limits.queue,
        timeout_graceful_shutdown=math.ceil(limits.timeout),
    )
