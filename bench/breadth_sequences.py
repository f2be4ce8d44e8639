"""Models of tables, sound, graphs, series and text by other libraries, and PyTorch's layers: a part of `breadth_libraries.py`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from breadth_parts import Part, ids, noise
from torch import Tensor, nn

T = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
     "max_position_embeddings": 64}  # fmt: skip
WORDS = Callable[[], tuple]

# -- tables --------------------------------------------------------------------------------------------------------------------


def tabnet(mask: str) -> tuple:
    from pytorch_tabnet.tab_network import TabNet

    model = TabNet(8, 3, n_d=4, n_a=4, n_steps=2, mask_type=mask, group_attention_matrix=torch.eye(8), virtual_batch_size=4)
    return model.eval(), (noise(4, 8),)


def lucid(name: str) -> tuple:
    import tab_transformer_pytorch

    model = getattr(tab_transformer_pytorch, name)(
        categories=(5, 6), num_continuous=4, dim=16, dim_out=1, depth=2, heads=2, dim_head=8
    )
    return model.eval(), (ids(3, 2, high=5), noise(3, 4))


def rtdl_revisited() -> tuple:
    from rtdl_revisiting_models import FTTransformer

    options = {**FTTransformer.get_default_kwargs(n_blocks=2), "d_block": 32, "attention_n_heads": 4}
    return FTTransformer(n_cont_features=6, cat_cardinalities=[], d_out=2, **options).eval(), (noise(3, 6), None)


def rtdl_old() -> tuple:
    import rtdl

    model = rtdl.FTTransformer.make_default(
        n_num_features=6, cat_cardinalities=None, n_blocks=2, last_layer_query_idx=[-1], d_out=2
    )
    return model.eval(), (noise(3, 6), None)


def deepctr(name: str, columns: int = 2) -> tuple:
    from deepctr_torch import models
    from deepctr_torch.inputs import DenseFeat, SparseFeat

    features = [*(SparseFeat(f"s{i}", 10, embedding_dim=4) for i in range(3)), DenseFeat("d", 2)]
    model = getattr(models, name)(*[features] * columns, task="binary")
    return model.eval(), (torch.cat([ids(3, 3, high=9).float(), noise(3, 2)], 1),)


TABLES: dict[str, WORDS] = {
    "tabnet-sparsemax": functools.partial(tabnet, "sparsemax"),
    "tabnet-entmax": functools.partial(tabnet, "entmax"),
    "TabTransformer": functools.partial(lucid, "TabTransformer"),
    "FTTransformer-lucid": functools.partial(lucid, "FTTransformer"),
    "rtdl-FTTransformer": rtdl_revisited,
    "rtdl-old-FTT": rtdl_old,
    **{f"deepctr-{name}": functools.partial(deepctr, name) for name in ("DeepFM", "DCN", "AutoInt", "xDeepFM", "FiBiNET")},
}

# -- graphs --------------------------------------------------------------------------------------------------------------------


def graph_net(name: str, pooled: bool = False, **options: Any) -> tuple:
    from torch_geometric.nn import global_mean_pool, models

    model = getattr(models, name)(6, 8, num_layers=2, out_channels=3, **options).eval()
    inputs = (noise(7, 6), ids(2, 12, high=7) - 3 + ids(2, 12, high=6, seed=1) - 3)
    if not pooled:
        return model, inputs, {"batch": False}
    mean = Part(model, lambda m, x, edges, batch: global_mean_pool(m(x, edges), batch))
    return mean, (*inputs, torch.tensor([0, 0, 0, 1, 1, 1, 1])), {"batch": False}


GRAPHS: dict[str, WORDS] = {
    **{f"pyg-{name}": functools.partial(graph_net, name) for name in ("GCN", "GAT", "GraphSAGE", "GIN", "EdgeCNN")},
    "pyg-GATv2": functools.partial(graph_net, "GAT", v2=True),
    "pyg-GCN-pooled": functools.partial(graph_net, "GCN", pooled=True),
}

# -- text ----------------------------------------------------------------------------------------------------------------------


def x_transformer(kind: str, **options: Any) -> tuple:
    import x_transformers as library

    layers = getattr(library, kind)(dim=32, depth=2, heads=4, attn_dim_head=8, **options)
    return library.TransformerWrapper(num_tokens=64, max_seq_len=32, attn_layers=layers).eval(), (ids(2, 9),)


def x_vit() -> tuple:
    from x_transformers import Encoder, ViTransformerWrapper

    layers = Encoder(dim=32, depth=2, heads=4, attn_dim_head=8)
    return ViTransformerWrapper(image_size=32, patch_size=8, num_classes=5, attn_layers=layers).eval(), (noise(2, 3, 32, 32),)


def x_continuous() -> tuple:
    from x_transformers import ContinuousTransformerWrapper, Decoder

    layers = Decoder(dim=32, depth=2, heads=4, attn_dim_head=8)
    return ContinuousTransformerWrapper(dim_in=6, dim_out=4, max_seq_len=32, attn_layers=layers).eval(), (noise(2, 9, 6),)


def text() -> dict[str, Tensor]:
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, -2:] = 0
    return {"input_ids": ids(2, 9), "attention_mask": mask}


def adapted(name: str, adapter: str, **options: Any) -> tuple:
    import peft
    import transformers

    if name == "vit":
        base = transformers.ViTForImageClassification(transformers.ViTConfig(
            image_size=32, patch_size=8, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
            intermediate_size=48))  # fmt: skip
        inputs: dict[str, Tensor] = {"pixel_values": noise(2, 3, 32, 32)}
    elif name == "llama":
        base, inputs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**T, pad_token_id=0)), text()
    else:
        base, inputs = transformers.BertForSequenceClassification(transformers.BertConfig(**T)), text()
    return peft.get_peft_model(base, getattr(peft, adapter)(**options)).eval(), inputs


def sentence_transformer() -> tuple:
    import tempfile
    from pathlib import Path

    import sentence_transformers
    import transformers
    from sentence_transformers import models

    with tempfile.TemporaryDirectory() as folder:
        words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(59))]
        Path(folder, "vocab.txt").write_text("\n".join(words))
        transformers.BertTokenizer(str(Path(folder, "vocab.txt"))).save_pretrained(folder)
        transformers.BertModel(transformers.BertConfig(**T)).save_pretrained(folder)
        modules = [models.Transformer(folder), models.Pooling(32), models.Normalize()]
        return sentence_transformers.SentenceTransformer(modules=modules, device="cpu").eval(), (text(),)


def protein(name: str) -> tuple:
    import argparse

    import esm

    if name == "ESM2":
        model, tokens = esm.ESM2(2, 32, 4), ids(2, 9, high=24)
        return model.eval(), (tokens,)
    alphabet = esm.data.Alphabet.from_architecture("msa_transformer" if name == "MSATransformer" else "ESM-1b")
    args = argparse.Namespace(
        layers=2, num_layers=2, embed_dim=32, ffn_embed_dim=48, attention_heads=4, max_positions=64, max_tokens=2**14,
        dropout=0.0,
        attention_dropout=0.0, activation_dropout=0.0, emb_layer_norm_before=True, token_dropout=True, logit_bias=True,
        arch="roberta_large", embed_positions_msa=True)  # fmt: skip
    model = getattr(esm, name)(args, alphabet)
    return model.eval(), (ids(*((1, 3, 9) if name == "MSATransformer" else (2, 9)), high=24),)


TEXT: dict[str, WORDS] = {
    "xtrans-enc": functools.partial(x_transformer, "Encoder"),
    "xtrans-dec": functools.partial(x_transformer, "Decoder"),
    "xtrans-dec-rotary-rms-swiglu": functools.partial(x_transformer, "Decoder", rotary_pos_emb=True, use_rmsnorm=True,
        ff_glu=True,
                                                      ff_swish=True),
    "xtrans-dec-alibi-flash": functools.partial(x_transformer, "Decoder", alibi_pos_bias=True, attn_flash=True),
    "xtrans-enc-talking": functools.partial(x_transformer, "Encoder", attn_pre_talking_heads=True, attn_post_talking_heads=True),
    "xtrans-enc-relu2": functools.partial(x_transformer, "Encoder", ff_relu_squared=True),
    "xtrans-enc-scalenorm": functools.partial(x_transformer, "Encoder", use_scalenorm=True),
    "xtrans-enc-qknorm": functools.partial(x_transformer, "Encoder", attn_qk_norm=True),
    "xtrans-vit": x_vit,
    "xtrans-continuous": x_continuous,
    "fair-esm2": functools.partial(protein, "ESM2"),
    "fair-esm1b": functools.partial(protein, "ProteinBertModel"),
    "fair-msa": functools.partial(protein, "MSATransformer"),
    "peft-lora-bert": functools.partial(adapted, "bert", "LoraConfig", r=2, target_modules=["query", "value"]),
    "peft-lora-llama": functools.partial(adapted, "llama", "LoraConfig", r=2, target_modules=["q_proj", "v_proj"]),
    "peft-lora-vit": functools.partial(adapted, "vit", "LoraConfig", r=2, target_modules="all-linear"),
    "peft-ia3-bert": functools.partial(adapted, "bert", "IA3Config", target_modules=["key", "value", "output.dense"],
                                       feedforward_modules=["output.dense"]),
    "peft-prompt-bert": functools.partial(adapted, "bert", "PromptTuningConfig", task_type="SEQ_CLS", num_virtual_tokens=3),
    "sentence-transformer": sentence_transformer,
}  # fmt: skip

# -- series and sound ----------------------------------------------------------------------------------------------------------


def chronos_bolt() -> tuple:
    import transformers
    from chronos.chronos_bolt import ChronosBoltModelForForecasting

    config = transformers.T5Config(vocab_size=2, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0)
    config.chronos_config = {"context_length": 32, "prediction_length": 8, "input_patch_size": 4, "input_patch_stride": 4,
                             "quantiles": [0.1, 0.5, 0.9], "use_reg_token": True}  # fmt: skip
    return ChronosBoltModelForForecasting(config).eval(), {"context": noise(2, 32)}


def chronos_two() -> tuple:
    from chronos.chronos2.config import Chronos2CoreConfig
    from chronos.chronos2.model import Chronos2Model

    own = {"context_length": 32, "output_patch_size": 4, "input_patch_size": 4, "input_patch_stride": 4, "quantiles": [0.1, 0.5,
        0.9],
           "use_reg_token": True, "use_arcsinh": True, "time_encoding_scale": 32}  # fmt: skip
    config = Chronos2CoreConfig(d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, chronos_config=own)
    return Chronos2Model(config).eval(), {"context": noise(2, 32)}


def mambapy(scan: bool) -> tuple:
    from mambapy.mamba import Mamba, MambaConfig

    return Mamba(MambaConfig(d_model=16, n_layers=2, d_state=4, pscan=scan)).eval(), (noise(2, 8, 16),)


class Causal(nn.Module):
    """A causal convolution with an activation and a residual."""

    def __init__(
        self, width: int, dilation: int, activation: Callable[[Tensor], Tensor], norm: bool = False, gated: bool = False
    ):
        super().__init__()
        self.conv, self.pad = nn.Conv1d(width, width * (1 + gated), 3, dilation=dilation), 2 * dilation
        self.activation, self.norm, self.gated = activation, nn.LayerNorm(width) if norm else None, gated

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(F.pad(x, (self.pad, 0)))
        y = F.glu(y, 1) if self.gated else self.activation(y)
        y = x + y
        return y if self.norm is None else self.norm(y.transpose(1, 2)).transpose(1, 2)


def tcn(activation: Callable[[Tensor], Tensor], **options: Any) -> tuple:
    blocks = [Causal(8, 2**i, activation, **options) for i in range(4)]
    return nn.Sequential(nn.Conv1d(3, 8, 1), *blocks, nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(8, 4)).eval(), (
        noise(2, 3, 32),
    )


def m5() -> tuple:
    layers: list[nn.Module] = []
    for a, b, k, s in ((1, 8, 20, 8), (8, 8, 3, 1), (8, 16, 3, 1)):
        layers += [nn.Conv1d(a, b, k, s), nn.BatchNorm1d(b), nn.ReLU(), nn.MaxPool1d(4)]
    head = (nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(16, 5), nn.LogSoftmax(1))
    return nn.Sequential(*layers, *head).eval(), (noise(2, 1, 2000),)


class MelCNN(nn.Module):
    """A spectrogram by a short-time Fourier transform, and a convolutional network on its logarithm."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("window", torch.hann_window(64))
        self.net = nn.Sequential(
            nn.Conv2d(1, 8, 3, 2), nn.ReLU(), nn.Conv2d(8, 8, 3, 2), nn.ReLU(), nn.Flatten(), nn.LazyLinear(4)
        )

    def forward(self, x: Tensor) -> Tensor:
        power = torch.stft(x, 64, 32, window=self.window, return_complex=True).abs().pow(2)  # type: ignore[arg-type]
        return self.net(torch.log(power[:, None] + 1e-6))


