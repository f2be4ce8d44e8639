"""`sp-fx text` and `sp-fx compile` of networks for text: of folders as transformers writes them, of functions, of packages."""

import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import sp_fx
from helpers import relative
from sp_fx.cli.commands import main

t = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "good", "bad", "film", "is", "the", "dog"]
BERT = {"vocab_size": 12, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
GPT2 = {"vocab_size": 12, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, "bos_token_id": 2, "eos_token_id": 3}
NETS = {
    "classifier": lambda: t.BertForSequenceClassification(t.BertConfig(**BERT, id2label={0: "bad", 1: "good", 2: "so so"})),
    "language": lambda: t.GPT2LMHeadModel(t.GPT2Config(**GPT2)),
    "masked": lambda: t.BertForMaskedLM(t.BertConfig(**BERT)),
    "encoder": lambda: t.BertModel(t.BertConfig(**BERT)),
    "answers": lambda: t.BertForQuestionAnswering(t.BertConfig(**BERT)),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("texts")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "mask_token": "[MASK]"}
    for name, make in NETS.items():
        torch.manual_seed(0)
        make().save_pretrained(place / name)
        t.PreTrainedTokenizerFast(tokenizer_object=words, **names).save_pretrained(place / name)
    return place


@pytest.fixture
def run(capsys):
    """The command: its status, and what it prints."""

    def run(*arguments):
        status = main([str(a) for a in arguments])
        printed = capsys.readouterr()
        return SimpleNamespace(status=status, out=printed.out, err=printed.err)

    return run


def model(folder, name):
    return f"hf/{folder / name}"


def records(done):
    assert done.status == 0, done.err
    return [json.loads(line) for line in done.out.splitlines()]


def test_a_classifier(run, folder):
    name = model(folder, "classifier")
    first, second = records(run("text", "a good film", "the film is bad", "--model", name, "--target", "good", "--json"))
    net = sp_fx.models.load(name)
    assert net.answers == "classes" and net.labels == ("bad", "good", "so so") and first["answer"] == "good"
    inputs = net.tokens(["a good film"])
    value = net.model(**inputs).softmax(-1)[0, 1]
    assert abs(first["value"] - float(value)) <= 1e-6
    explainer = sp_fx.transform(net.model, example_inputs=inputs)
    shares = explainer.tokens(inputs, 1).shares[0]
    assert [word for word, _ in first["tokens"]] == ["a", "good", "film"] and len(second["tokens"]) == 4
    assert relative(torch.tensor([share for _, share in first["tokens"]]), shares) <= 1e-5


def test_tokens_of_language_models(run, folder):
    (next_one,) = records(run("text", "the dog is a", "--model", model(folder, "language"), "--json"))
    assert next_one["answers"] == "next token" and next_one["answer"] in WORDS
    (masked,) = records(run("text", "the [MASK] is good", "--model", model(folder, "masked"), "--target", "dog", "--json"))
    assert masked["answer"] == "dog" and [w for w, _ in masked["tokens"]] == ["the", "[MASK]", "is", "good"]
    done = run("text", "the dog", "--model", model(folder, "masked"))
    assert done.status == 2 and "0 masked tokens" in done.err
    done = run("text", "the dog", "--model", model(folder, "language"), "--target", "cat")
    assert done.status == 2 and "no single token" in done.err


def test_an_encoder_and_a_page(run, folder, tmp_path):
    name, page = model(folder, "encoder"), tmp_path / "words.html"
    done = run("text", "a <b> dog", "--model", name, "--to", "the dog", "--out", str(page))
    assert done.status == 0 and "similarity to 'the dog'" in done.out and "dog[" in done.out
    assert "similarity to &#x27;the dog&#x27;" in page.read_text() and "background:rgb" in page.read_text()
    done = run("text", "a dog", "--model", name)
    assert done.status == 2 and "--to" in done.err
    done = run("text", "a dog", "--model", model(folder, "classifier"), "--to", "the dog")
    assert done.status == 2 and "leave it out" in done.err


def test_a_sentence_encoder_that_takes_the_first_token(folder, tmp_path):
    """As sentence-transformers writes it: the state of the first token, not the mean."""
    import shutil

    place = tmp_path / "first"
    shutil.copytree(folder / "encoder", place)
    (place / "1_Pooling").mkdir()
    (place / "1_Pooling" / "config.json").write_text('{"pooling_mode_cls_token": true, "pooling_mode_mean_tokens": false}')
    first, mean = sp_fx.models.load(f"hf/{place}"), sp_fx.models.load(model(folder, "encoder"))
    inputs = mean.tokens(["a good film"])
    states = first.model.encoder(**inputs).last_hidden_state
    assert relative(first.model(**inputs), nn.functional.normalize(states[:, 0], dim=-1)) <= 1e-6
    assert relative(mean.model(**inputs), nn.functional.normalize(states.mean(1), dim=-1)) <= 1e-6


def test_other_networks_are_named(run, folder):
    done = run("text", "a dog", "--model", model(folder, "answers"))
    assert done.status == 2 and "transformers has no image classifier" in done.err
    done = run("text", "a dog", "--model", "zoo/residual_cnn")
    assert done.status == 2 and "sp-fx explain" in done.err and "all_minilm_l6_v2" in done.err


@pytest.mark.parametrize("name", ["classifier", "language", "encoder"])
def test_packages(run, folder, tmp_path, name):
    pytest.importorskip("onnxruntime")
    path = tmp_path / "net.onnx"
    done = run("compile", model(folder, name), "--out", str(path))
    assert done.status == 0, done.err
    assert "input_ids [batch, length]" in done.err + done.out
    package, net = sp_fx.load(path), sp_fx.models.load(model(folder, name))
    inputs = net.tokens(["the dog is a good bad film", "a dog is a good bad film"])
    explainer = sp_fx.transform(net.model, example_inputs=inputs)
    aim, target = {
        "classifier": (2, 2),
        "language": (7, sp_fx.targets.token(-1, 7)),
        "encoder": (torch.ones(2, 16), lambda out: out.sum(1)),
    }[name]
    outputs, shares = package(inputs, aim)
    expected = net.model(**inputs).detach()
    assert relative(outputs, expected[:, -1] if name == "language" else expected) <= 1e-5
    assert relative(shares, explainer.tokens(inputs, target).shares) <= 1e-4
    assert package.names == ["input_ids", "attention_mask"] and package.lengths == ["length"]
    with pytest.raises(ValueError, match="one number"):
        package({"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"][:, :3]})
    with pytest.raises(TypeError, match="input_ids, attention_mask; got ids"):
        package({"ids": inputs["input_ids"]})
