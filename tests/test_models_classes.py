"""Names of classes in files, as people have them, and targets in words."""

import json

import pytest

from sp_fx.figures.records import parse_targets
from sp_fx.models.classes import class_index, read_class_names

CONTENTS = {
    "lines": (b"cat\ndog\nfish\n", "txt"),
    "a mark and Windows' line ends": (b"\xef\xbb\xbfcat\r\ndog\r\nfish\r\n", "txt"),
    "no line end, blank lines last": (b"cat\ndog\nfish\n\n  \n", "txt"),
    "spaces about": (b"  cat \n\tdog\nfish", "names"),
    "a list": (b'["cat", "dog", "fish"]', "json"),
    "by number, in any order": (b'{"10": "eel", "2": "fish", "0": "cat", "1": "dog"}', "json"),
    "by name": (b'{"dog": 1, "cat": 0, "fish": 2}', "json"),
    "by name, a mark": (b'\xef\xbb\xbf{"dog": 1, "cat": 0, "fish": 2}', "JSON"),
    "Keras'": (b'{"0": ["n01", "cat"], "1": ["n02", "dog"], "2": ["n03", "fish"]}', "json"),
}


@pytest.mark.parametrize("case", CONTENTS)
def test_names_in_a_file(tmp_path, case):
    content, ending = CONTENTS[case]
    path = tmp_path / f"names.{ending}"
    if case == "by number, in any order":
        content = json.dumps({str(i): name for i, name in [(10, "eel"), *enumerate("abcdefghij")]}).encode()
        path.write_bytes(content)
        assert read_class_names(path) == (*"abcdefghij", "eel")
    else:
        path.write_bytes(content)
        assert read_class_names(str(path)) == ("cat", "dog", "fish")


def test_digits_as_names(tmp_path):
    (tmp_path / "folders.json").write_text('{"10": 1, "7": 0, "9": 2}')  # class_to_idx of folders called 10, 7 and 9
    assert read_class_names(tmp_path / "folders.json") == ("7", "10", "9")
    (tmp_path / "lines").write_text("3\n7\n1")
    labels = read_class_names(tmp_path / "lines")
    assert labels == ("3", "7", "1")
    assert parse_targets(["7", "3,1"], labels) == [("index", 1), ("index", 0), ("index", 2)]
    assert parse_targets(["0", "2"], labels) == [("index", 0), ("index", 2)]  # no name: a number
    assert parse_targets(["-1"], ("a", "-1")) == [("index", 1)]


WRONG = {
    "nothing": (b"", "txt", "has no class names in it"),
    "blank lines alone": (b"\n\n \n", "txt", "has no class names in it"),
    "a hole": (b"cat\n\nfish\n", "txt", "has no name for class 1: a file of class names has one a line"),
    "UTF-16": ("cat\ndog".encode("utf-16"), "txt", "are no UTF-8 text"),
    "no JSON": (b"cat\ndog", "json", "cannot be read: Expecting value"),
    "a number": (b"3", "json", "expected a list of names, or a mapping"),
    "an empty list": (b"[]", "json", "has no class names in it"),
    "an empty mapping": (b"{}", "json", "has no class names in it"),
    "numbers alone": (b"[1, 2]", "json", "expected a list of names"),
    "one missing": (b'{"0": "cat", "2": "dog"}', "json", "the numbers of 2 classes are 0 to 1, each once"),
    "from one on": (b'{"1": "cat", "2": "dog"}', "json", "the numbers of 2 classes are 0 to 1, each once"),
    "one twice": (b'{"cat": 0, "dog": 0}', "json", "the numbers of 2 classes are 0 to 1, each once"),
    "neither": (b'{"cat": "dog"}', "json", "a mapping is from numbers to names"),
}


@pytest.mark.parametrize("case", WRONG)
def test_files_that_are_none(tmp_path, case):
    content, ending, message = WRONG[case]
    (tmp_path / f"names.{ending}").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_class_names(tmp_path / f"names.{ending}")


def test_no_file(tmp_path):
    for path in (tmp_path / "gone.txt", tmp_path):
        with pytest.raises(FileNotFoundError, match="no file of class names at"):
            read_class_names(path)


LABELS = ("tench, Tinca tinca", "red,ripe", "red", "cock", "Cock, rooster")


@pytest.mark.parametrize("text, found", [
    ("tench, Tinca tinca", [0]),
    ("tench,tinca TINCA", [0]),  # however it is written
    ("tench, Tinca tinca,red", [0, 2]),
    ("red,ripe", [1]),  # the longest label that fits
    ("red,3,Red, Ripe", [2, 3, 1]),
    ("red, red,ripe , 4", [2, 1, 4]),
    ("rooster,cock", [4, 3]),
])  # fmt: skip
def test_commas_within_labels(text, found):
    assert parse_targets([text], LABELS) == [("index", i) for i in found]


def test_targets_that_are_none():
    with pytest.raises(ValueError, match="no class is called ''"):
        parse_targets(["red,"], LABELS)
    for labels in (LABELS, None):
        with pytest.raises(ValueError, match="a class is a number from 0 on, or a name; got -1"):
            parse_targets(["-1"], labels)
    with pytest.raises(ValueError, match="pass a number in place of 'red', or say the names"):
        parse_targets(["red"], None)
    assert parse_targets(["top3,7"], None) == [("top", 3), ("index", 7)] and class_index("top1", ("top1",)) == 0
