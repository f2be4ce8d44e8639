"""Hugging Face models by configuration, tiny, weights from a seed: the forward is the model's, every gate is found, maps reach
the embeddings or the pixels."""

import warnings
from collections import Counter

import pytest
import torch

import sp_fx
from helpers import fill, relative
from kinds import PLAIN

transformers = pytest.importorskip("transformers")

TEXT = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
IMAGE = {"image_size": 16, "patch_size": 8, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
         "intermediate_size": 24}  # fmt: skip
t = transformers

# name: model, inputs, the module whose output stands for token ids, gates that the report has
MODELS = {
    "bert": lambda: (t.BertForSequenceClassification(t.BertConfig(**TEXT)), "bert.embeddings.word_embeddings",
                     {"attention": 2, "gelu": 2, "layer_norm": 5}),
    "roberta": lambda: (t.RobertaForSequenceClassification(t.RobertaConfig(**TEXT)), "roberta.embeddings.word_embeddings",
                        {"attention": 2, "gelu": 2, "layer_norm": 5}),
    "distilbert": lambda: (t.DistilBertForSequenceClassification(t.DistilBertConfig(
        vocab_size=40, dim=16, n_layers=2, n_heads=2, hidden_dim=24)), "distilbert.embeddings.word_embeddings",
        {"attention": 2, "gelu": 2, "layer_norm": 5, "relu": 1}),
    "llama": lambda: (t.LlamaForSequenceClassification(t.LlamaConfig(**TEXT, num_key_value_heads=1, pad_token_id=0)),
                      "model.embed_tokens", {"attention": 2, "silu": 2, "rms_norm": 5}),
    "t5": lambda: (t.T5EncoderModel(t.T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2)),
                   "encoder.embed_tokens", {"attention": 2, "relu": 2, "rms_norm": 5}),
    "clip text": lambda: (t.CLIPTextModelWithProjection(t.CLIPTextConfig(**TEXT, projection_dim=8, eos_token_id=39)),
                          "text_model.embeddings.token_embedding", {"attention": 2, "quick_gelu": 2, "layer_norm": 5}),
    "clip image": lambda: (t.CLIPVisionModelWithProjection(t.CLIPVisionConfig(**IMAGE, projection_dim=8)), None,
                           {"attention": 2, "quick_gelu": 2, "layer_norm": 6}),
    "vit": lambda: (t.ViTForImageClassification(t.ViTConfig(**IMAGE)), None, {"attention": 2, "gelu": 2, "layer_norm": 5}),
    "deit": lambda: (t.DeiTForImageClassification(t.DeiTConfig(**IMAGE)), None, {"attention": 2, "gelu": 2, "layer_norm": 5}),
    "swin": lambda: (t.SwinForImageClassification(t.SwinConfig(image_size=32, patch_size=4, embed_dim=8, depths=[2, 2],
                     num_heads=[1, 2], window_size=4)), None, {"attention": 4, "gelu": 4, "layer_norm": 11}),
    "convnextv2": lambda: (t.ConvNextV2ForImageClassification(t.ConvNextV2Config(
        hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, image_size=32)), None, {"gelu": 2, "layer_norm": 5, "normalize": 2}),
    "segformer": lambda: (t.SegformerForImageClassification(t.SegformerConfig(
        num_encoder_blocks=2, depths=[1, 1], sr_ratios=[2, 1], hidden_sizes=[8, 16], patch_sizes=[7, 3], strides=[4, 2],
        num_attention_heads=[1, 2], mlp_ratios=[2, 2])), None,
        {"attention": 2, "gelu": 2, "layer_norm": 9}),
    "wav2vec2": lambda: (t.Wav2Vec2ForSequenceClassification(t.Wav2Vec2Config(
        **{**TEXT, "hidden_size": 16}, conv_dim=(8, 8), conv_stride=(5, 2), conv_kernel=(10, 3), num_feat_extract_layers=2,
        num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2, classifier_proj_size=8)), None,
        {"attention": 2, "gelu": 5, "layer_norm": 6, "group_norm": 1}),
}  # fmt: skip


