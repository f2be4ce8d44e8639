"""The names of classes: read from a file, and looked up."""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from os import PathLike
from pathlib import Path


def class_index(name: str, labels: Sequence[str] | None) -> int:
    """Returns the index of the class called `name`: its label, or one of the synonyms that commas separate in it; case matters
    only where names differ by nothing else. For "Tinca tinca" and the labels ("tench, Tinca tinca", "crane") it is 0.

    Raises:
        ValueError: no class or several are called so (the nearest or all are named), or there are no labels.
    """
    if labels is None:
        raise ValueError(f"the names of this model's classes are not known: pass an index instead of {name!r}")
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


def read_class_names(path: str | PathLike[str]) -> tuple[str, ...]:
    """Returns the names of classes in a file, in the order of the model's outputs: text of one name a line, or JSON: a list, a
    mapping from numbers to names, `{"0": "cat"}`, or from names to numbers, `{"cat": 0}`, as torchvision's `class_to_idx` is.

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
        by_number = all(str(key).isdecimal() for key in content)
        try:
            pairs = sorted((int(k), v) if by_number else (int(v), k) for k, v in content.items())
        except (TypeError, ValueError):
            raise ValueError('a mapping is from numbers to names, {"0": "cat"}, or from names to numbers') from None
        if [number for number, _ in pairs] != list(range(len(pairs))):
            raise ValueError(f"the numbers of {len(pairs)} classes are 0 to {len(pairs) - 1}, each once")
        content = [name for _, name in pairs]
    if not isinstance(content, list) or not all(isinstance(name, str) for name in content):
        raise ValueError('expected a list of names, or a mapping such as {"0": "cat", "1": "dog"}')
    return content
