"""What the tables of Hugging Face models are made of: tiny configurations, their inputs, and the functions that build models.

A name that ends in `@eager` runs attention written out, one that ends in `+batched_mm` or `+eager` the experts of a mixture so.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

T = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
     "max_position_embeddings": 64}  # fmt: skip
D = {**T, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # of decoders after Llama's
H = {**D, "head_dim": 8}
V = {
    "image_size": 32,
    "patch_size": 8,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}
W = {"vocab_size": 32, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
     "conv_dim": (8, 8), "conv_stride": (5, 2), "conv_kernel": (10, 3), "num_feat_extract_layers": 2,
         "num_conv_pos_embeddings": 4,
     "num_conv_pos_embedding_groups": 2, "classifier_proj_size": 8}  # fmt: skip
SEQ = {"vocab_size": 64, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
       "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 64}  # fmt: skip
T5 = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
GPT2 = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "bos_token_id": 1, "eos_token_id": 2,
        "pad_token_id": 0}  # fmt: skip
XLM = {
    "vocab_size": 64,
    "emb_dim": 32,
    "n_layers": 2,
    "n_heads": 4,
    "max_position_embeddings": 64,
    "pad_index": 0,
    "pad_token_id": 0,
}
MOE = {**H, "num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
DEEP = {**T, "num_key_value_heads": 4, "pad_token_id": 0, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2,
    "topk_group": 1,
        "moe_intermediate_size": 24, "first_k_dense_replace": 1, "kv_lora_rank": 8, "q_lora_rank": 8, "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4, "v_head_dim": 8, "n_shared_experts": 1}  # fmt: skip
BACKBONE = {"out_features": ["stage1", "stage2"]}
DETR = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
        "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "num_queries": 5, "num_labels": 4}  # fmt: skip


def drawn(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def ids(length: int = 9, batch: int = 2, vocab: int = 60, padded: str = "right", **more: Any) -> Callable[[], dict[str, Tensor]]:
    """Token ids, of which the last sample is padded by two."""

    def inputs() -> dict[str, Any]:
        tokens = torch.randint(3, vocab, (batch, length), generator=drawn())
        mask = torch.ones_like(tokens)
        if padded:
            mask[-1, slice(-2, None) if padded == "right" else slice(0, 2)] = 0
        found = {"input_ids": tokens.where(mask > 0, 0), "attention_mask": mask}
        return {k: v for k, v in {**found, **{k: v() for k, v in more.items()}}.items() if v is not None}

    return inputs


def decoded(length: int = 9) -> Callable[[], dict[str, Tensor]]:
    return ids(length, decoder_input_ids=lambda: torch.randint(3, 60, (2, 6), generator=drawn(1)))


def noise(*shape: int, key: str = "pixel_values", **more: Any) -> Callable[[], dict[str, Tensor]]:
    return lambda: {key: torch.randn(shape, generator=drawn()), **{k: v() for k, v in more.items()}}


def nothing() -> None:
    return None


def boxes() -> Tensor:
    corner = torch.randint(0, 30, (2, 9, 2), generator=drawn(2))
    return torch.cat([corner, corner + 8], -1)


PIXELS, WAVE = noise(2, 3, 32, 32), noise(2, 400, key="input_values")
PICTURE, LARGE = lambda: torch.randn(2, 3, 32, 32, generator=drawn()), noise(2, 3, 64, 64)
PLAIN, LEFT = ids(attention_mask=nothing, padded=""), ids(padded="left")
CAPTIONED = ids(pixel_values=PICTURE)


def two(name: str, text: Mapping[str, Any], vision: Mapping[str, Any], **more: Any) -> Callable[[], Any]:
    """A configuration of text and pictures."""

    def config() -> Any:
        import transformers

        return getattr(transformers, name)(text_config=dict(text), vision_config=dict(vision), **more)

    return config


def of(name: str, /, **options: Any) -> Callable[[], Any]:
    """A configuration; those among its options are functions that make them."""

    def config() -> Any:
        import transformers

        found = getattr(transformers, name)(**{k: v() if callable(v) else v for k, v in options.items()})
        return found

    return config


def build(model: str, config: Callable[[], Any], inputs: Callable[[], Any], attention: str = "", experts: str = "") -> tuple:
    import transformers

    made = {"attn_implementation": attention or None, "experts_implementation": experts or None}
    network = getattr(transformers, model)._from_config(config(), **{k: v for k, v in made.items() if v})
    return network.eval(), inputs()


EAGER = ("albert modernbert bert gpt2 gpt-neox opt falcon mistral qwen2 qwen3 gemma2 gemma3 phi3 olmo2 llama t5 bart vit-hf "
         "dinov2 clip").split()  # fmt: skip
MIXTURES = ("mixtral", "qwen3-moe", "deepseek-v3")


def table(*parts: Mapping[str, tuple]) -> dict[str, Callable[[], tuple]]:
    """The constructors of some models, with those of the same written out."""
    found: dict[str, Callable[[], tuple]] = {}
    for name, parts_of in (item for part in parts for item in part.items()):
        found[name] = functools.partial(build, *parts_of)
        if name in EAGER:
            found[f"{name}@eager"] = functools.partial(build, *parts_of, attention="eager")
        if name in MIXTURES:
            for how in ("eager", "batched_mm"):
                found[f"{name}+{how}"] = functools.partial(build, *parts_of, experts=how)
    return found
