"""A package behind HTTP, in KServe's form: `sp-fx serve PACKAGE`. Needs the extra `serve`.

    POST /v1/models/NAME:predict    {"instances": [...]}  ->  {"predictions": [...]}
    POST /v1/models/NAME:explain    {"instances": [...], "parameters": {...}}  ->  {"predictions": [...], "explanations": [...]}
    GET  /v1/models, /v1/models/NAME, /healthz, /readyz, /metrics

An instance is an array shaped like one input of the package, or `{"b64": "..."}`, a JPEG, PNG, WEBP or BMP; and a body that is a
picture (`Content-Type: image/...`) is one instance, its parameters in the query. Parameters: `target` (a class number or name,
or a list of them, one an instance), `below` (a confidence: instances predicted at or above it get no explanation) and `format`
("array" or "png"). Nothing is unpickled, and no path or address is opened for a caller.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
import logging
import math
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..figures.png import map_png
from ..program.program import Program
from .batching import Batcher, Closed, Full
from .uploads import PictureError, decode

FORMATS = ("array", "png")


@dataclass(frozen=True)
class Limits:
    """Of a service. Sizes in bytes, times in seconds."""

    body: int = 16 << 20
    pixels: int = 32 << 20  # of an uploaded picture
    instances: int = 64  # in a request
    queue: int = 256  # samples that wait
    batch: int = 8
    wait: float = 0.012  # for a batch to fill, while there are other requests
    timeout: float = 30.0
    decoding: int = 2  # bodies that are read at once


class Refused(Exception):
    """A request that is answered by a status and a reason."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status, self.reason = status, reason


