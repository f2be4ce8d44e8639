"""The names of classes: read from a file, and looked up."""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor


def class_index(name: str, labels: Sequence[str] | None) -> int:
    """Returns the index of the class called `name`: its label, or one of the synonyms that commas separate in it; case matters
    only where names differ by nothing else. For "Tinca tinca" and the labels ("tench, Tinca tinca", "crane") it is 0.

    Raises:
        ValueError: no class or several are called so (the nearest or all are named), or there are no labels.
    """
    if name.startswith("-") and name[1:].isdecimal() and name not in (labels or ()):
        raise ValueError(f"a class is a number from 0 on, or a name; got {name}")
    if labels is None:
        raise ValueError(
            f"the names of this model's classes are not known: pass a number in place of {name!r}, or say the names "
            "(--class-names FILE)"
        )
    synonyms = [(i, synonym) for i, label in enumerate(labels) for synonym in dict.fromkeys([label, *label.split(", ")])]
    for fold in (str, str.casefold):
        matches = sorted({i for i, synonym in synonyms if fold(synonym) == fold(name)})
        if len(matches) == 1:
            return matches[0]
        if matches:
            several = ", ".join(f"{i} ({labels[i]})" for i in matches)
            raise ValueError(f"several classes are called {name!r}: pass one of the indices {several}")
    folded = {synonym.casefold(): synonym for _, synonym in synonyms}
    close = difflib.get_close_matches(name.casefold(), folded, 3, 0.5)
    hint = f"the nearest: {', '.join(folded[c] for c in close)}" if close else f"it has {len(labels)}, such as {labels[0]}"
    raise ValueError(f"no class is called {name!r}; {hint}")


def probabilities(scores: Tensor, by: str = "softmax") -> Tensor:
    """Returns the class probabilities of a model's scores [B, classes], shaped like them, each row by itself.

    `by` "softmax": of classes that exclude each other; of a single score the sigmoid, since its softmax would always be 1, and
    rows that sum to 1 already, as they are. "sigmoid": of a multi-label network, each class's own. "none": they are that.
    """
    if by == "none":
        return scores
    if by == "sigmoid" or scores.shape[1] == 1:
        return scores.sigmoid()
    sums = (scores >= 0).all(1, keepdim=True) & ((scores.sum(1, keepdim=True) - 1).abs() < 1e-3)
    return torch.where(sums, scores, scores.softmax(1))


def read_class_names(path: str | PathLike[str]) -> tuple[str, ...]:
    """Returns the names of classes in a file, in the order of the model's outputs: text of one name a line, or JSON: a list, a
    mapping from numbers to names, `{"0": "cat"}`, or from names to numbers, `{"cat": 0}`, as torchvision's `class_to_idx` is. Of
    several names of a class, `{"0": ["n01440764", "tench"]}` as Keras' file of ImageNet has them, the last is taken.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is none of these; no name at all, an empty one, or a number that is missing.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file of class names at {path}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"the class names in {path} are no UTF-8 text: {error}") from None
    if path.suffix.lower() == ".json":
        try:
            names = _names_in(json.loads(text))
        except ValueError as error:
            raise ValueError(f"the class names in {path} cannot be read: {error}") from None
    else:
        names = [line.strip() for line in text.rstrip().splitlines()]
    if empty := [i for i, name in enumerate(names) if not name]:
        raise ValueError(f"{path} has no name for class {empty[0]}: a file of class names has one a line, in order")
    if not names:
        raise ValueError(f"{path} has no class names in it")
    return tuple(names)


def _names_in(content: object) -> list[str]:
    if isinstance(content, dict):
        # Of {"7": 0, "3": 1}, the classes of folders named by digits, the keys are the names.
        by_number = not all(isinstance(value, int) for value in content.values())
        try:
            pairs = sorted(((int(k), v) if by_number else (v, k) for k, v in content.items()), key=lambda pair: pair[0])
        except (TypeError, ValueError):
            raise ValueError('a mapping is from numbers to names, {"0": "cat"}, or from names to numbers') from None
        if [number for number, _ in pairs] != list(range(len(pairs))):
            raise ValueError(f"the numbers of {len(pairs)} classes are 0 to {len(pairs) - 1}, each once")
        content = [name for _, name in pairs]
    if isinstance(content, list):
        content = [each[-1] if isinstance(each, list) and each else each for each in content]
    if not isinstance(content, list) or not all(isinstance(name, str) for name in content):
        raise ValueError('expected a list of names, or a mapping such as {"0": "cat", "1": "dog"}')
    return content