def mel_cnn() -> tuple:
    model, x = MelCNN().eval(), noise(2, 512)
    model(x)
    return model, (x,)


class CRNN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.rnn, self.head = nn.Conv1d(3, 8, 3, 2), nn.GRU(8, 8, batch_first=True), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = F.max_pool1d(F.relu(self.conv(x)), 2).transpose(1, 2)
        return self.head(self.rnn(h)[0][:, -1])


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True)
        self.encoder, self.head = nn.TransformerEncoder(layer, 2), nn.Linear(16, 4)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.head(self.encoder(x, src_key_padding_mask=mask).mean(1))


def torch_transformer() -> tuple:
    model = nn.Transformer(16, 2, 2, 2, 24, batch_first=True)
    return model.eval(), (noise(2, 7, 16), noise(2, 5, 16, seed=1))


SERIES: dict[str, WORDS] = {
    "chronos-bolt": chronos_bolt,
    "chronos-2": chronos_two,
    "mambapy-pscan": functools.partial(mambapy, True),
    "mambapy-loop": functools.partial(mambapy, False),
    "tcn-relu": functools.partial(tcn, F.relu),
    "tcn-gelu-layernorm": functools.partial(tcn, F.gelu, norm=True),
    "tcn-gated": functools.partial(tcn, F.relu, gated=True),
    "audio-M5": m5,
    "audio-MelCNN": mel_cnn,
    "audio-CRNN": lambda: (CRNN().eval(), (noise(2, 3, 32),)),
    "nn-TransformerEncoder-pad": lambda: (Encoder().eval(), (noise(2, 7, 16), torch.arange(7)[None] >= torch.tensor([[7], [5]]))),
    "nn-Transformer": torch_transformer,
    "nn-LSTM": lambda: (nn.LSTM(6, 8, 2, batch_first=True).eval(), (noise(2, 7, 6),)),
}

