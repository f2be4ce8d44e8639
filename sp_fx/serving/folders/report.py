"""What a batch job leaves for people: `results.csv`, a line for each picture, and `index.html`, which shows them."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from ...figures.drawing import CHANGE, SLOPE
from ...figures.map_png import map_png, robust_limit
from ...viewer.gallery import Entry, gallery
from .batches import PAGE, Batches, sweep, write_atomically
from .results import Result, batch_file, maps, read

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Summary:
    """What a job has done: how many `pictures`, the (name, reason) of those with errors, the pictures on the page."""

    pictures: int
    errors: list[tuple[str, str]]
    shown: int

    def record(self) -> dict[str, object]:
        return {**asdict(self), "errors": [{"name": name, "error": reason} for name, reason in self.errors]}


def report(batches: Batches, out: Path, most: int) -> Summary:
    """Write `results.csv` and, for the first `most` pictures, the page `index.html` with its pictures in `page/`.

    Raises:
        ValueError: a batch's file is damaged, or of another job.
    """
    classifier, errors = batches.classifier, list[tuple[str, str]]()
    rows, entries = list[list[str]](), list[Entry]()
    if most:
        (out / PAGE).mkdir(exist_ok=True)
    for number, result in enumerate(rows_of(batches, out, lambda: len(entries) < most)):
        if result.logits is None:
            errors.append((result.name, result.error))
            rows.append([result.name, "", "", "", result.error])
            continue
        chances = classifier.probabilities(torch.from_numpy(result.logits).double()[None])[0].numpy()
        best = int(chances.argmax())
        rows.append([result.name, str(best), classifier.label(best), f"{chances[best]:.6f}", ""])
        if len(entries) < most and (shown := entry(batches, number, result, chances, out)):
            entries.append(shown)
    table = [["name", "class", "label", "confidence", "error"], *rows]
    write_atomically(out / "results.csv", encoded("".join(map(csv_line, table))))
    if most:
        explained = len(rows) - len(errors)
        unit = CHANGE if classifier.program.method == "ascend" else SLOPE
        about = json.loads(batches.provenance)
        page = gallery(entries, errors, about, left_out=explained - len(entries), unit=unit)
        write_atomically(out / "index.html", page.encode(errors="replace"))
    sweep(out)
    return Summary(len(rows), errors, len(entries))


def rows_of(batches: Batches, out: Path, wanted: Callable[[], bool]) -> Iterator[Result]:
    """Yields the pictures of a job whose batches are all there, with their maps as long as these are `wanted`: of a million
    pictures they take 300 GB."""
    for number in range(len(batches)):
        file, some = batch_file(out, number), ("maps", "scales") if wanted() else ()
        arrays = read(file, "names", "errors", "logits", "provenance", *some)
        if str(arrays["provenance"]) != batches.provenance or arrays["names"].tolist() != batches.names_of(number):
            raise ValueError(f"{file} is of another job: delete it, and the same command makes it anew")
        found: Iterable[np.ndarray | None] = maps(arrays) if some else [None] * len(arrays["names"])
        for name, error, logits, map in zip(arrays["names"].tolist(), arrays["errors"].tolist(), arrays["logits"], found):
            yield Result(name, error, None, None) if error else Result(name, "", logits, map)


def entry(batches: Batches, number: int, result: Result, chances: np.ndarray, out: Path) -> Entry | None:
    """Returns what the page shows of picture `number` of the job, whose files are written; None where it is gone."""
    classifier = batches.classifier
    assert result.map is not None
    picture, map = f"{PAGE}/{number:06d}.jpg", f"{PAGE}/{number:06d}.png"
    product = "" if classifier.program.method == "ascend" else f"{PAGE}/{number:06d}_times_input.png"
    missing = [file for file in (picture, map, product) if file and not (out / file).exists()]
    if missing:
        try:
            pixels = batches.preprocessing(batches.files[number]).pixels
        except (OSError, ValueError):
            return None
        for file in missing:
            values = result.map if file == map else result.map * pixels.numpy()
            write_atomically(out / file, jpeg(pixels) if file == picture else map_png(values))
    best = int(chances.argmax())
    likeliest = np.argsort(-chances, kind="stable")[:5].tolist()
    return Entry(
        name=result.name,
        index=best,
        label=classifier.label(best),
        confidence=float(chances[best]),
        target=classifier.label(best if batches.target < 0 else batches.target),
        top=tuple((classifier.label(i), float(chances[i])) for i in likeliest),
        picture=picture,
        map=map,
        limit=robust_limit(result.map.astype(np.float64).sum(0)),
        product=product,
    )


def csv_line(row: list[str]) -> str:
    """Returns one line of the table. Python's csv quotes only what ends its own lines, and a name may have any line break."""
    line = io.StringIO()
    csv.writer(line, lineterminator="\r\n").writerow(row)
    return line.getvalue().removesuffix("\r\n") + "\n"


def encoded(text: str) -> bytes:
    """Returns text as UTF-8, file names that are none as the bytes that they are; other lone surrogates become ?."""
    return re.sub("[\ud800-\udc7f\udd00-\udfff]", "?", text).encode(errors="surrogateescape")


def jpeg(pixels: Tensor) -> bytes:
    """Returns pixels [C, H, W] in [-1, 1] as a JPEG, as the network sees them."""
    from PIL import Image

    values = ((pixels + 1) * 127.5).round().clamp(0, 255).byte().expand(3, -1, -1).permute(1, 2, 0).contiguous().numpy()
    file = io.BytesIO()
    Image.fromarray(values).save(file, "JPEG", quality=92)
    return file.getvalue()
