"""The service: KServe's form, batching, conditional explanation, and what strangers send."""

import base64
import gc
import io
import threading
import time
import zlib
from dataclasses import replace

import numpy as np
import pytest
import torch

from helpers import relative
from shipped import as_graph, small
from sp_fx.models.images import fitting
from sp_fx.packages import manifest
from sp_fx.serving.http import application
from sp_fx.serving.requests import Limits, Refused
from sp_fx.serving.service import Served
from sp_fx.serving.texts import service_of
from sp_fx.serving.uploads import PictureError, decode

pytest.importorskip("uvicorn")
Image = pytest.importorskip("PIL.Image")
httpx = pytest.importorskip("httpx")
NAMES = list("abcde")


def packaged(program, names=NAMES):
    """As `load` returns it, without the file."""
    made = manifest.describe(program, ".onnx", names)
    return manifest.program_from(made, program.run, None)


@pytest.fixture(scope="module")
def made():
    with pytest.MonkeyPatch.context() as patch:
        as_graph(patch)
        explainer, x, compiled = small()
    return explainer, x, packaged(compiled)


class Running:
    """A service on a free port of the loopback, in a thread."""

    def __init__(self, program, **limits):
        import uvicorn

        self.served = service_of(program, "small", Limits(**limits))
        app = application(self.served)
        self.server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", timeout_graceful_shutdown=5))
        self.thread = threading.Thread(target=self.server.run)
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)
        self.port = self.server.servers[0].sockets[0].getsockname()[1]
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=30, trust_env=False)

    def post(self, verb, body, **more):
        return self.client.post(f"/v1/models/small:{verb}", json=body, **more)

    def stop(self):
        self.client.close()
        self.server.should_exit = True
        self.thread.join()


@pytest.fixture(scope="module")
def running(made):
    service = Running(made[2], body=1 << 20, pixels=1 << 20)
    yield service
    service.stop()


def jpeg(size=(40, 30), kind="JPEG"):
    out = io.BytesIO()
    g = np.random.default_rng(0)
    Image.fromarray(g.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)).save(out, kind)
    return out.getvalue()


# -- right


def test_predict_and_explain(made, running):
    explainer, x, _ = made
    body = {"instances": x.tolist()}
    predictions = running.post("predict", body).json()["predictions"]
    wanted = explainer(x)
    assert relative(torch.tensor([p["logits"] for p in predictions]), wanted) <= 1e-5
    assert [p["label"] for p in predictions] == [NAMES[i] for i in wanted.argmax(1)]
    assert [p["confidence"] for p in predictions] == pytest.approx(wanted.softmax(1).amax(1).tolist(), rel=1e-4)
    found = running.post("explain", body).json()
    assert found["predictions"] == predictions
    assert relative(torch.tensor([e["map"] for e in found["explanations"]]), explainer.pullback(x)) <= 1e-4
    asked = running.post("explain", {**body, "parameters": {"target": ["b", 2, None]}}).json()["explanations"]
    classes = torch.tensor([1, 2, wanted[2].argmax()])
    assert [e["target"] for e in asked] == classes.tolist()
    assert relative(torch.tensor([e["map"] for e in asked]), explainer.pullback(x, classes)) <= 1e-4


def test_only_below_a_confidence(made, running):
    explainer, x, _ = made
    sure = explainer(x).detach().softmax(1).amax(1)
    below = float(sure.sort().values[1]) - 1e-4
    found = running.post("explain", {"instances": x.tolist(), "parameters": {"below": below}}).json()["explanations"]
    assert [e is None for e in found] == (sure >= below).tolist() and sum(e is None for e in found) == 2


