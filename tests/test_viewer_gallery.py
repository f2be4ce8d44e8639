"""The page of a batch job: nothing in a name, label or reason breaks out of its place, and a browser shows what it should."""

import base64
import hashlib
import json
import math
import re
import shutil
import subprocess
from dataclasses import asdict, replace
from html.parser import HTMLParser
from urllib.parse import unquote

import numpy as np
import pytest

from sp_fx.figures.drawing import CHANGE, SLOPE
from sp_fx.figures.map_png import map_png
from sp_fx.viewer.gallery import Entry, address, asset, gallery

SCRIPTS, STYLES = ("viewer.js", "gallery.js"), ("viewer.css", "gallery.css")
HOSTILE = (
    "</script><script>document.title = 'out'</script>",
    "<img src=x onerror=\"document.title = 'out'\">",
    "<!-- <script>",
    "\"'`&amp;$style${data}",
    "line\nbreak\r\u2028\u2029\u0085\0",
    "emoji 😀👩\u200d🔬",
    "\u202egpj.exe قطة",
    "not UTF-8: \udcff",
    "__proto__",
    "",
    "#?a=1%20&b/../c:d\\e",
)


class Page(HTMLParser):
    """What a page holds: its tags with attributes, and the text of its elements by tag."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.texts, self.open = [], {}, []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.texts.setdefault(tag, []).append("")
        self.open = [*self.open, tag]

    def handle_endtag(self, tag):
        if tag in self.open:
            del self.open[len(self.open) - 1 - self.open[::-1].index(tag) :]

    def handle_data(self, data):
        if self.open:
            self.texts[self.open[-1]][-1] += data


def entry(i, name=None, label=None):
    label = f"class {i % 5}" if label is None else label
    top = ((label, 0.5 + i / 100), *((f"other {k}", 0.1) for k in range(4)))
    name = f"photo {i:02d}.jpg" if name is None else name
    return Entry(name, i % 5, label, 0.5 + i / 100, label, top, f"pictures/{i} #.jpg", f"maps/{i}.png", 1e-7, f"maps/{i}x.png")


def data(page):
    return json.loads(Page(page).texts["script"][0])


def test_hostile_texts_stay_where_they_belong():
    entries = [replace(entry(i, name, name), picture=f"pictures/{name}") for i, name in enumerate(HOSTILE)]
    about = {name: {name: [name, None, math.inf, True, {}]} for name in HOSTILE} | {"model": HOSTILE[0], "method": HOSTILE[1]}
    page = gallery(entries, [(name, name) for name in HOSTILE], about, unit=HOSTILE[0])
    tame = gallery([entry(i) for i in range(11)], [("a", "b")] * 11, {str(i): {"b": ["c"]} for i in range(13)}, unit=SLOPE)

    found, tags = data(page), [tag for tag, _ in Page(page).tags]
    assert found["unit"] == HOSTILE[0]
    for record, wanted in zip(found["entries"], entries, strict=True):
        assert record["picture"].startswith("./") and not set(record["picture"]) & set("\"'<> #?:\\")
        record["picture"] = unquote(record["picture"].removeprefix("./"), errors="surrogateescape")
        for kind in ("map", "product"):
            record[kind] = unquote(record[kind].removeprefix("./"))
        assert record == json.loads(json.dumps(asdict(wanted)))
    assert {tag: tags.count(tag) for tag in set(tags) - {"div", "dl", "dt", "dd"}} == {
        tag: [t for t, _ in Page(tame).tags].count(tag) for tag in set(tags) - {"div", "dl", "dt", "dd"}
    }
    assert not [a for _, attributes in Page(page).tags for a in attributes if a.startswith("on")]
    assert Page(page).texts["td"] == [name.replace("\udcff", "\ufffd") for name in HOSTILE]
    page.encode()  # lone surrogates in it would not be written


def test_addresses_lead_below_the_page():
    assert address("a b/#1%.png") == "./a%20b/%231%25.png"
    assert address("//elsewhere.org/x") == ".///elsewhere.org/x"
    assert address("javascript:x") == "./javascript%3Ax"
    assert address("é\udcff.png") == "./%C3%A9%FF.png"


def test_the_policy_lets_in_this_script_and_style_only():
    page = Page(gallery([entry(0)], [], {}, unit=SLOPE))
    policy = next(a["content"] for _, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    for code, name in ((page.texts["script"][1], "script"), (page.texts["style"][0], "style")):
        digest = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
        assert f"{name}-src 'sha256-{digest}';" in policy
    assert policy.startswith("default-src 'none'; ")
    assert not [a for _, a in page.tags if "style" in a or any(key.startswith("on") for key in a)]


@pytest.mark.parametrize("name", [*SCRIPTS, *STYLES, "gallery.html"])
def test_assets_need_nothing_from_outside_and_can_stand_in_a_page(name):
    text = asset(name)
    assert not re.search(r"https?://|url\(|@import|fetch\(|import\(|innerHTML|outerHTML|insertAdjacentHTML|eval\(", text)
    assert name.endswith("html") or not re.search(r"</(script|style)|<!--", text)
    assert max(map(len, text.splitlines())) <= 130


def test_the_page_says_what_is_on_it():
    about = {"model": "Net", "method": "pullback", "versions": {"torch": "2.11"}}
    page = Page(gallery([entry(0), entry(10)], [("a.jpg", "broken")], about, left_out=1200, unit=SLOPE))
    numbers = dict(zip(page.texts["dt"], page.texts["dd"]))
    assert {"Pictures": "2", "Mean confidence": "55.0%", "Errors": "1", "torch": "2.11"}.items() <= numbers.items()
    assert numbers["Red"].startswith("a brighter pixel there raises") and "1 file could not be explained" in page.texts["summary"]
    (note,) = (text for text in page.texts["p"] if "were explained" in text)
    assert note.startswith("1,202 pictures were explained. This page shows 2 of them; the other 1,200 are in ")
    assert "Net · pullback" in page.texts["p"]
    assert "is made brighter" in gallery([], [], {}, unit=CHANGE)
    assert "adds to the class" in numbers["Times the input"]
    assert "Times the input</dt>" not in gallery([replace(entry(0), product="")], [], {}, unit=CHANGE)
    plain = gallery([entry(0)], [], {}, unit=SLOPE)
    assert "could not be explained" not in plain and "were explained" not in plain


@pytest.mark.parametrize("change", [{"limit": math.nan}, {"confidence": math.inf}, {"top": (("a", math.nan),)}])
def test_numbers_that_are_not_finite_are_refused(change):
    with pytest.raises(ValueError, match=r"photo 01.jpg.*not finite"):
        gallery([entry(0), replace(entry(1), **change)], [], {}, unit=SLOPE)


# -- in a browser


@pytest.fixture
def dom(tmp_path):
    """A function that writes a page with pictures and maps beside it, and returns the document that a browser makes of it."""
    chromium, image = shutil.which("chromium"), pytest.importorskip("PIL.Image")
    if chromium is None:
        pytest.skip("chromium is not installed")

    def load(entries, hash="", errors=()):
        for folder in ("pictures", "maps"):
            (tmp_path / folder).mkdir(exist_ok=True)
        for one in {one.picture: one for one in entries}.values():
            image.new("RGB", (8, 8), "green").save(tmp_path / one.picture)
            for file in filter(None, (one.map, one.product)):
                (tmp_path / file).write_bytes(map_png(np.ones((3, 8, 8))))
        (tmp_path / "index.html").write_text(gallery(entries, errors, {}, unit=SLOPE), "utf-8")
        options = ("--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=5000", "--window-size=1280,900")
        run = subprocess.run(
            [chromium, *options, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", f"file://{tmp_path}/index.html{hash}"],
            capture_output=True,
            check=True,
            timeout=120,
        )
        return Page(run.stdout.decode())

    return load


def attributes(page, tag, **wanted):
    """The attributes of the elements `tag` that have all of `wanted`, of which `kind` is a word of the class."""
    kind = wanted.pop("kind", None)
    return [
        a
        for t, a in page.tags
        if t == tag and wanted.items() <= a.items() and (kind is None or kind in (a.get("class") or "").split())
    ]


def test_a_browser_shows_every_card(dom):
    page = dom([entry(i) for i in range(20)])
    assert [card["title"] for card in attributes(page, "div", kind="card")] == [f"photo {i:02d}.jpg" for i in range(20)]
    assert "20 of 20 pictures" in page.texts["p"]
    assert {"All classes", "\u2068class 3\u2069 (4)"} <= set(page.texts["option"])
    maps = attributes(page, "img", kind="map")
    assert maps[1]["alt"] == "map of \u2068class 1\u2069 for \u2068photo 01.jpg\u2069" and maps[1]["width"] == maps[1]["height"]
    assert all("coarse" in image["class"] for image in maps[:4])  # which is set when an image has come
    assert "open" not in attributes(page, "dialog")[0]


def test_a_browser_shows_what_the_hash_asks_for(dom):
    entries = [entry(i) for i in range(20)]
    page = dom(entries, "#class=3&sort=confidence-down&picture=photo+08.jpg")
    assert [card["title"] for card in attributes(page, "div", kind="card")] == [f"photo {i:02d}.jpg" for i in (18, 13, 8, 3)]
    assert "4 of 20 pictures" in page.texts["p"]
    assert "open" in attributes(page, "dialog")[0] and "photo 08.jpg" in page.texts["h2"] and "3 of 4" in page.texts["p"]
    assert page.texts["span"].count("58.0%") == 2  # on the card and in the dialog
    assert "+1.0 \u00d7 10\u207b\u2077" in page.texts["span"]
    assert attributes(page, "img", alt="map of \u2068class 3\u2069 for \u2068photo 08.jpg\u2069, times the input")
    assert "three" not in attributes(page, "div", kind="views")[0]["class"]
    change = dom([replace(one, product="") for one in entries], "#picture=photo+08.jpg")  # an ascent's, which no pixels multiply
    assert "hidden" in attributes(change, "figure")[2] and attributes(change, "div", kind="three")
    nothing = dom(entries, "#q=zebra&from=55")
    assert not attributes(nothing, "div", kind="card") and "0 of 20 pictures" in nothing.texts["p"]
    assert "hidden" not in attributes(nothing, "div", id="nothing")[0]


def test_a_browser_shows_hostile_texts_as_they_are(dom):
    names = [name for name in HOSTILE if "\0" not in name]
    page = dom([entry(i, name, name) for i, name in enumerate(names)], errors=[(name, name) for name in names])
    assert page.texts["title"][0] == "Explained pictures"
    assert len(attributes(page, "div", kind="card")) == len(names) and len(page.texts["script"]) == 2
    shown = set(page.texts["span"])
    assert {name.replace("\udcff", "\ufffd") or "(no name)" for name in names if "\n" not in name} <= shown


def test_a_browser_makes_thousands_of_cards_in_pieces(dom):
    many = [replace(entry(0), name=f"{i:04d}.jpg") for i in range(5000)]
    page = dom(many)
    assert 60 <= len(attributes(page, "div", kind="card")) <= 300 and "5,000 of 5,000 pictures" in page.texts["p"]
