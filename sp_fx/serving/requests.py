"""Requests to a service, read: what a body says becomes arrays and parameters, or a refusal with its status and reason.

An instance is an array shaped like one input of the package, or `{"b64": "..."}`, a JPEG, PNG, WEBP or BMP; and a body that is a
picture (`Content-Type: image/...`) is one instance, its parameters in the query. Nothing is unpickled, and no path or address is
opened for a caller.
"""

from __future__ import annotations

import base64
import binascii
import json
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..models.images import Preprocessing
from .uploads import PictureError, decode

FORMATS = ("array", "png")


@dataclass(frozen=True)
class Limits:
    """Limits of a service. Sizes in bytes, times in seconds."""

    body: int = 16 << 20
    pixels: int = 32 << 20  # of an uploaded picture
    instances: int = 64  # in a request
    queue: int = 256  # samples that wait
    batch: int = 8
    wait: float = 0.012  # for a batch to fill, while there are other requests
    timeout: float = 30.0
    decoding: int = 2  # bodies that are read at once


class Refused(Exception):
    """A request that is answered by an HTTP `status` and a `reason`, such as 400, "the body is not JSON: ..."."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status, self.reason = status, reason


@dataclass(frozen=True)
class Parameters:
    """Parameters of a request: `target`, a class number or name, or a list of them, one an instance; `below`, a confidence:
    instances predicted at or above it get no explanation; and `format`, "array" or "png"."""

    target: Any
    below: float | None
    format: str

    @classmethod
    def parse(cls, fields: dict[str, Any]) -> Parameters:
        """Parameters of the JSON object, or of the query, `fields`. The target is left as it was sent: `RequestReader.targets`
        reads it.

        Raises:
            Refused: an unknown name, or a value out of range.
        """
        known = {"target", "below", "format"}
        if unknown := sorted(map(str, fields.keys() - known)):
            raise Refused(400, f"unknown parameters {', '.join(unknown)[:100]}; expected {', '.join(sorted(known))}")
        below, form = fields.get("below"), fields.get("format", "array")
        try:
            if isinstance(below, bool):
                raise TypeError
            below = None if below is None else float(below)
        except (TypeError, ValueError, OverflowError) as error:
            raise Refused(400, f'"below" is a confidence from 0 to 1, got {str(below)[:50]!r}') from error
        if below is not None and not 0 <= below <= 1:
            raise Refused(400, f'"below" is a confidence from 0 to 1, got {below}')
        if form not in FORMATS:
            raise Refused(400, f'"format" is one of {", ".join(FORMATS)}, got {str(form)[:50]!r}')
        return cls(fields.get("target"), below, form)


@dataclass(frozen=True)
class RequestReader:
    """Reads requests to a package of one input of `shape` [channels, height, width], which `preprocessing` makes of pictures, and
    `classes` classes, called `class_names` where it names them. Every method raises `Refused` for what it cannot take."""

    shape: tuple[int, ...]
    preprocessing: Preprocessing | None
    classes: int
    class_names: list[str] | None
    limits: Limits

    def instances(self, content_type: str, body: bytes, query: dict[str, Any]) -> tuple[list[np.ndarray], dict[str, Any]]:
        """Returns the instances of a body, float32 [channels, height, width], and the parameters, which are not yet checked."""
        if content_type.startswith("image/"):
            return [self.picture(body)], query
        try:
            content = json.loads(body, parse_constant=_refuse_constant)
        except (ValueError, RecursionError) as error:
            raise Refused(400, f"the body is not JSON: {error}") from error
        if not isinstance(content, dict) or not isinstance(content.get("instances"), list) or not content["instances"]:
            raise Refused(400, 'expected {"instances": [...]}, a list of at least one')
        if len(content["instances"]) > self.limits.instances:
            raise Refused(413, f"{len(content['instances'])} instances, the limit is {self.limits.instances}")
        parameters = content.get("parameters", {})
        if not isinstance(parameters, dict):
            raise Refused(400, f'"parameters" is an object, got {type(parameters).__name__}')
        return [self.instance(item) for item in content["instances"]], parameters

    def instance(self, item: Any) -> np.ndarray:
        """Returns one instance as float32 [channels, height, width]: nested lists, or `{"b64": "..."}`."""
        if isinstance(item, dict):
            if set(item) != {"b64"} or not isinstance(item["b64"], str):
                raise Refused(400, f'an instance is an array or {{"b64": "..."}}, got an object of {sorted(map(str, item))[:5]}')
            try:
                return self.picture(base64.b64decode(item["b64"], validate=True))
            except binascii.Error as error:
                raise Refused(400, f"not base64: {error}") from error
        try:
            with np.errstate(over="ignore"):  # infinities are refused below
                x = np.asarray(item, np.float32)
        except (ValueError, TypeError, OverflowError) as error:
            raise Refused(400, f"an instance is an array of numbers of shape {list(self.shape)}: {str(error)[:100]}") from error
        if x.shape != self.shape:
            raise Refused(400, f"an instance has shape {list(self.shape)}, got {list(x.shape)}")
        if not np.isfinite(x).all():
            raise Refused(400, "an instance has a number that is not finite in float32")
        return x

    def picture(self, content: bytes) -> np.ndarray:
        """Returns an encoded picture as float32 [channels, height, width] in [-1, 1]."""
        if self.preprocessing is None:
            raise Refused(415, f"this model takes {self.shape[0]} channels, not pictures: send arrays")
        try:
            return decode(content, self.preprocessing, self.limits.pixels)
        except PictureError as error:
            raise Refused(413 if error.too_large else 400, str(error)) from error

    def targets(self, target: Any, count: int, explains: bool = True) -> list[int]:
        """Returns the class number of each of `count` instances, -1 for the predicted one: `None` is [-1, -1] for two. `explains`
        says whether they are used."""
        targets = target if isinstance(target, list) else [target] * count
        if len(targets) != count:
            raise Refused(400, f"{len(targets)} targets for {count} instances")
        return [self.target(item) for item in targets]

    def target(self, item: Any) -> int:
        """Returns the class number that a name, a number, or a number in a string (as in a query) stands for; -1 for None."""
        if item is None:
            return -1
        if isinstance(item, str):
            if self.class_names and item in self.class_names:
                return self.class_names.index(item)
            if not item.isdecimal() or len(item) > 12:
                names = self.class_names
                choices = f"one of {', '.join(names[:20])}" if names else "a number, since the package names no classes"
                raise Refused(400, f"unknown target {item[:50]!r}: expected {choices}")
            item = int(item)
        if isinstance(item, bool) or not isinstance(item, int) or not 0 <= item < self.classes:
            raise Refused(400, f"targets are 0 to {self.classes - 1}, got {item!r}"[:200])
        return item


def _refuse_constant(name: str) -> float:
    """Python's JSON takes NaN and Infinity, which are none."""
    raise ValueError(f"{name} is no number of JSON")
