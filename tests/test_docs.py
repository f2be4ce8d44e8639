"""The README and the pages of docs/: links, names of files, commands, and numbers that stand in two places."""

import importlib
import re
from pathlib import Path

import pytest

import sp_fx

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
if not README.exists():
    pytest.skip("the README is not beside these tests", allow_module_level=True)
PAGES = {str(page.relative_to(ROOT)): page for page in (README, *sorted((ROOT / "docs").glob("*.md")))}


def anchors(page):
    """The anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def table_below(page, heading):
    """The first table after `heading`: {row: {column: cell}}."""
    lines = page.read_text().split(f"\n{heading}\n")[1].splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    columns = rows[0]
    ends = next((i for i, row in enumerate(rows) if len(row) != len(columns)), len(rows))
    return {row[0]: dict(zip(columns[1:], row[1:])) for row in rows[2:ends]}


def test_the_readme_is_one_that_is_read():
    assert len(README.read_text().splitlines()) <= 150


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name):
    page = PAGES[name]
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        end = page.parent / path if path else page
        assert end.exists(), f"{name} links to {target}"
        assert not anchor or anchor in anchors(end), f"{name} links to {target}, whose headings are {sorted(anchors(end))}"


@pytest.mark.parametrize("name", PAGES)
def test_files_that_are_named_exist(name):
    """Paths in backticks or after `python`: those of the package, benches, results, examples, kernels."""
    text = PAGES[name].read_text()
    roots = "sp_fx|bench|examples|kernels|docs|tests"
    named = re.findall(rf"(?<![\w/.-])((?:{roots})/[\w./*-]*[\w/*])", text)
    missing = [path for path in named if not list(ROOT.glob(path.rstrip("/")))]
    assert named and not missing if name != "docs/limits.md" else not missing


def test_the_readme_names_every_folder_of_the_package():
    heading = "order](docs/architecture.md#the-folders-lowest-first). `analysis/` and `program/` have a page of their own inside:"
    table = table_below(README, heading)
    named = {folder for row in table for folder in re.findall(r"`(\w+)/`", row)}
    assert named == {path.parent.name for path in (ROOT / "sp_fx").glob("*/__init__.py")}


@pytest.mark.parametrize("name", PAGES)
def test_tables_are_whole(name):
    """Every row of a table has as many cells as its head."""
    cells = 0
    for line in PAGES[name].read_text().splitlines():
        count = line.count("|") if line.startswith("|") else 0
        assert not count or not cells or count == cells, f"{name}: {line}"
        cells = count


def test_the_short_table_of_costs_is_part_of_the_long_one():
    short = table_below(README, "## What it costs")
    long = table_below(PAGES["docs/performance.md"], "## Speed on two cores")
    assert {row: {column: long[row][column] for column in cells} for row, cells in short.items()} == short
    assert not {"VGG-11", "DenseNet-121"} & set(short["eager pullback"])  # columns of other runs


CODE = sorted((ROOT / "sp_fx").rglob("*.py"))
STEMS = {stem: [path.read_text() for path in CODE if path.stem == stem] for stem in {path.stem for path in CODE}}
CLASSES = {name: path.read_text() for path in CODE for name in re.findall(r"^class (\w+)", path.read_text(), flags=re.MULTILINE)}


def test_the_words_of_a_report_that_are_explained_are_those_that_it_has():
    code = "\n".join(path.read_text() for path in CODE if path.parent.name in ("rewrite", "methods"))
    words = [word for cell in table_below(PAGES["docs/using.md"], "### The words of a report") for word in cell.split(", ")]
    assert len(words) > 10 and not [word for word in words if not word.startswith("`") and word not in code]


TEXTS = {str(path.relative_to(ROOT)): path for path in (*CODE, *sorted((ROOT / "sp_fx").rglob("*.md")), *PAGES.values())}


@pytest.mark.parametrize("name", TEXTS)
def test_names_in_backticks_exist(name):
    """`facts.varying`, `Rules.paper(...)`, `facts.py`, `sp_fx.load`: what is written as a name of a module or a class occurs in
    its file. Where several files have one stem, in one of them; a variable such as `program` in `program.graph` is read as the
    module of its name."""
    for dotted in re.findall(r"`((?:\w+\.)+\w+)[`(]", TEXTS[name].read_text()):
        first, last = dotted.split(".")[-2:]
        if last == "py":
            assert first in STEMS or list(ROOT.glob(f"[!.]*/{first}.py")), f"{name}: no file is called {dotted}"
        elif last in ("csv", "json", "html", "npz", "onnx"):  # files that commands write
            pass
        elif dotted.startswith("sp_fx."):
            value = sp_fx
            for part in dotted.split(".")[1:]:
                value = getattr(value, part, None) or importlib.import_module(f"{value.__name__}.{part}")
        elif dotted == f"{first}.{last}" and (first in STEMS or first in CLASSES):
            texts = STEMS.get(first, []) + [CLASSES.get(first, "")]
            assert any(re.search(rf"\b{last}\b", text) for text in texts), f"{name}: {first} has no {last}"