# -- diffusion -----------------------------------------------------------------------------------------------------------------


def diffusion(name: str, *more: Tensor, channels: int = 3, side: int = 16, **options: Any) -> tuple:
    import diffusers

    return getattr(diffusers, name)(**options).eval(), (noise(2, channels, side, side), *more)


def dit() -> tuple:
    model, (x,) = diffusion("DiTTransformer2DModel", channels=4, side=8, num_attention_heads=4, attention_head_dim=8,
    in_channels=4,
                            num_layers=2, sample_size=8, patch_size=2, num_embeds_ada_norm=10)  # fmt: skip
    return model, {"hidden_states": x, "timestep": torch.tensor([3, 7]), "class_labels": torch.tensor([1, 2])}


UNET = {"sample_size": 16, "block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 8, "attention_head_dim": 8,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}  # fmt: skip
DIFFUSION: dict[str, WORDS] = {
    "diffusers-unet": lambda: diffusion("UNet2DModel", torch.tensor([3, 7]), **UNET),
    "diffusers-vae": lambda: diffusion("AutoencoderKL", block_out_channels=(8, 16), down_block_types=("DownEncoderBlock2D",) * 2,
                                       up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=8, latent_channels=2),
    "diffusers-dit": dit,
}  # fmt: skip

PARTS = (TABLES, GRAPHS, TEXT, SERIES, DIFFUSION)
SEQUENCES = {name: build for part in PARTS for name, build in part.items()}
