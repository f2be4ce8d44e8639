"""A served package: its program behind a batcher, and the answers made of what the program returns."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ..figures.map_png import map_png
from ..models.classes import probabilities
from ..packages.classifier import Classifier
from ..program.program import Program
from .batching import Batcher
from .metrics import RequestMetrics
from .requests import Limits, Refused, RequestReader


class Served:
    """A loaded package called `name`, with the reader of its requests, its batcher, and its metrics.

    Raises:
        ValueError: the package has several inputs, an input that is not float32 [C, H, W], or no class targets.
    """

    def __init__(self, program: Program, name: str, limits: Limits) -> None:
        self.program, self.name, self.limits = program, name, limits
        self.class_names: list[str] | None = (program.manifest or {}).get("class_names")
        self.reader = self.reader_of()
        size = limits.batch if program.dynamic_batch else program.batch
        self.open = 0  # requests that are read, run or answered now: a batch of as many instances need not wait for more
        self.batcher = Batcher(self.run, size, limits.wait, limits.queue, lambda: self.open)
        self.metrics = RequestMetrics()

    def reader_of(self) -> RequestReader:
        """Returns what reads the requests."""
        self.classifier = Classifier(self.program)
        shape, classes = self.classifier.shape, self.classifier.classes
        return RequestReader(shape, self.classifier.preprocessing, classes, self.class_names, self.limits)

    def label(self, index: int) -> str:
        """Returns the name of a class, or its number where the package names none."""
        return self.class_names[index] if self.class_names else str(index)

    def run(self, samples: Sequence[tuple[np.ndarray, int]]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Returns (logits [classes], map [channels, height, width]), float32, for each (pixels, class) pair."""
        x = torch.from_numpy(np.stack([pixels for pixels, _ in samples])).to(self.program.device)
        logits, maps = self.classifier(x, torch.tensor([target for _, target in samples]))
        return list(zip(logits.float().cpu().numpy(), maps.float().cpu().numpy()))

    def public_manifest(self) -> dict[str, Any]:
        """Returns the package's manifest without the entries that only a loader needs."""
        private = ("probe", "output_spec", "output_spec_plain")
        return {key: value for key, value in (self.program.manifest or {}).items() if key not in private}

    def reply(
        self, answers: Sequence[tuple[np.ndarray, np.ndarray]], targets: list[Any] | None, below: float | None, form: str
    ) -> bytes:
        """Returns the JSON of the (logits, map) pairs `answers`; without `targets` it has no explanations.

        Raises:
            Refused: with status 500, where logits or a map are not finite.
        """
        predictions = [self.prediction(logits) for logits, _ in answers]
        content: dict[str, Any] = {"predictions": predictions}
        if targets is not None:
            content["explanations"] = explanations = []
            for (_, map), prediction, target in zip(answers, predictions, targets):
                skip = below is not None and prediction.get("confidence", -1.0) >= below
                explanations.append(None if skip else self.explanation(map, self.aim(prediction, target), form))
        return json.dumps(content, allow_nan=False).encode()

    def aim(self, prediction: dict[str, Any], target: Any) -> Any:
        """Returns the class that is explained: the predicted one for -1."""
        return prediction["class"] if target < 0 else target

    def prediction(self, logits: np.ndarray) -> dict[str, Any]:
        """Returns the JSON object of one prediction: class, label, confidence (its probability), logits."""
        if not np.isfinite(logits).all():
            raise Refused(500, "the model's output is not finite for this input")
        best = int(logits.argmax())
        by = self.program.signature.probabilities
        chances = probabilities(torch.from_numpy(logits).double()[None], by)[0]
        label, confidence = self.label(best), chances[best].item()
        return {"class": best, "label": label, "confidence": confidence, "logits": logits.tolist()}

    def explanation(self, map: np.ndarray, target: int, form: str) -> dict[str, Any]:
        """Returns the JSON object of one explanation, its map as nested lists or, for the form "png", in base64."""
        if not np.isfinite(map).all():
            raise Refused(500, "the map is not finite for this input")
        encoded = base64.b64encode(map_png(map)).decode() if form == "png" else map.tolist()
        return {"target": target, "label": self.label(target), "format": form, "map": encoded}
