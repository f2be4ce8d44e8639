"""The page of a batch job: every picture of a folder with its map and its prediction.

The page is one HTML document that opens from the disk, without a server: `gallery.html` is its frame, `viewer.css` and
`viewer.js` the parts that other pages share, `gallery.css` and `gallery.js` what is this page's own. The names of files, the
labels and the reasons come from outside and may hold anything: here they are escaped, and the scripts write them as text only.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from string import Template
from typing import Any
from urllib.parse import quote

from ..figures.drawing import PART, READINGS

OPEN_ERRORS = 5  # a longer table of errors starts folded, or the pictures would begin below the first screen


@dataclass(frozen=True)
class Entry:
    """One explained picture.

    Attributes:
        name: of the picture's file, relative to the job's folder.
        index: of the predicted class.
        label: the name of the predicted class, or "class 7".
        confidence: the probability of the predicted class.
        target: the label of the class that the map explains, often the predicted one.
        top: the five likeliest classes, likeliest first, as pairs (label, probability).
        picture: the path, relative to the page, of a JPEG of what the network saw; not yet quoted as a URL.
        map: likewise of a PNG of the map.
        limit: the value at which the map's colours end.
        product: likewise of the map times the pixels, "" where there is none, as of a change.
    """

    name: str
    index: int
    label: str
    confidence: float
    target: str
    top: tuple[tuple[str, float], ...]
    picture: str
    map: str
    limit: float
    product: str = ""


def gallery(
    entries: Sequence[Entry], errors: Sequence[tuple[str, str]], about: Mapping[str, Any], *, left_out: int = 0, unit: str
) -> str:
    """Returns the page: one HTML document, to be written as UTF-8, with its styles, scripts and data inline; the pictures stay
    files beside it.

    `errors` are pairs (file name, reason). `about` is JSON about the job; the page's title names its `model` and `method`.
    `left_out` is how many further pictures were explained and are not on the page. `unit` is that of the maps' values, such as
    `figures.drawing.SLOPE`; the legend says what red and blue are in it, where `READINGS` has it.

    Raises:
        ValueError: an entry with a number that is not finite.
    """
    style = asset("viewer.css") + asset("gallery.css")
    script = asset("viewer.js") + asset("gallery.js")
    data = {"unit": unit, "entries": [entry_record(entry) for entry in entries]}
    return Template(asset("gallery.html")).substitute(
        policy=policy(style, script),
        style=style,
        script=script,
        data=script_json(data),
        subject=" &middot; ".join(text(about[key]) for key in ("model", "method") if isinstance(about.get(key), str)),
        numbers=numbers(entries, errors),
        left_out=left_out_note(len(entries), left_out),
        legend=terms(legend(unit, any(entry.product for entry in entries))),
        errors=errors_table(errors),
        about=terms(about),
    )


def legend(unit: str, products: bool) -> dict[str, str]:
    """Returns what red and blue are in maps of that unit, and in their products with the pixels."""
    of_maps = dict(zip(("Red", "Blue"), READINGS.get(unit, ())))
    return {**of_maps, "Times the input": "red: {}; blue: {}".format(*READINGS[PART])} if products else of_maps


def asset(name: str) -> str:
    """Returns the text of a file of this folder."""
    return Path(__file__).with_name(name).read_text("utf-8")


def entry_record(entry: Entry) -> dict[str, Any]:
    """Returns the entry as JSON, its paths as addresses.

    Raises:
        ValueError: a number in it is not finite.
    """
    if not all(map(math.isfinite, (entry.confidence, entry.limit, *(p for _, p in entry.top)))):
        raise ValueError(f"{entry.name!r} has numbers that are not finite: {entry.confidence}, {entry.limit} or in {entry.top}")
    paths = {"picture": entry.picture, "map": entry.map, "product": entry.product}
    return {**asdict(entry), **{name: path and address(path) for name, path in paths.items()}}


def address(path: str) -> str:
    """Returns a relative path as a URL that can only lead below the page: "a b/#1.png" is "./a%20b/%231.png"."""
    # The dot keeps "//host/x" on the disk, and the quoting of colons keeps "javascript:x" a file. Names that are no UTF-8, which
    # Python reads as lone surrogates, become the bytes that they are.
    return "./" + quote(path, errors="surrogateescape")


def script_json(value: Any) -> str:
    """Returns `value` as JSON that can stand in a script element.

    It is ASCII, so that neither U+2028 nor a lone surrogate is in it, and no `<` can end or open anything.
    """
    return json.dumps(value, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def policy(style: str, script: str) -> str:
    """Returns the policy of the page's content: this style, this script and pictures beside it, whatever else got into it."""

    def digest(code: str) -> str:
        return "'sha256-" + base64.b64encode(hashlib.sha256(code.encode()).digest()).decode() + "'"

    own = f"style-src {digest(style)}; script-src {digest(script)}; img-src 'self' file:"
    return f"default-src 'none'; {own}; base-uri 'none'; form-action 'none'"


def text(value: Any) -> str:
    """Returns `value` as HTML text; it fits into an attribute's quotes too."""
    return html.escape(re.sub("[\ud800-\udfff]", "\ufffd", str(value)))  # lone surrogates, of names that are no UTF-8


def numbers(entries: Sequence[Entry], errors: Sequence[tuple[str, str]]) -> str:
    """Returns the numbers at the page's head as the inside of a `dl`."""
    mean = f"{math.fsum(entry.confidence for entry in entries) / len(entries):.1%}" if entries else "none"
    pairs = (("Pictures", f"{len(entries):,}"), ("Mean confidence", mean), ("Errors", f"{len(errors):,}"))
    return "".join(f"<div><dt>{term}</dt><dd>{value}</dd></div>" for term, value in pairs)


def left_out_note(shown: int, left_out: int) -> str:
    """Returns a paragraph on the pictures that are not on the page, "" where there are none."""
    if not left_out:
        return ""
    return (
        f'<p class="note">{shown + left_out:,} pictures were explained. This page shows {shown:,} of them; '
        f'the other {left_out:,} are in <a href="results.csv">results.csv</a>.</p>'
    )


def errors_table(errors: Sequence[tuple[str, str]]) -> str:
    """Returns a section with the files that could not be explained, "" where there are none."""
    if not errors:
        return ""
    rows = "".join(f'<tr><th scope="row" dir="auto">{text(a)}</th><td dir="auto">{text(b)}</td></tr>' for a, b in errors)
    files = "1 file" if len(errors) == 1 else f"{len(errors):,} files"
    return (
        f'<details class="fold errors"{" open" if len(errors) <= OPEN_ERRORS else ""}>'
        f"<summary>{files} could not be explained</summary>"
        '<div class="scroll" tabindex="0" role="region" aria-label="Files that could not be explained">'
        '<table><thead><tr><th scope="col">File</th><th scope="col">Reason</th></tr></thead>'
        f"<tbody>{rows}</tbody></table></div></details>"
    )


def terms(facts: Mapping[str, Any]) -> str:
    """Returns JSON by name as a `dl`; mappings inside are lists of their own."""

    def shown(value: Any) -> str:
        if isinstance(value, Mapping):
            return terms(value) if value else "none"
        if isinstance(value, list | tuple):
            return ", ".join(map(shown, value)) or "none"
        return "none" if value is None else ("no", "yes")[value] if isinstance(value, bool) else text(value)

    rows = (f'<div><dt>{text(key)}</dt><dd dir="auto">{shown(value)}</dd></div>' for key, value in facts.items())
    return f"<dl>{''.join(rows)}</dl>"
