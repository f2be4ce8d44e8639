"""Token removal on networks whose shares are known: a sum over words, and a product of two."""

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from sp_fx.models import TextModel

BENCH = Path(__file__).parents[1] / "bench"
if not BENCH.exists():
    pytest.skip("the benches are not beside these tests", allow_module_level=True)
sys.path.insert(0, str(BENCH))

import fidelity  # noqa: E402
import text_fidelity as text  # noqa: E402
from sentences import SENTENCES, TOPICS  # noqa: E402

WORDS = ["<pad>", "<s>", "</s>", *"alpha beta gamma delta epsilon zeta eta theta iota kappa".split()]


class SumOfWords(nn.Module):
    """[B, 2]: each word adds its own two numbers, through a gate that is open."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(len(WORDS), 2)
        with torch.no_grad():
            self.words.weight.copy_(torch.arange(2.0 * len(WORDS)).view(-1, 2) - 6)
            self.words.weight[:, 1] = self.words.weight[:, 1].flip(0)

    def forward(self, input_ids, attention_mask=None):
        seen = self.words(input_ids)
        if attention_mask is not None:
            seen = seen * attention_mask[..., None]
        return torch.relu(seen.sum(1) + 1e4) - 1e4


def tokenized(sentences, padding=True, truncation=True, return_tensors="pt"):
    rows = [[1, *(WORDS.index(word) for word in s.split()), 2] for s in sentences]
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    return {"input_ids": ids, "attention_mask": torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])}


def network():
    return TextModel("sums", SumOfWords().eval(), tokenized)


LINES = ["alpha beta gamma delta epsilon", "kappa iota theta eta zeta alpha beta", "zeta zeta alpha", "beta kappa gamma eta"] * 3


@pytest.fixture
def case(tmp_path):
    path = tmp_path / "lines.txt"
    path.write_text("\n".join(LINES))
    return text.text_case(network(), path, None)


def test_a_case_explains_the_predicted_class(case):
    assert case.embedding == "words" and case.ids.shape == (12, 9)
    y = case.model(case.ids, case.mask)
    assert torch.equal(case.aim.argmax(1), y.argmax(1)) and case.aim.sum(1).tolist() == [1] * 12
    assert case.removable[0].tolist() == [False, True, True, True, True, True, False, False, False]
    assert case.removable[2].sum() == 3


def test_exact_shares_answer_every_question(case):
    """A word's share is what it adds, so drops are sums of shares, and the fifth that is removed is the best there is."""
    chosen = text.text_methods(case)
    results, controls = text.measured_texts(case, chosen, lambda name, f, *a: f(*a))
    values = case.model.words.weight.detach()[case.ids] * case.aim[:, None]
    added = values.sum(2).masked_fill(~case.removable, -torch.inf)
    for name in ("pullback", "gradient x input", "IG-50"):
        assert torch.allclose(chosen[name][0](case, slice(0, 12)).double(), values.sum(2).double() * case.mask, atol=1e-3), name
        found = results[name]
        assert found["infidelity, tokens"].max() < 1e-6 and found["correlation, tokens"].min() > 0.999
        assert torch.allclose(found["deletion of a fifth"], added.amax(1).double(), atol=1e-2)  # one word of 3 to 7
        assert bool((found["deletion of a fifth"] >= results["random"]["deletion of a fifth"] - 1e-3).all())
    assert controls["equal shares"]["infidelity, tokens"].min() > 0.1


def test_padding_on_the_left_keeps_its_marks(case):
    left = dataclasses.replace(case, ids=case.ids.roll(2, 1), mask=torch.tensor([[0, 0, 1, 1, 1, 1, 1, 0, 0]] * 12).roll(2, 1))
    assert left.removable[0].tolist() == [False] * 5 + [True] * 3 + [False]


def test_of_equal_shares_it_takes_by_chance():
    removable = torch.ones(1, 10, dtype=torch.bool)
    taken = text.top(torch.zeros(1, 10), removable, 0.3)[0]
    assert taken.sum() == 3 and taken.tolist() != [True] * 3 + [False] * 7
    assert text.top(torch.zeros(1, 10), removable, 0.25).sum() == 3  # 2.5 is rounded up


def test_the_fifth_that_is_removed():
    shares = torch.tensor([[9.0, 1, 5, 3, 8, 2, 7]])
    removable = torch.tensor([[False, True, True, True, True, True, False]])
    assert text.top(shares, removable, 0.2)[0].tolist() == [False, False, False, False, True, False, False]
    assert text.top(shares, removable, 0.4)[0].tolist() == [False, False, True, False, True, False, False]
    assert text.top(shares, removable, 0.01).sum() == 1  # at least one
    subsets = text.random_subsets(removable, 50, 0)
    assert subsets.shape == (1, 50, 7) and bool((subsets.sum(2) == 1).all()) and not bool((subsets & ~removable).any())
    assert bool((subsets[0].sum(0)[removable[0]] > 2).all())


def test_gradients_are_of_the_embeddings(case):
    part = slice(0, 3)
    assert torch.allclose(text.slopes(case, part), (case.aim[part, None] * case.mask[part, :, None]).float())


def test_the_command(tmp_path, monkeypatch, capsys):
    (tmp_path / "sums_of_words.py").write_text("from test_bench_text import network\n")
    (tmp_path / "lines.txt").write_text("\n".join(f"{a}\t{b}" for a, b in zip(LINES[::-1], LINES)))
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    options = [
        "--model",
        "sums_of_words:network",
        "--texts",
        "lines.txt",
        "--out",
        "out",
        "--methods",
        "pullback",
        "gradient x input",
    ]
    records = []
    for work in "ab":
        assert fidelity.main([*options, "--work", work]) == 0
        records.append((tmp_path / "out" / "fidelity_sums_of_words_network_lines.json").read_text())
    assert records[0] == records[1] and "| pullback | 1 |" in capsys.readouterr().out
    record = json.loads(records[0])
    assert (
        set(record["methods"]) == {"pullback", "gradient x input", "random"} and record["samples"] == "12 sentences of lines.txt"
    )
    assert "deletion of a fifth" in record["methods"]["random"]
    (tmp_path / "lines.txt").write_text("alpha beta gamma\tbeta alpha gamma\nalpha beta gamma\n")
    assert fidelity.main([*options, "--work", "c"]) == 2
    assert "a query, a tab and a sentence" in capsys.readouterr().err
    (tmp_path / "lines.txt").write_text("alpha beta gamma\n" * 9)
    assert fidelity.main([*options, "--work", "c"]) == 2 and "at least 10" in capsys.readouterr().err
    torch.set_num_threads(threads)


def test_two_hundred_sentences():
    assert len(SENTENCES) == 200 == len(set(SENTENCES)) and len(TOPICS) == 20 and {len(s) for s in TOPICS.values()} == {10}