class Served:
    """A loaded package, its batcher, and what it counts."""

    def __init__(self, program: Program, name: str, limits: Limits) -> None:
        shape = list(program.shapes[0])
        if not program.single or program.target != "class" or len(shape) != 3 or program.dtypes[0] != torch.float32:
            raise ValueError(
                "a service takes packages of one float32 input [B, channels, height, width] and class targets; this one takes "
                f"{[list(s) for s in program.shapes]}, {program.target} targets"
            )
        if len(program.tensors) != 1 or len(program.output_shape) != 1:
            raise ValueError(f"a service takes packages of one output [B, classes]; this one's is [B, {program.output_shape}]")
        self.program, self.name, self.limits, self.shape = program, name, limits, tuple(shape)
        manifest = program.manifest or {}
        self.names: list[str] | None = manifest.get("class_names")
        self.classes = program.output_shape[0]
        size = limits.batch if program.dynamic_batch else program.batch
        self.open = 0  # requests that are read, run or answered now: a batch of as many instances need not wait for more
        self.batcher = Batcher(self.run, size, limits.wait, limits.queue, lambda: self.open)
        self.statuses: Counter[tuple[str, int]] = Counter()
        self.latency: Counter[float] = Counter()
        self.latency_sum, self.lock = 0.0, threading.Lock()

    def run(self, samples: Sequence[tuple[np.ndarray, int]]) -> list[tuple[np.ndarray, np.ndarray]]:
        """The outputs and maps of (pixels, class) pairs; a package of a fixed batch has its last places filled with copies."""
        count = len(samples)
        filled = [*samples, *[samples[-1]] * (0 if self.program.dynamic_batch else self.program.batch - count)]
        x = torch.from_numpy(np.stack([pixels for pixels, _ in filled])).to(self.program.device)
        outputs, maps = self.program(x, torch.tensor([target for _, target in filled]))
        logits = torch.utils._pytree.tree_leaves(outputs)[0]
        found = logits.float().cpu().numpy(), maps.float().cpu().numpy()
        return [(found[0][i], found[1][i]) for i in range(count)]

    def count(self, verb: str, status: int, seconds: float) -> None:
        with self.lock:
            self.statuses[verb, status] += 1
            self.latency_sum += seconds
            self.latency[next((edge for edge in EDGES if seconds <= edge), math.inf)] += 1

    # -- reading a request

    def instances(self, kind: str, body: bytes, query: dict[str, Any]) -> tuple[list[np.ndarray], dict[str, Any]]:
        """The instances of a body, float32 [channels, height, width], and the parameters."""
        if kind.startswith("image/"):
            return [self.picture(body)], query
        try:
            asked = json.loads(body, parse_constant=_no_constant)
        except (ValueError, RecursionError) as error:
            raise Refused(400, f"the body is not JSON: {error}") from error
        if not isinstance(asked, dict) or not isinstance(asked.get("instances"), list) or not asked["instances"]:
            raise Refused(400, 'expected {"instances": [...]}, a list of at least one')
        if len(asked["instances"]) > self.limits.instances:
            raise Refused(413, f"{len(asked['instances'])} instances, the limit is {self.limits.instances}")
        parameters = asked.get("parameters", {})
        if not isinstance(parameters, dict):
            raise Refused(400, f'"parameters" is an object, got {type(parameters).__name__}')
        return [self.instance(one) for one in asked["instances"]], parameters

    def instance(self, one: Any) -> np.ndarray:
        if isinstance(one, dict):
            if set(one) != {"b64"} or not isinstance(one["b64"], str):
                raise Refused(400, f'an instance is an array or {{"b64": "..."}}, got an object of {sorted(map(str, one))[:5]}')
            try:
                return self.picture(base64.b64decode(one["b64"], validate=True))
            except binascii.Error as error:
                raise Refused(400, f"not base64: {error}") from error
        try:
            with np.errstate(over="ignore"):  # infinities are refused below
                x = np.asarray(one, np.float32)
        except (ValueError, TypeError) as error:
            raise Refused(400, f"an instance is an array of numbers of shape {list(self.shape)}: {str(error)[:100]}") from error
        if x.shape != self.shape:
            raise Refused(400, f"an instance has shape {list(self.shape)}, got {list(x.shape)}")
        if not np.isfinite(x).all():
            raise Refused(400, "an instance has a number that is not finite in float32")
        return x

    def picture(self, content: bytes) -> np.ndarray:
        if self.shape[0] != 3:
            raise Refused(415, f"this model takes {self.shape[0]} channels, not pictures: send arrays")
        try:
            return decode(content, (self.shape[1], self.shape[2]), self.limits.pixels)
        except PictureError as error:
            raise Refused(413 if error.too_large else 400, str(error)) from error

    def targets(self, asked: Any, count: int) -> list[int]:
        """Class numbers, -1 for the predicted one."""
        several = asked if isinstance(asked, list) else [asked] * count
        if len(several) != count:
            raise Refused(400, f"{len(several)} targets for {count} instances")
        return [self.target(one) for one in several]

    def target(self, asked: Any) -> int:
        if asked is None:
            return -1
        if isinstance(asked, str):
            if self.names and asked in self.names:
                return self.names.index(asked)
            if not asked.isdecimal():
                choices = f"one of {', '.join(self.names[:20])}" if self.names else "a number, since the package names no classes"
                raise Refused(400, f"unknown target {asked[:50]!r}: expected {choices}")
            asked = int(asked[:12])
        if isinstance(asked, bool) or not isinstance(asked, int) or not 0 <= asked < self.classes:
            raise Refused(400, f"targets are 0 to {self.classes - 1}, got {asked!r}"[:200])
        return asked

    # -- writing the answer

    def prediction(self, logits: np.ndarray) -> dict[str, Any]:
        if not np.isfinite(logits).all():
            raise Refused(500, "the model's output is not finite for this input")
        shifted = np.exp(logits.astype(np.float64) - logits.max())
        chances = shifted / shifted.sum()
        best = int(logits.argmax())
        label = self.names[best] if self.names else str(best)
        return {"class": best, "label": label, "confidence": float(chances[best]), "logits": logits.tolist()}

    def reply(
        self, answers: Sequence[tuple[np.ndarray, np.ndarray]], targets: list[int] | None, below: float | None, form: str
    ) -> bytes:
        """JSON. Without `targets` it has no explanations."""
        content: dict[str, Any] = {"predictions": [self.prediction(logits) for logits, _ in answers]}
        if targets is not None:
            content["explanations"] = shown = []
            for (_, found), told, aim in zip(answers, content["predictions"], targets):
                skip = below is not None and told["confidence"] >= below
                shown.append(None if skip else self.explanation(found, told["class"] if aim < 0 else aim, form))
        return json.dumps(content, allow_nan=False).encode()

    def explanation(self, map: np.ndarray, target: int, form: str) -> dict[str, Any]:
        if not np.isfinite(map).all():
            raise Refused(500, "the map is not finite for this input")
        shown = base64.b64encode(map_png(map)).decode() if form == "png" else map.tolist()
        return {"target": target, "label": self.names[target] if self.names else str(target), "format": form, "map": shown}


EDGES = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no number of JSON")


def settings(parameters: dict[str, Any]) -> tuple[Any, float | None, str]:
    """`target`, `below` and `format`."""
    known = {"target", "below", "format"}
    if unknown := sorted(map(str, parameters.keys() - known)):
        raise Refused(400, f"unknown parameters {', '.join(unknown)[:100]}; expected {', '.join(sorted(known))}")
    below, form = parameters.get("below"), parameters.get("format", "array")
    try:
        if isinstance(below, bool):
            raise TypeError
        below = None if below is None else float(below)
    except (TypeError, ValueError) as error:
        raise Refused(400, f'"below" is a confidence from 0 to 1, got {str(below)[:50]!r}') from error
    if below is not None and not 0 <= below <= 1:
        raise Refused(400, f'"below" is a confidence from 0 to 1, got {below}')
    if form not in FORMATS:
        raise Refused(400, f'"format" is one of {", ".join(FORMATS)}, got {str(form)[:50]!r}')
    return parameters.get("target"), below, form