def inputs_of(name, model, batch):
    g = torch.Generator().manual_seed(batch)
    if name == "wav2vec2":
        return {"input_values": torch.randn(batch, 400, generator=g)}
    if hasattr(model.config, "image_size") or name == "segformer":
        side = getattr(model.config, "image_size", 32) if name != "segformer" else 32
        return {"pixel_values": torch.randn(batch, 3, side, side, generator=g)}
    ids = torch.randint(1, 39, (batch, 6), generator=g)
    ids[:, -1] = 39
    mask = torch.ones_like(ids)
    if name != "llama":
        mask[-1, 2:4] = 0
    return {"input_ids": ids, "attention_mask": mask}


ALIKE = {"roberta", "distilbert", "deit"}  # BERT's and ViT's layers once more: in the slow form


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in ALIKE else n for n in MODELS])
def test_transform_and_pullback(name):
    model, embedding, gates = MODELS[name]()
    model = fill(model)
    explainer = sp_fx.transform(model, example_inputs=inputs_of(name, model, 1))
    report = explainer.report()
    assert Counter(site.kind for site in report.of("rewritten")) == gates and not report.of("NOT REWRITTEN")
    inputs = inputs_of(name, model, 3)
    with torch.no_grad():
        found, expected = explainer(**inputs), model(**inputs)
    assert type(found) is type(expected)
    for key, value in expected.items():
        assert not isinstance(value, torch.Tensor) or torch.equal(found[key], value), key  # a cache is left out
    target = (lambda out: out[0][..., 1]) if "logits" not in expected else 1
    if embedding is None:
        (map,) = explainer.pullback(inputs, target).values()
        assert map.shape == next(iter(inputs.values())).shape
    else:
        map = explainer.pullback(inputs, target, wrt=embedding)
        assert map.shape == (3, 6, 16)
        with pytest.raises(TypeError, match=r"nothing to explain.*wrt="):
            explainer.pullback(inputs, target)
    assert map.isfinite().all() and (map.flatten(1).norm(dim=1) > 0).all()


def test_masked_tokens_and_ascent():
    model = fill(MODELS["bert"]()[0])
    inputs = inputs_of("bert", model, 2)
    explainer = sp_fx.transform(model, example_inputs=inputs)
    embedding = "bert.embeddings.word_embeddings"
    found = explainer.pullback(inputs, 1, wrt=embedding)
    assert not found[1, 2:4].norm() > 0 and found[1, 4:].norm() > 0
    delta, path = explainer.ascend(inputs, 0, steps=2, step_size=1.0, return_path=True, wrt=embedding)
    assert path.shape == (3, 2, 6, 16) and torch.equal(delta, path[-1] - path[0])
    assert torch.equal(path[0], model.bert.embeddings.word_embeddings(inputs["input_ids"]))
    mask = {"attention_mask": inputs["attention_mask"]}
    assert torch.equal(explainer.pullback(inputs["input_ids"], 1, forward_kwargs=mask, wrt=embedding), found)


def test_wav2vec_with_the_mask_of_its_processor():
    """The model writes over the output of a linear layer where the mask is 0."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24, "num_labels": 3,
             "conv_dim": (8, 8), "conv_stride": (5, 2), "conv_kernel": (10, 3), "num_feat_extract_layers": 2, "vocab_size": 8,
             "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "classifier_proj_size": 8}  # fmt: skip
    config = transformers.Wav2Vec2Config(**sizes, feat_extract_norm="layer", do_stable_layer_norm=True)
    model = fill(transformers.Wav2Vec2ForSequenceClassification(config)).double()
    mask = torch.ones(2, 200, dtype=torch.long)
    mask[1, 150:] = 0
    waves = torch.randn(2, 200, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    x = {"input_values": waves, "attention_mask": mask}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        explainer, plain = (sp_fx.transform(model, example_inputs=x, rules=r) for r in (None, sp_fx.Rules(**PLAIN)))
    with torch.no_grad():
        assert relative(explainer(**x).logits, model(**x).logits) <= 1e-5
    wave = x["input_values"].clone().requires_grad_()
    (expected,) = torch.autograd.grad(model(wave, attention_mask=mask).logits[:, 1].sum(), wave)
    assert relative(plain.pullback(x, 1)["input_values"], expected) <= 1e-6
    assert explainer.pullback(x, 1)["input_values"].isfinite().all()
