"""Metrics of a service: requests by verb and status, their latency, and the batcher's counts, in Prometheus's text format."""

from __future__ import annotations

import math
import threading
from collections import Counter

from .batching import Batcher

EDGES = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)  # of the latency histogram, in seconds


class RequestMetrics:
    """Counts the requests that were answered. Any thread may count."""

    def __init__(self) -> None:
        self.statuses: Counter[tuple[str, int]] = Counter()  # by (verb, HTTP status)
        self.latency: Counter[float] = Counter()  # by the upper edge of the bucket, the last one infinite
        self.latency_sum, self.lock = 0.0, threading.Lock()

    def count(self, verb: str, status: int, seconds: float) -> None:
        """Count one request, such as ("explain", 200, 0.031)."""
        with self.lock:
            self.statuses[verb, status] += 1
            self.latency_sum += seconds
            self.latency[next((edge for edge in EDGES if seconds <= edge), math.inf)] += 1


def exposition(requests: RequestMetrics, batcher: Batcher) -> str:
    """Returns all counts in Prometheus's text format; the buckets of a histogram are cumulative there."""
    lines = ["# TYPE sp_fx_requests_total counter"]
    with requests.lock:
        lines += [f'sp_fx_requests_total{{verb="{v}",status="{s}"}} {n}' for (v, s), n in sorted(requests.statuses.items())]
        lines.append("# TYPE sp_fx_request_seconds histogram")
        total = 0
        for edge in (*EDGES, math.inf):
            total += requests.latency[edge]
            lines.append(f'sp_fx_request_seconds_bucket{{le="{"+Inf" if edge == math.inf else edge}"}} {total}')
        lines += [f"sp_fx_request_seconds_sum {requests.latency_sum:.6f}", f"sp_fx_request_seconds_count {total}"]
    lines.append("# TYPE sp_fx_batches_total counter")
    lines += [f'sp_fx_batches_total{{size="{size}"}} {n}' for size, n in sorted(batcher.batches.items())]
    lines += ["# TYPE sp_fx_batch_seconds_total counter", f"sp_fx_batch_seconds_total {batcher.seconds:.6f}"]
    lines += ["# TYPE sp_fx_waiting gauge", f"sp_fx_waiting {batcher.waiting}"]
    return "\n".join(lines) + "\n"
