"""What a batch job leaves for people: `results.csv`, a line for each picture, and `index.html`, which shows them."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ...figures.drawing import CHANGE, SLOPE
from ...figures.map_png import map_png, robust_limit
from ...viewer.gallery import Entry, gallery
from .batches import Batches, write_atomically
from .results import Result, results

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Summary:
    """What a job has done: how many `pictures`, the (name, reason) of those that could not be read, the pictures on the page."""

    pictures: int
    errors: list[tuple[str, str]]
    shown: int

    def record(self) -> dict[str, object]:
        return {**asdict(self), "errors": [{"name": name, "error": reason} for name, reason in self.errors]}


def report(batches: Batches, out: Path, most: int) -> Summary:
    """Write `results.csv` and, for the first `most` pictures, the page `index.html` with its pictures in `page/`."""
    classifier, errors = batches.classifier, list[tuple[str, str]]()
    rows, entries = list[list[str]](), list[Entry]()
    if most:
        (out / "page").mkdir(exist_ok=True)
    for number, result in enumerate(results(out)):
        if result.logits is None or result.map is None:
            errors.append((result.name, result.error))
            rows.append([result.name, "", "", "", result.error])
            continue
        probabilities = softmax(result.logits)
        best = int(probabilities.argmax())
        rows.append([result.name, str(best), classifier.label(best), f"{probabilities[best]:.6f}", ""])
        if len(entries) < most:
            entries.append(entry(batches, number, result, probabilities, out))
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([["name", "class", "label", "confidence", "error"], *rows])
    write_atomically(out / "results.csv", text.getvalue().encode(errors="surrogateescape"))
    if most:
        explained = len(rows) - len(errors)
        unit = CHANGE if classifier.program.method == "ascend" else SLOPE
        about = json.loads(batches.provenance)
        page = gallery(entries, errors, about, left_out=explained - len(entries), unit=unit)
        write_atomically(out / "index.html", page.encode(errors="replace"))
    return Summary(len(rows), errors, len(entries))


def entry(batches: Batches, number: int, result: Result, probabilities: np.ndarray, out: Path) -> Entry:
    """Returns what the page shows of picture `number` of the job, whose files are written."""
    classifier = batches.classifier
    assert result.map is not None
    picture, map = f"page/{number:06d}.jpg", f"page/{number:06d}.png"
    if not (out / picture).exists():
        write_atomically(out / picture, jpeg(batches.preprocessing(batches.files[number]).pixels))
    if not (out / map).exists():
        write_atomically(out / map, map_png(result.map))
    best = int(probabilities.argmax())
    likeliest = np.argsort(-probabilities, kind="stable")[:5].tolist()
    return Entry(
        name=result.name,
        index=best,
        label=classifier.label(best),
        confidence=float(probabilities[best]),
        target=classifier.label(best if batches.target < 0 else batches.target),
        top=tuple((classifier.label(i), float(probabilities[i])) for i in likeliest),
        picture=picture,
        map=map,
        limit=robust_limit(result.map.astype(np.float64).sum(0)),
    )


def softmax(logits: np.ndarray) -> np.ndarray:
    shifted = np.exp(logits.astype(np.float64) - logits.max())
    return shifted / shifted.sum()


def jpeg(pixels: Tensor) -> bytes:
    """Returns pixels [C, H, W] in [-1, 1] as a JPEG, as the network sees them."""
    from PIL import Image

    values = ((pixels + 1) * 127.5).round().clamp(0, 255).byte().expand(3, -1, -1).permute(1, 2, 0).contiguous().numpy()
    file = io.BytesIO()
    Image.fromarray(values).save(file, "JPEG", quality=92)
    return file.getvalue()