def test_pictures_in_and_out(running):
    direct = running.client.post(
        "/v1/models/small:explain?format=png&target=3", content=jpeg(), headers={"Content-Type": "image/jpeg"}
    )
    assert direct.status_code == 200
    within = running.post("explain", {"instances": [{"b64": base64.b64encode(jpeg()).decode()}], "parameters": {"target": 3}})
    assert direct.json()["predictions"] == within.json()["predictions"]
    shown = Image.open(io.BytesIO(base64.b64decode(direct.json()["explanations"][0]["map"])))
    assert shown.size == (16, 16) and shown.format == "PNG"
    colours = np.asarray(shown.convert("RGB"), np.int64)
    signs = colours[..., 0] - colours[..., 2]  # red above zero, blue below
    values = np.asarray(within.json()["explanations"][0]["map"]).sum(0)
    assert (np.sign(signs) == np.sign(values))[np.abs(values) > np.abs(values).max() / 20].all()


def test_health_metrics_and_the_manifest(running):
    running.post("predict", {"instances": [np.zeros((3, 16, 16)).tolist()]})
    assert running.client.get("/healthz").json() == {"status": "ok"}
    assert running.client.get("/v1/models").json() == {"models": ["small"]}
    assert running.client.get("/v1/models/small").json()["manifest"]["class_names"] == NAMES
    text = running.client.get("/metrics").text
    assert 'sp_fx_requests_total{verb="predict",status="200"}' in text and "sp_fx_waiting 0" in text


def test_requests_share_batches(made):
    service = Running(made[2], batch=4, wait=0.2)
    try:
        body, found = {"instances": [made[1][0].tolist()]}, []
        threads = [threading.Thread(target=lambda: found.append(service.post("predict", body).status_code)) for _ in range(8)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        assert found == [200] * 8 and max(service.served.batcher.batches) > 1
    finally:
        service.stop()


# -- what strangers send


def ribbon(width, height, kind="PNG"):
    """A picture in few bytes that grows as it is resized until it covers a square."""
    out = io.BytesIO()
    Image.new("RGB", (width, height), "red").save(out, kind)
    return out.getvalue()


def bomb(side):
    """A PNG that says it has side x side pixels, in a few hundred bytes."""

    def chunk(kind, data):
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    header = side.to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0])
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(90001))) + chunk(b"IEND", b"")


