"""Does `sp-fx serve` stand a load? `python bench/service.py [--requests 10000] [--clients 8] [--out FILE]`, on the loopback.

A network of the zoo as a package, drawn scenes as JPEG bodies to `:explain`, maps as PNG. Reported: errors, requests a second and
latency with batching and with batches of one, the service's resident memory in each tenth of them (the least seen in it: a batch
that runs holds 10 MB more), and where a request's time goes: the engine's share of a batch, and the processors' time in the
service and in the clients, which share this machine. The exit status is 1 where a request failed or memory moved by more than 2 %
between the second tenth and the last.
"""

from __future__ import annotations

import argparse
import http.client
import io
import json
import math
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
from PIL import Image
from provenance import provenance

import sp_fx
from sp_fx import zoo
from sp_fx.program import compiling

PORT = 8931


def bodies(count: int = 16) -> list[bytes]:
    """Returns drawn scenes as JPEG."""
    encoded = []
    for pixels in zoo.draw(50_000, count).pixels:
        out = io.BytesIO()
        Image.fromarray(((pixels + 1) * 127.5).byte().permute(1, 2, 0).numpy()).save(out, "JPEG", quality=90)
        encoded.append(out.getvalue())
    return encoded


def resident(pid: int) -> int:
    """Returns the resident memory of a process in bytes."""
    line = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) * 1024


def processor_seconds(pid: int) -> float:
    """Returns the processor time, user and system, of a process."""
    ticks = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    return sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")


def get(path: str) -> str:
    connection = http.client.HTTPConnection("127.0.0.1", PORT, timeout=60)
    connection.request("GET", path)
    return connection.getresponse().read().decode()


def load_test(package: Path, batch: int, requests: int, clients: int, options: list[str]) -> dict:
    """Returns the row of one service: starts it, sends `requests` from `clients` threads, and stops it."""
    command = [sys.executable, "-m", "sp_fx", "serve", str(package), "--name", "zoo", "--batch", str(batch)]
    service = subprocess.Popen([*command, *options, "--port", str(PORT)], stdout=subprocess.DEVNULL)
    try:
        for _ in range(600):
            try:
                get("/healthz")
                break
            except ConnectionRefusedError:
                time.sleep(0.1)
        sent, lock, seconds, failed, begun = bodies(), threading.Lock(), [], [], []
        warm = max(requests // 10, 1)

        def work(number: int) -> None:
            connection = http.client.HTTPConnection("127.0.0.1", PORT, timeout=60)
            for i in range(number, requests, clients):
                started = time.perf_counter()
                connection.request(
                    "POST", "/v1/models/zoo:explain?format=png", sent[i % len(sent)], {"Content-Type": "image/jpeg"}
                )
                reply = connection.getresponse()
                content = reply.read()
                elapsed = time.perf_counter() - started
                with lock:
                    seconds.append(elapsed)
                    if reply.status != 200 or json.loads(content)["explanations"][0]["format"] != "png":
                        failed.append(reply.status)
                    if len(seconds) == warm:
                        begun.append(spent())

        def spent() -> tuple[float, float, float, float]:
            """Returns the seconds so far: by the clock, of the engine, of the processors in the service and in the clients."""
            lines = dict(line.rsplit(" ", 1) for line in get("/metrics").splitlines() if not line.startswith("#"))
            engine = float(lines["sp_fx_batch_seconds_total"])
            return time.perf_counter(), engine, processor_seconds(service.pid), time.process_time()

        threads = [threading.Thread(target=work, args=(n,)) for n in range(clients)]
        for thread in threads:
            thread.start()
        memory = [math.inf] * 10
        while any(thread.is_alive() for thread in threads):
            tenth = min(10 * len(seconds) // requests, 9)
            memory[tenth] = min(memory[tenth], resident(service.pid))
            time.sleep(0.02)
        ended = spent()
        metrics = get("/metrics")
    finally:
        service.terminate()
        stopped = service.wait(60)
    clock, engine, serving, asking = (1e3 * (b - a) / (requests - warm) for a, b in zip(begun[0], ended))
    return {
        "batch": batch,
        "options": options,
        "requests": len(seconds),
        "failed": failed,
        "per_second": 1e3 / clock,
        "p50_s": float(np.percentile(seconds[warm:], 50)),
        "p99_s": float(np.percentile(seconds[warm:], 99)),
        "ms_a_request": {"in all": clock, "engine": engine, "processors, service": serving, "processors, clients": asking},
        "resident_bytes_by_tenths": memory,
        "batches": [line for line in metrics.splitlines() if line.startswith("sp_fx_batches_total")],
        "exit": stopped,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--network", default="residual_cnn", choices=zoo.NAMES)
    parser.add_argument("--format", default="pt2", choices=("pt2", "onnx"), help="of the package (default pt2)")
    parser.add_argument("--options", nargs=argparse.REMAINDER, default=[], help="of `sp-fx serve`; the last argument")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    scenes = zoo.draw(0, 2)
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder) / f"{args.network}.{args.format}"
        compiling.compiled = lambda graph, example: graph  # what is saved is the graph
        program = sp_fx.transform(zoo.load(args.network)).compile(example_inputs=scenes.pixels)
        program.save(package, class_names=zoo.labels)
        requests = {8: args.requests, 1: max(args.requests // 5, 200)}
        rows = [load_test(package, batch, count, args.clients, args.options) for batch, count in requests.items()]
    for row in rows:
        _, before, *_, after = row["resident_bytes_by_tenths"]
        row["memory_growth"] = after / before - 1
        print(
            f"batches to {row['batch']}: {row['requests']} requests, {len(row['failed'])} failed, {row['per_second']:.1f} "
            f"a second, p50 {1e3 * row['p50_s']:.1f} ms, p99 {1e3 * row['p99_s']:.1f} ms, memory {row['memory_growth']:+.2%}; "
            + ", ".join(f"{what} {ms:.1f} ms" for what, ms in row["ms_a_request"].items())
        )
    if args.out:
        record = {**provenance(), "network": args.network, "format": args.format, "clients": args.clients}
        record["throughput_ratio"] = rows[0]["per_second"] / rows[1]["per_second"]
        args.out.write_text(json.dumps({**record, "rows": rows}, indent=1) + "\n")
    return 0 if not rows[0]["failed"] and abs(rows[0]["memory_growth"]) <= 0.02 else 1


if __name__ == "__main__":
    sys.exit(main())
