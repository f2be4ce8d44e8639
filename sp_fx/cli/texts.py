"""`sp-fx text`: sentences, by a network for text: which words speak for what it answers, and which against it."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import models, targets
from ..build import transform
from ..figures.words import Words
from ..models.classes import class_index
from ..models.published.texts import NextToken, TextModel, logits_at, token_id
from ..texts.tokens import Tokens, joined
from .explaining import printed_to_stderr
from .parser import rules_of

ENDINGS = (".png", ".svg", ".pdf", ".jpg", ".webp", ".html")  # of the files that --out may name


@dataclass(frozen=True)
class Question:
    """What is asked about a text: its `score`, from the output of the model to a number [1]; what that is, in words, and in the
    words of a record; and the number."""

    score: Callable[[Any], Tensor]
    title: str
    answer: str
    value: float


def run_text(args: argparse.Namespace) -> int:
    printed = sys.stdout
    check_out(args.out)
    with printed_to_stderr(args.json):
        net = text_model(args.model)
        check_options(net, args)
        explainer, found = None, []
        for text in args.texts:
            inputs = net.tokens([text])
            length = inputs["input_ids"].shape[1]
            if length == 0:
                raise ValueError(f"the text {text!r} has no tokens: there is nothing to explain")
            try:
                with torch.no_grad():
                    output = net.model(**inputs)
            except (RuntimeError, IndexError) as error:
                said = str(error).strip().splitlines()[:1]
                raise ValueError(f"{net.name} does not take a text of {length} tokens: {''.join(said)}") from error
            question = asked(net, args, inputs["input_ids"], output)
            if explainer is None:
                explainer = transform(net.model, rules=rules_of(args.rules, args.temperature), example_inputs=inputs)
            tokens = explainer.tokens(inputs, question.score, tokenizer=net.tokenizer)
            found.append((question, tokens))
            print(line(args, net, text, question, tokens, printed.isatty()), file=printed)
    if args.out is not None:
        Words(joined([t for _, t in found]), [q.title for q, _ in found]).save(args.out)
        print(f"sp-fx: {args.out}", file=sys.stderr)
    return 0


def text_model(name: str) -> TextModel:
    """Returns the network for text of that name; ValueError where it is one for pictures."""
    net = models.load(name)
    if isinstance(net, TextModel):
        return net
    raise ValueError(
        f"{name} is a network for pictures, `sp-fx explain` is for it. Networks for text are {', '.join(models.TEXT)}, those of "
        "hf/NAME, and what a function returns as a TextModel, module:function"
    )


def check_out(out: Path | None) -> None:
    """Raises ValueError or OSError for a file that could not be written, before anything is done."""
    if out is None:
        return
    if out.is_dir():
        raise IsADirectoryError(f"{out} is a folder, and --out is a file")
    if out.suffix.lower() not in ENDINGS:
        raise ValueError(f"--out is a file that ends on one of {', '.join(ENDINGS)}; got {out.name}")
    if not out.parent.is_dir():
        raise NotADirectoryError(f"there is no folder {out.parent} to write {out.name} into")


def check_options(net: TextModel, args: argparse.Namespace) -> None:
    """Raises ValueError for options that do not go with what the network answers."""
    if net.answers == "embedding":
        if args.to is None:
            raise ValueError(
                f"{net.name} makes embeddings, and what is explained is their similarity to another text's: pass --to 'TEXT'"
            )
        if args.target is not None:
            raise ValueError(f"{net.name} makes embeddings, which have no classes: --to 'TEXT' instead of --target")
    elif args.to is not None:
        raise ValueError(f"--to is for networks that make embeddings, and {net.name} answers with {net.answers}: leave it out")


def asked(net: TextModel, args: argparse.Namespace, ids: Tensor, output: Tensor) -> Question:
    """Returns what is explained of one text, with ids [1, T]: of the option `--target` or `--to`, or else what is predicted."""
    if net.answers == "embedding":
        with torch.no_grad():
            other = net.model(**net.tokens([args.to]))[0]
        value = float(targets.similarity(other)(output))
        return Question(targets.similarity(other), f"similarity to {args.to!r}: {value:.2f}", args.to, value)
    place = None
    if net.answers == "classes":
        logits, named = output, net.labels
        chosen = int(logits.argmax()) if args.target is None else class_number(args.target, named)
        if not 0 <= chosen < logits.shape[1]:
            raise IndexError(f"target {chosen} is outside 0 to {logits.shape[1] - 1}, the classes of {net.name}")
        label = named[chosen] if named else f"class {chosen}"
    else:
        logits, place = logits_at(net.answers, ids, output, getattr(net.tokenizer, "mask_token_id", None))
        chosen = int(logits.argmax()) if args.target is None else token_id(net.tokenizer, args.target, logits.shape[1])
        label = net.tokenizer.decode([chosen])
    value = float(logits.softmax(-1)[0, chosen])
    what = {"classes": "", "next token": "next token ", "masked token": "masked token "}[net.answers]
    score = (lambda out: out[:, chosen]) if place is None else targets.token(place, chosen)
    return Question(score, f"{what}{label if place is None else repr(label)} ({value:.2f})", label, value)


def class_number(text: str, names: tuple[str, ...] | None) -> int:
    """Returns the number of the class that a name or a number stands for; ValueError where no class is called so."""
    return int(text) if text.isdecimal() and text not in (names or ()) else class_index(text, names)


def line(args: argparse.Namespace, net: TextModel, text: str, question: Question, tokens: Tokens, colours: bool) -> str:
    """Returns what is printed of one text."""
    if args.json:
        record = {"model": net.name, "text": text, "answers": net.answers, "answer": question.answer, "value": question.value,
                  "tokens": tokens.of(0), "words": tokens.relative(0)}  # fmt: skip
        return json.dumps(record)
    return f"{question.title}\n  {tokens.in_colour() if colours else tokens}"


def packaged(net: TextModel) -> tuple[nn.Module, str]:
    """Returns the module that a package is made of, and the kind of its target: a class, a token of the vocabulary that comes
    next, or, of embeddings, a direction, such as the embedding of another text.

    Raises:
        ValueError: masked tokens, whose place is another in each text.
    """
    if net.answers == "masked token":
        raise ValueError(f"{net.name} answers with masked tokens, whose place is another in each text: no package is made of it")
    model = NextToken(net.model) if net.answers == "next token" else net.model
    return model.eval(), "direction" if net.answers == "embedding" else "class"