IMAGE, JSON, GOOD = {"Content-Type": "image/png"}, {"Content-Type": "application/json"}, [np.zeros((3, 16, 16)).tolist()]
ABUSE = {
    "wrong JSON": (dict(content=b'{"instances": [', headers=JSON), 400, "not JSON"),
    "a list": (dict(json=[1]), 400, "instances"),
    "deep JSON": (dict(content=b"[" * 100_000, headers=JSON), 400, "not JSON"),
    "no instance": (dict(json={"instances": []}), 400, "at least one"),
    "too many": (dict(json={"instances": [0] * 65}), 413, "65 instances"),
    "another shape": (dict(json={"instances": [[1, 2]]}), 400, r"shape [3, 16, 16], got [2]"),
    "ragged": (dict(json={"instances": [[[1], [1, 2]]]}), 400, "array of numbers"),
    "strings": (dict(json={"instances": [["a"]]}), 400, "array of numbers"),
    "NaN": (dict(content=b'{"instances": [[NaN]]}', headers=JSON), 400, "NaN"),
    "infinite": (dict(json={"instances": [np.full((3, 16, 16), 1e300).tolist()]}), 400, "not finite"),
    "an address": (dict(json={"instances": [{"url": "http://127.0.0.1/"}]}), 400, "b64"),
    "not base64": (dict(json={"instances": [{"b64": "!!"}]}), 400, "base64"),
    "50 MB": (dict(content=bytes(50_000_000), headers=IMAGE), 413, "limit"),
    "a bomb": (dict(content=bomb(30_000), headers=IMAGE), 413, "limit"),
    "a lesser bomb": (dict(content=bomb(3_000), headers=IMAGE), 413, "3000 x 3000"),
    "a ribbon": (dict(content=ribbon(20_000, 2), headers=IMAGE), 413, "resized to 160000 x 16"),
    "a pole": (dict(content=ribbon(2, 20_000), headers=IMAGE), 413, "resized to 16 x 160000"),
    "a large integer": (dict(content=b'{"instances": [' + b"9" * 400 + b"]}", headers=JSON), 400, "array of numbers"),
    "a large confidence": (dict(json={"instances": GOOD, "parameters": {"below": 10**400}}), 400, "below"),
    "a target of many digits": (dict(json={"instances": GOOD, "parameters": {"target": "0" * 12 + "4"}}), 400, "unknown target"),
    "a truncated JPEG": (dict(content=jpeg()[:-300], headers=IMAGE), 400, "not a whole picture"),
    "no picture": (dict(content=b"cat", headers=IMAGE), 400, "not a whole picture"),
    "another type": (dict(content=b"cat", headers={"Content-Type": "application/x-pickle"}), 415, "application/json"),
    "unknown target": (dict(json={"instances": GOOD, "parameters": {"target": "cat"}}), 400, "unknown target 'cat'"),
    "target outside": (dict(json={"instances": GOOD, "parameters": {"target": 5}}), 400, "0 to 4"),
    "target below": (dict(json={"instances": GOOD, "parameters": {"target": -1}}), 400, "0 to 4"),
    "two targets": (dict(json={"instances": GOOD, "parameters": {"target": [1, 2]}}), 400, "2 targets for 1"),
    "unknown parameter": (dict(json={"instances": GOOD, "parameters": {"file": "/etc/passwd"}}), 400, "unknown parameters file"),
    "below what": (dict(json={"instances": GOOD, "parameters": {"below": 2}}), 400, "below"),
    "below a word": (dict(json={"instances": GOOD, "parameters": {"below": True}}), 400, "below"),
    "which form": (dict(json={"instances": GOOD, "parameters": {"format": "pickle"}}), 400, "format"),
}


@pytest.mark.parametrize("case", ABUSE)
def test_abuse_is_answered_and_the_next_request_served(running, case):
    request, status, reason = ABUSE[case]
    try:
        found = running.client.post("/v1/models/small:explain", **request)
        assert found.status_code == status and reason in found.json()["error"], found.text
    except httpx.WriteError:  # the service has answered and hung up before 50 MB were sent
        assert case == "50 MB"
    assert running.post("predict", {"instances": GOOD}).status_code == 200


@pytest.mark.parametrize(
    "size, preprocessing, taken",
    [
        ((20_000, 2), fitting(224), False),  # it would cover the square as 2240000 x 224
        ((1400, 20), fitting(224), False),
        ((300, 20), fitting(224), True),
        ((2, 500_000), replace(fitting(224), squash=True), False),  # by way of 224 x 500000
        ((500_000, 2), replace(fitting(224), squash=True), True),  # by way of 224 x 2
        ((1000, 900), replace(fitting(224), squash=True), True),
        ((1000, 1000), fitting((10, 1000)), True),
    ],
)
def test_nothing_is_resized_beyond_the_limit(size, preprocessing, taken, monkeypatch):
    """What pillow is asked to make, whichever side it begins with, stays below the service's own limit."""
    made, resize = [], Image.Image.resize

    def watched(image, to, *more):
        made.extend([to[0] * to[1], to[0] * image.height])
        return resize(image, to, *more)

    monkeypatch.setattr(Image.Image, "resize", watched)
    limit = 1 << 20
    if taken:
        assert decode(ribbon(*size), preprocessing, limit).shape == (3, *preprocessing.cropped)
        assert max(made) <= limit
    else:
        with pytest.raises(PictureError, match=rf"would be resized to .*; at most {limit} are read") as refused:
            decode(ribbon(*size), preprocessing, limit)
        assert refused.value.too_large and not made