def application(served: Served) -> Any:
    """The ASGI application; it closes the batcher when it stops."""
    from contextlib import asynccontextmanager

    from starlette.applications import Starlette
    from starlette.responses import JSONResponse, PlainTextResponse, Response
    from starlette.routing import Route

    readers = asyncio.Semaphore(served.limits.decoding)

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
                return JSONResponse({"name": name, "ready": True, "manifest": public(served)})
            if verb not in ("predict", "explain"):
                raise Refused(404, f"a model answers :predict and :explain, got {verb[:50]!r}")
            served.open += 1
            try:
                response = await asyncio.wait_for(answer(request, verb), served.limits.timeout)
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
        served.count(verb if verb in ("predict", "explain") else "other", response.status_code, time.perf_counter() - started)
        return response

    async def answer(request: Any, verb: str) -> Response:
        body = await read(request, served.limits.body)
        kind = request.headers.get("content-type", "application/json").split(";")[0].strip().lower()
        if not kind.startswith("image/") and kind != "application/json":
            raise Refused(415, f"expected application/json or image/..., got {kind[:50]!r}")
        async with readers:
            found, parameters = await asyncio.to_thread(served.instances, kind, body, dict(request.query_params))
        target, below, form = settings(parameters)
        targets = served.targets(target, len(found))
        try:
            futures = served.batcher.submit(list(zip(found, targets)))
        except Full as error:
            raise Refused(429, str(error)) from error
        except Closed as error:
            raise Refused(503, str(error)) from error
        waiting: list[asyncio.Future[Any]] = [asyncio.wrap_future(future) for future in futures]
        # Not asyncio.gather: where it is cancelled, it ends with a CancelledError that nobody has asked for, and that is logged.
        work, gone = asyncio.ensure_future(asyncio.wait(waiting)), asyncio.ensure_future(left(request))
        try:
            await asyncio.wait([work, gone], return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                raise Refused(499, "the client went away")
            for one in waiting:
                one.exception()  # asked of each, or that of the second is logged as well
            answers = [one.result() for one in waiting]
        finally:
            for one in (gone, work, *waiting):
                one.cancel()
        reply = await asyncio.to_thread(served.reply, answers, targets if verb == "explain" else None, below, form)
        return Response(reply, media_type="application/json")

    async def models(request: Any) -> Response:
        return JSONResponse({"models": [served.name]})

    async def health(request: Any) -> Response:
        alive = served.batcher.worker.is_alive() and not served.batcher.closed
        return JSONResponse({"status": "ok" if alive else "stopping"}, 200 if alive else 503)

    async def metrics(request: Any) -> Response:
        return PlainTextResponse(exposition(served))

    routes = [
        Route("/v1/models", models),
        Route("/v1/models/{call}", model, methods=["GET", "POST"]),
        Route("/healthz", health),
        Route("/readyz", health),
        Route("/metrics", metrics),
    ]
    return Starlette(routes=routes, lifespan=lifespan)


async def read(request: Any, limit: int) -> bytes:
    """The body, given up as soon as it is longer than `limit`."""
    told = request.headers.get("content-length", "0")
    parts, size = [], 0
    if told.isdecimal() and int(told) > limit:
        raise Refused(413, f"a body of {told} bytes, the limit is {limit}")
    async for part in request.stream():
        size += len(part)
        if size > limit:
            raise Refused(413, f"a body of more than {limit} bytes")
        parts.append(part)
    return b"".join(parts)


async def left(request: Any) -> None:
    """Returns when the client has disconnected."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def public(served: Served) -> dict[str, Any]:
    return {k: v for k, v in (served.program.manifest or {}).items() if k not in ("probe", "output_spec")}


def exposition(served: Served) -> str:
    """Prometheus's text format."""
    lines = ["# TYPE sp_fx_requests_total counter"]
    with served.lock:
        lines += [f'sp_fx_requests_total{{verb="{v}",status="{s}"}} {n}' for (v, s), n in sorted(served.statuses.items())]
        lines.append("# TYPE sp_fx_request_seconds histogram")
        total = 0
        for edge in (*EDGES, math.inf):
            total += served.latency[edge]
            lines.append(f'sp_fx_request_seconds_bucket{{le="{"+Inf" if edge == math.inf else edge}"}} {total}')
        lines += [f"sp_fx_request_seconds_sum {served.latency_sum:.6f}", f"sp_fx_request_seconds_count {total}"]
    lines.append("# TYPE sp_fx_batches_total counter")
    lines += [f'sp_fx_batches_total{{size="{size}"}} {n}' for size, n in sorted(served.batcher.batches.items())]
    lines += ["# TYPE sp_fx_batch_seconds_total counter", f"sp_fx_batch_seconds_total {served.batcher.seconds:.6f}"]
    lines += ["# TYPE sp_fx_waiting gauge", f"sp_fx_waiting {served.batcher.waiting}"]
    return "\n".join(lines) + "\n"


def serve(program: Program, name: str, host: str, port: int, limits: Limits) -> None:
    """Serve until SIGINT or SIGTERM: then take no more, answer what waits, and return."""
    import uvicorn

    app = application(Served(program, name, limits))
    uvicorn.run(
        app,
        host=host,
        port=port,
        log_level="warning",
        access_log=False,
        limit_concurrency=4 * limits.queue,
        timeout_graceful_shutdown=math.ceil(limits.timeout),
    )
