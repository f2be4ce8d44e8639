"""A load test of `sp-fx serve` on the loopback: `python bench/service.py [--requests 10000] [--clients 8] [--out FILE]`.

The zoo's residual_cnn as an .onnx package, drawn scenes as JPEG bodies to `:explain`, maps as PNG. Reported: errors, requests a
second and latency with batching and with batches of one, and the service's resident memory after the first tenth and at the end.
The exit status is 1 where a request failed or memory moved by more than 2 %.
"""

from __future__ import annotations

import argparse
import io
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import httpx
import numpy as np
from PIL import Image
from provenance import provenance

import sp_fx
from sp_fx import zoo

PORT = 8931


def bodies(count: int = 16) -> list[bytes]:
    made = []
    for pixels in zoo.draw(50_000, count).pixels:
        out = io.BytesIO()
        Image.fromarray(((pixels + 1) * 127.5).byte().permute(1, 2, 0).numpy()).save(out, "JPEG", quality=90)
        made.append(out.getvalue())
    return made


def resident(pid: int) -> int:
    line = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) * 1024


def load(package: Path, batch: int, requests: int, clients: int) -> dict:
    command = [sys.executable, "-m", "sp_fx.cli", "serve", str(package), "--name", "zoo"]
    service = subprocess.Popen([*command, "--port", str(PORT), "--batch", str(batch)], stdout=subprocess.DEVNULL)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{PORT}", trust_env=False) as client:
            for _ in range(600):
                try:
                    client.get("/healthz")
                    break
                except httpx.ConnectError:
                    time.sleep(0.1)
        sent, lock, seconds, failed, memory = bodies(), threading.Lock(), [], [], []

        def work(number: int) -> None:
            with httpx.Client(base_url=f"http://127.0.0.1:{PORT}", trust_env=False, timeout=60) as client:
                for i in range(number, requests, clients):
                    started = time.perf_counter()
                    reply = client.post(
                        "/v1/models/zoo:explain?format=png",
                        content=sent[i % len(sent)],
                        headers={"Content-Type": "image/jpeg"},
                    )
                    taken = time.perf_counter() - started
                    with lock:
                        seconds.append(taken)
                        if reply.status_code != 200 or reply.json()["explanations"][0]["format"] != "png":
                            failed.append(reply.status_code)
                        if len(seconds) == max(requests // 10, 1):
                            memory.append(resident(service.pid))

        started = time.perf_counter()
        threads = [threading.Thread(target=work, args=(n,)) for n in range(clients)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        whole = time.perf_counter() - started
        memory.append(resident(service.pid))
        metrics = httpx.get(f"http://127.0.0.1:{PORT}/metrics", trust_env=False).text
    finally:
        service.terminate()
        stopped = service.wait(60)
    return {
        "batch": batch,
        "requests": len(seconds),
        "failed": failed,
        "per_second": len(seconds) / whole,
        "p50_s": float(np.percentile(seconds, 50)),
        "p99_s": float(np.percentile(seconds, 99)),
        "resident_bytes": {"after a tenth": memory[0], "at the end": memory[-1]},
        "batches": [line for line in metrics.splitlines() if line.startswith("sp_fx_batches_total")],
        "exit": stopped,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    scenes = zoo.draw(0, 2)
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder) / "residual_cnn.onnx"
        program = sp_fx.transform(zoo.load("residual_cnn")).compile(example_inputs=scenes.pixels)
        program.save(package, class_names=zoo.labels)
        rows = [load(package, batch, args.requests if batch > 1 else args.requests // 5, args.clients) for batch in (8, 1)]
    for row in rows:
        before, after = row["resident_bytes"].values()
        row["memory_growth"] = after / before - 1
        print(
            f"batches to {row['batch']}: {row['requests']} requests, {len(row['failed'])} failed, {row['per_second']:.1f} "
            f"a second, p50 {1e3 * row['p50_s']:.1f} ms, p99 {1e3 * row['p99_s']:.1f} ms, memory {row['memory_growth']:+.2%}"
        )
    if args.out:
        record = {**provenance(), "clients": args.clients, "throughput_ratio": rows[0]["per_second"] / rows[1]["per_second"]}
        args.out.write_text(json.dumps({**record, "rows": rows}, indent=1) + "\n")
    return 0 if not rows[0]["failed"] and abs(rows[0]["memory_growth"]) <= 0.02 else 1


if __name__ == "__main__":
    sys.exit(main())