def test_unknown_models_and_verbs(running):
    assert running.client.post("/v1/models/cat:explain", json={"instances": GOOD}).status_code == 404
    assert running.post("train", {"instances": GOOD}).status_code == 404
    assert running.client.get("/etc/passwd").status_code == 404
    assert running.client.get("/v1/models/small:explain").status_code in (200, 405)


class Slow:
    """A program that waits for leave."""

    def __init__(self, program):
        self.leave = threading.Event()
        self.__dict__.update({k: v for k, v in program.__dict__.items()})
        self.inner = program

    def __call__(self, x, target):
        assert self.leave.wait(20)
        return self.inner(x, target)


def test_a_full_queue_a_timeout_and_a_client_that_leaves(made, caplog):
    slow = Slow(made[2])
    service = Running(slow, batch=1, queue=2, timeout=1.0)
    try:
        with pytest.raises(httpx.ReadTimeout):  # the client goes away while its sample runs
            service.post("predict", {"instances": GOOD}, timeout=0.2)
        with pytest.raises(httpx.ReadTimeout):  # and another while its sample waits
            service.post("predict", {"instances": GOOD}, timeout=0.2)
        found = service.post("predict", {"instances": GOOD * 3})
        assert found.status_code == 429 and found.headers["retry-after"] == "1"
        assert service.post("predict", {"instances": GOOD}).status_code == 504
        slow.leave.set()
        until = time.monotonic() + 5
        while service.served.batcher.waiting and time.monotonic() < until:  # those that had left hold their places until skipped
            time.sleep(0.01)
        assert service.post("predict", {"instances": GOOD}).status_code == 200
        assert service.served.batcher.waiting == 0
        assert sum(service.served.batcher.batches.values()) <= 3  # those that had left were not run
    finally:
        slow.leave.set()
        service.stop()
    gc.collect()
    assert not caplog.records  # asyncio tells here of futures whose errors nobody asked for


class Failing(Slow):
    def __call__(self, x, target):
        if not self.leave.is_set():
            raise RuntimeError("out of order")
        return self.inner(x, target)


def test_an_engine_that_fails_is_told_and_the_next_request_served(made, caplog):
    failing = Failing(made[2])
    service = Running(failing)
    try:
        found = service.post("predict", {"instances": GOOD * 3})
        assert found.status_code == 500 and "out of order" not in found.text and "out of order" in caplog.text
        failing.leave.set()
        assert service.post("predict", {"instances": GOOD}).status_code == 200
        assert 'sp_fx_requests_total{verb="predict",status="500"} 1' in service.client.get("/metrics").text
    finally:
        service.stop()
    gc.collect()
    assert len(caplog.records) == 1


@pytest.mark.parametrize("where", ["output", "map"])
def test_numbers_that_are_not_finite_are_failures_and_no_json(made, where):
    served = Served(made[2], "small", Limits())
    answer = [np.zeros(5, np.float32), np.zeros((3, 16, 16), np.float32)]
    answer[where == "map"].flat[0] = np.nan
    with pytest.raises(Refused, match=f"the (model's )?{where} is not finite") as refused:
        served.reply([tuple(answer)], [1], None, "array")
    assert refused.value.status == 500
    served.batcher.close(5)


def test_a_graceful_stop_answers_what_waits(made):
    slow = Slow(made[2])
    service = Running(slow, batch=1)
    found = []
    thread = threading.Thread(target=lambda: found.append(service.post("predict", {"instances": GOOD * 2}).status_code))
    thread.start()
    while not service.served.batcher.waiting:
        time.sleep(0.01)
    service.server.should_exit = True
    slow.leave.set()
    thread.join()
    service.stop()
    assert found == [200] and not service.served.batcher.worker.is_alive()


def test_what_cannot_be_served(made, monkeypatch):
    as_graph(monkeypatch)
    _, _, direction = small(target="direction")
    with pytest.raises(ValueError, match="class targets"):
        Served(direction, "a", Limits())
