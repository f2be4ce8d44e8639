"""A package that classifies pictures: what batch jobs, the service and the command line ask of one."""

from __future__ import annotations

from os import PathLike
from typing import Any

import torch
from torch import Tensor

from ..models.classes import class_index, probabilities
from ..models.images import Preprocessing, fitting
from ..program.program import Program
from ..targets import primary
from .package import load


class Classifier:
    """A loaded package of one float32 input [B, channels, height, width], class scores [B, classes], alone or among other
    outputs, and class targets.

    Attributes:
        program, manifest: the package's.
        class_names: where the package names its classes, else None.
        preprocessing: what a picture becomes, pixels in [-1, 1]: what the manifest records, or, where it records nothing, a
            picture that just covers the input. None where the input has neither 3 channels nor 1.

    Raises:
        ValueError: the program is another.
    """

    def __init__(self, program: Program) -> None:
        shape = [n for n in program.shapes[0] if isinstance(n, int)]
        is_one = program.single and not program.lengths and len(shape) == 3 and program.dtypes[0] == torch.float32
        if not is_one or program.target != "class":
            raise ValueError(
                "expected a package of one float32 input [B, channels, height, width] and class targets; this one takes "
                f"{[list(s) for s in program.shapes]}, {program.target} targets"
            )
        if len(program.output_shape) != 1:
            raise ValueError(f"expected a package of class scores [B, classes]; this one's are {['B', *program.output_shape]}")
        self.program, self.shape = program, tuple(shape)
        self.manifest: dict[str, Any] = program.manifest or {}
        self.class_names: list[str] | None = self.manifest.get("class_names")
        channels, height, width = shape
        recorded = self.manifest.get("preprocessing")
        of_pictures = fitting(height if height == width else (height, width), channels) if channels in (1, 3) else None
        self.preprocessing = of_pictures if recorded is None else Preprocessing.recorded(recorded)
        if self.preprocessing is not None and [len(self.preprocessing.mean), *self.preprocessing.cropped] != shape:
            made = [len(self.preprocessing.mean), *self.preprocessing.cropped]
            raise ValueError(f"the manifest's preprocessing makes pictures of {made}, and the package takes {shape}")

    @classmethod
    def load(cls, path: str | PathLike[str], *, device: str | None = None, threads: int | None = None) -> Classifier:
        """Returns the package at `path`; arguments and errors as of `load`, and ValueError where it is another program."""
        return cls(load(path, device=device, threads=threads))

    def __call__(self, x: Tensor, classes: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Returns the scores [B, classes] and the maps of inputs `x`, for `classes` [B], the predicted ones where None or -1.

        A package of a fixed batch runs in pieces, the last of which is filled up with copies of its last sample.
        """
        classes = torch.full((len(x),), -1) if classes is None else classes
        if self.program.dynamic_batch:
            outputs, maps = self.program(x, classes)
            return primary(outputs), maps
        size, scores, found = self.program.batch, list[Tensor](), list[Tensor]()
        for start in range(0, len(x), size):
            piece, aim = x[start : start + size], classes[start : start + size]
            lack = size - len(piece)
            filled = torch.cat([piece, piece[-1:].expand(lack, *piece.shape[1:])])
            outputs, maps = self.program(filled, torch.cat([aim, aim[-1:].expand(lack)]))
            scores.append(primary(outputs)[: len(piece)])
            found.append(maps[: len(piece)])
        return torch.cat(scores), torch.cat(found)

    def for_pictures(self) -> Preprocessing:
        """Returns the preprocessing; ValueError where the package takes no pictures."""
        if self.preprocessing is None:
            raise ValueError(f"this package takes {list(self.shape)}, which are no pictures of 3 channels or 1")
        return self.preprocessing

    def probabilities(self, scores: Tensor) -> Tensor:
        """Returns the class probabilities of scores [B, classes], shaped like them."""
        return probabilities(scores, self.program.signature.probabilities)

    @property
    def classes(self) -> int:
        return self.program.signature.classes

    def label(self, index: int) -> str:
        """Returns the name of a class, or its number where the package names none."""
        return self.class_names[index] if self.class_names else str(index)

    def target(self, text: str | None) -> int:
        """Returns the number of the class that a name or a number stands for; -1, the predicted class, for None.

        Raises:
            ValueError: no class is called so.
            IndexError: a number that no class has.
        """
        if text is None:
            return -1
        if not text.isdecimal() or (self.class_names and text in self.class_names):
            return class_index(text, self.class_names)
        if int(text) >= self.classes:
            raise IndexError(f"target {text} is outside 0 to {self.classes - 1}, the classes of the package")
        return int(text)
