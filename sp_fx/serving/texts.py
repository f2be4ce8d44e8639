"""A served package of a network for text: token ids come in, and the shares of the tokens go out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..program.program import Program
from ..program.signature import Signature
from ..targets import primary
from .requests import Limits, Refused, RequestReader
from .service import Served


@dataclass(frozen=True)
class TokenReader(RequestReader):
    """Reads requests to a package of `signature` that takes token ids: an instance is `{"input_ids": [101, 2023, 102],
    "attention_mask": [1, 1, 1]}`, an object of the inputs by name, or, of a package with one input, its list alone. A target is a
    class, or of a package that takes directions a list of numbers."""

    signature: Signature

    @property
    def names(self) -> list[str]:
        """The names of the inputs, as the manifest has them."""
        signature = self.signature
        return signature.names or [f"input_{i}" if i else "inputs" for i in range(len(signature.shapes))]

    def instance(self, item: Any) -> Any:
        """Returns one text as arrays by name."""
        names = self.names
        if not isinstance(item, dict) and len(names) == 1:
            item = {names[0]: item}
        if not isinstance(item, dict) or set(item) != set(names):
            got = f"an object of {sorted(map(str, item))[:5]}" if isinstance(item, dict) else type(item).__name__
            raise Refused(400, f"an instance is an object of {', '.join(names)}; got {got}")
        arrays = {name: self.array(name, item[name], dtype) for name, dtype in zip(names, self.signature.dtypes)}
        batch = 1 if self.signature.dynamic_batch else self.signature.batch
        try:
            self.signature.check([torch.from_numpy(np.stack([a] * batch)).to(self.signature.device) for a in arrays.values()])
        except (ValueError, IndexError) as error:
            raise Refused(400, str(error)) from error
        return arrays

    def array(self, name: str, item: Any, dtype: torch.dtype) -> np.ndarray:
        """Returns one input of a text, of whole numbers where the package takes those."""
        try:
            array = np.asarray(item)
            kinds = "iuf" if dtype.is_floating_point else "iu"
            if array.size and (array.dtype.kind not in kinds or not np.isfinite(array).all()):
                raise TypeError(f"got {array.dtype.name}")
            return array.astype(str(dtype).removeprefix("torch."))
        except (ValueError, TypeError, OverflowError) as error:
            whole = "numbers" if dtype.is_floating_point else "whole numbers"
            raise Refused(400, f"{name} is a list of {whole}: {str(error)[:100]}") from error

    def picture(self, content: bytes) -> Any:
        raise Refused(415, f"this model takes token ids, not pictures: send {', '.join(self.names)}")

    def targets(self, target: Any, count: int, explains: bool = True) -> list[Any]:
        """Returns the target of each of `count` texts: a class number, -1 for the predicted one; or a direction."""
        if self.signature.target == "class":
            return super().targets(target, count, explains)
        shape = self.signature.filled(self.signature.output_shape, {})
        if target is None and shape and explains:
            raise Refused(400, f'"target" is a direction of shape {list(shape)}, for all instances or one for each; got none')
        try:
            aims = np.asarray(np.ones(shape) if target is None else target, np.float64)
        except (ValueError, TypeError, OverflowError) as error:
            raise Refused(400, f'"target" is a direction, numbers of shape {list(shape)}: {str(error)[:100]}') from error
        if aims.shape not in (shape, (count, *shape)) or not np.isfinite(aims).all():
            raise Refused(400, f'"target" is a direction of shape {list(shape)}, finite numbers; got shape {list(aims.shape)}')
        return list(np.broadcast_to(aims, (count, *shape)))


class ServedTexts(Served):
    """A loaded package of the method "tokens", called `name`. Texts of one length share a batch.

    Raises:
        ValueError: what is explained has lengths of its own, or further axes.
    """

    def reader_of(self) -> TokenReader:
        signature = self.program.signature
        if signature.chosen:
            raise ValueError(
                "this package explains scores that its target= took from the output, and returns the output: wrap the model to "
                "return the scores, and compile that"
            )
        if len(signature.output_shape) > 1 or any(isinstance(n, str) for n in signature.output_shape):
            explained = ["B", *signature.output_shape]
            raise ValueError(f"expected a package of one score, scores or an embedding for each text; this one's are {explained}")
        classes = signature.classes if signature.target == "class" else 0
        return TokenReader((), None, classes, self.class_names, self.limits, signature)

    def run(self, samples: Sequence[tuple[Any, Any]]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Returns (scores or embedding, shares [length]), float32, for each (text, target) pair."""
        alike: dict[Any, list[int]] = {}
        for i, (text, _) in enumerate(samples):
            alike.setdefault(tuple(array.shape for array in text.values()), []).append(i)
        found: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        for members in alike.values():
            found |= dict(zip(members, self.run_alike([samples[i] for i in members])))
        return [found[i] for i in range(len(samples))]

    def run_alike(self, samples: Sequence[tuple[Any, Any]]) -> list[tuple[np.ndarray, np.ndarray]]:
        """`run` of texts of one length. A package of a fixed batch is filled up with the last of them."""
        program = self.program
        filled = [*samples, *[samples[-1]] * (0 if program.dynamic_batch else program.batch - len(samples))]
        stacked = [np.stack([text[name] for text, _ in filled]) for name in filled[0][0]]
        aim = torch.from_numpy(np.stack([target for _, target in filled])).to(program.signature.target_dtype)
        outputs, shares = program(tuple(torch.from_numpy(array).to(program.device) for array in stacked), aim)
        return list(zip(primary(outputs).float().cpu().numpy(), shares.float().cpu().numpy()))[: len(samples)]

    def aim(self, prediction: dict[str, Any], target: Any) -> Any:
        return super().aim(prediction, target) if self.program.target == "class" else None

    def prediction(self, logits: np.ndarray) -> dict[str, Any]:
        """As of pictures, or {"embedding": [...]} where there are no classes."""
        if self.program.target == "class":
            return super().prediction(logits)
        if not np.isfinite(logits).all():
            raise Refused(500, "the model's output is not finite for this input")
        return {"embedding": logits.tolist()}

    def explanation(self, map: np.ndarray, target: Any, form: str) -> dict[str, Any]:
        """Returns the JSON object of one explanation: {"shares": [...]}, a number for each token."""
        if form != "array":
            raise Refused(400, f'shares of tokens are of the "format" array, got {form!r}')
        if not np.isfinite(map).all():
            raise Refused(500, "the shares are not finite for this input")
        named = {} if target is None else {"target": target, "label": self.label(target)}
        return {**named, "shares": map.tolist()}


def service_of(program: Program, name: str, limits: Limits) -> Served:
    """Returns the package `program` as it is served: of pictures, or of texts."""
    return (ServedTexts if program.method == "tokens" else Served)(program, name, limits)
