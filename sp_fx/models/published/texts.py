"""Networks for text: classifiers, language models and encoders of Hugging Face's hub or of folders, `hf/NAME`."""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from .hub import one_try, quiet

Answers = Literal["embedding", "classes", "next token", "masked token"]


class SentenceEmbedding(nn.Module):
    """A sentence's direction: the mean of its tokens' states, or with `first` the state of its first token, of length 1.

    `forward(input_ids, attention_mask)`, both [B, T], or `inputs_embeds` [B, T, width] in place of the ids, gives [B, width].
    """

    def __init__(self, encoder: nn.Module, first: bool = False) -> None:
        super().__init__()
        self.encoder, self.first = encoder, first

    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, inputs_embeds: Tensor | None = None
    ) -> Tensor:
        states = self.encoder(input_ids=input_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds).last_hidden_state
        if self.first:
            mean = states[:, 0]
        elif attention_mask is None:
            mean = states.mean(1)
        else:
            weights = attention_mask[..., None].to(states.dtype)
            mean = (states * weights).sum(1) / weights.sum(1)
        return nn.functional.normalize(mean, dim=-1)


class TokenLogits(nn.Module):
    """A network of transformers as a module from `input_ids` and `attention_mask`, both [B, T], to its logits: [B, classes] of a
    classifier, [B, T, vocabulary] of a language model."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.net(input_ids=input_ids, attention_mask=attention_mask, return_dict=True).logits


class NextToken(nn.Module):
    """The logits of the token after a text [B, vocabulary], of a language model of `input_ids` and `attention_mask`: those at its
    last token, whether texts are padded in front or behind."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        places = torch.arange(1, attention_mask.shape[1] + 1, device=attention_mask.device)
        reached = places * attention_mask
        last = (reached == reached.amax(1, True)).to(attention_mask.dtype) * attention_mask
        logits = self.net(input_ids, attention_mask)
        return (logits * last[..., None].to(logits.dtype)).sum(1)


@dataclass(frozen=True)
class TextModel:
    """A network for text: `model` takes what `tokenizer` makes of a list of sentences, `model(**tokenizer(sentences,
    padding=True, return_tensors="pt"))`, less the `token_type_ids`.

    Attributes:
        tokenizer: called so it returns `input_ids` and `attention_mask`; `convert_ids_to_tokens(ids)` makes words of ids. A
            language model's has `decode(ids)` too, and `mask_token_id` where a masked token is asked for.
        answers: what it gives for each text: an "embedding" [B, width], scores of "classes" [B, classes], or logits of tokens
            [B, T, vocabulary], for the "next token" or a "masked token".
        labels: the names of the classes, where they are known.
    """

    name: str
    model: nn.Module
    tokenizer: Any
    answers: Answers = "embedding"
    labels: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if self.answers not in (kinds := get_args(Answers)):
            raise ValueError(f"answers is one of {', '.join(map(repr, kinds))}; got {self.answers!r}")

    def tokens(self, sentences: list[str]) -> dict[str, Tensor]:
        """Returns the `input_ids` and `attention_mask`, both [B, T], of sentences."""
        encoded = self.tokenizer(sentences, padding=True, truncation=True, return_tensors="pt")
        return {key: encoded[key] for key in ("input_ids", "attention_mask")}


def answers_of(architecture: str, kind: str) -> Answers | None:
    """Returns what a class of transformers, of a `kind` such as "bert", answers about a text; None of another network."""
    from transformers.models.auto import modeling_auto as auto

    kinds: dict[Answers, Any] = {
        "classes": auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
        "next token": auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        "masked token": auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    }
    encodes = kind in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES and architecture == auto.MODEL_MAPPING_NAMES.get(kind)
    found = next((answers for answers, names in kinds.items() if architecture in names.values()), None)
    return "embedding" if encodes or architecture in auto.MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES.values() else found


def huggingface_text(name: str) -> TextModel | None:
    """Returns `hf/NAME`, a repository of Hugging Face's hub or a folder, where its network is one for text; None of another.

    Raises:
        ValueError: a folder that has no such network.
        OSError: no such repository, or it cannot be reached.
    """
    place = name.removeprefix("hf/")
    path = Path(place)
    is_local = place.startswith((".", "/", "~")) or path.is_dir()
    if is_local and not (path / "config.json").is_file():
        return None
    with contextlib.nullcontext() if path.is_dir() else one_try(), quiet():
        from transformers import AutoConfig, AutoTokenizer
        from transformers.models.auto import modeling_auto as auto

        try:
            config = AutoConfig.from_pretrained(place, trust_remote_code=False)
        except (ValueError, KeyError):  # said by whoever loads it as a network for pictures
            return None
        answers = answers_of((config.architectures or [""])[0], config.model_type)
        if answers is None:
            return None
        makers = {
            "classes": auto.AutoModelForSequenceClassification,
            "next token": auto.AutoModelForCausalLM,
            "masked token": auto.AutoModelForMaskedLM,
            "embedding": auto.AutoModel,
        }
        try:
            net = makers[answers].from_pretrained(place, trust_remote_code=False).float().eval()
            tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=False)
        except OSError as error:
            if not is_local:
                raise
            raise ValueError(f"{name} cannot be loaded: {error}") from error
        if tokenizer.pad_token is None:  # of GPT-2 and Llama: texts of one length need none, and others are masked there
            tokenizer.pad_token = tokenizer.eos_token
        if answers == "embedding":
            return TextModel(name, SentenceEmbedding(net, pools_first(place)).eval(), tokenizer)
    labels = [config.id2label[i] for i in sorted(config.id2label)] if answers == "classes" else []
    generic = all(label == f"LABEL_{i}" for i, label in enumerate(labels))
    return TextModel(name, TokenLogits(net).eval(), tokenizer, answers, None if generic else tuple(labels))


def pools_first(place: str) -> bool:
    """Whether a sentence encoder takes the state of the first token for the sentence, as sentence-transformers writes it."""
    from transformers.utils import cached_file

    file = cached_file(place, "1_Pooling/config.json", _raise_exceptions_for_missing_entries=False)
    if file is None:
        return False
    said = json.loads(Path(file).read_text())
    return bool(said.get("pooling_mode_cls_token", said.get("pooling_mode") == "cls"))


def token_id(tokenizer: Any, word: str, count: int) -> int:
    """Returns the id of the one token that `word` is for a language model of `count` tokens: as it stands, or after a space; or
    the number that it is.

    Raises:
        ValueError: it is several tokens, whose first would be another word.
    """
    found = []
    for text in (word, f" {word}"):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(ids) == 1 and ids[0] != tokenizer.unk_token_id:
            return int(ids[0])
        found.append(" ".join(tokenizer.convert_ids_to_tokens(ids)))
    if word.isdecimal() and int(word) < count:
        return int(word)
    those = f"{word!r} is no single token of this model, but {found[-1]}"
    raise ValueError(f"{those}: name one of these, or a number of 0 to {count - 1}")


def logits_at(answers: Answers, ids: Tensor, logits: Tensor, mask_id: int | None) -> tuple[Tensor, int]:
    """Returns the logits of the token that is asked for [B, vocabulary] of one text, and its position.

    Raises:
        ValueError: a masked token is asked for, and the text has none or several.
    """
    if answers == "next token":
        return logits[:, -1], logits.shape[1] - 1
    places = torch.nonzero(torch.eq(ids[0], -1 if mask_id is None else mask_id)).flatten().tolist()
    if len(places) != 1:
        raise ValueError(
            f"the text has {len(places)} masked tokens, and one is explained: write [MASK], or the model's own, once"
        )
    return logits[:, places[0]], places[0]
