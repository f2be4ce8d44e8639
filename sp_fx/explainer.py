"""The explainer: a model's outputs with a soft way back."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self

from torch import Tensor

from .methods import pullbacks
from .methods.ascent import Ascent, Bounds, Clip
from .methods.calibration import calibrated, calibrated_by_norms, measure, with_spreads
from .methods.captured import CapturedModule
from .methods.requests import Inputs, Request
from .rewrite.report import Report
from .targets import Target
from .texts.tokens import Tokens, tokens

if TYPE_CHECKING:
    from .program.program import Program

Batches = Tensor | Iterable[Inputs]


class Explainer(CapturedModule):
    """A module equal to the model it was made from, whose autograd is the soft adjoint. Made by `transform`.

    Submodules keep the model's names and can be hooked: leaves as they are, containers and gates as identities through which
    their outputs pass.

    Every method takes `inputs`, a tensor, a tuple of positional arguments, a mapping of keyword arguments, or whatever container
    the forward takes for its one argument, with the batch on axis 0 of the tensors (any rank, at least one floating), and returns
    maps of their shapes and dtypes in the same containers, with None for integer tensors, which are passed on but not explained.
    The explainer itself takes the same: `explainer(inputs)`. They work under `no_grad` and `inference_mode`, and keep no graph
    alive. Common arguments:

        target: None for the predicted class, or for the one number that the model returns for each sample; an int; an integer
            tensor, array or list [B]; one [B, T] for T maps of each sample, [B, T, ...], which `pullback` makes from one forward
            and the others one after the other: `[[3, 7, 9]]` are three classes of one picture; a tuple of indices into an output
            with several axes; a floating tensor shaped like the output, the direction itself; a callable from the output to what
            is to be explained. Axes of the output that an index leaves over are summed. Integers are class numbers: one-hot rows
            are refused, and are a direction as floats.
        forward_kwargs: keyword arguments of the model.
        wrt: the name of an inner activation to explain in place of the inputs (`"bert.embeddings.word_embeddings"`), or the end
            of it that no other name has (`"word_embeddings"`); the result is one map, shaped like it. `pullback` takes several
            names, and returns a dictionary of maps, from one forward and one backward. `split` says which names there are.
        batch_size: the most samples to run at once; inputs, targets and bounds that have the batch on axis 0 are cut. Whether a
            keyword tensor whose axis 0 is as long goes with the samples is measured: the graph is run on fake tensors (shapes
            without numbers) of fewer samples, with it cut and with it whole; right is what runs and returns the shapes of the
            whole call but for the batch. A mask [B, L] is cut so, and prototypes [K, D] are not, also where K is B.

    and common errors:

        TypeError: an input that is no tensor, or that the model does not take; a mapping without a key that the model reads;
            nothing floating to explain; a target of an unknown form.
        ValueError: no input; NaN in an input; an input on another device than the model; a target that does not fit; a keyword
            tensor of which `batch_size` cannot know whether it goes with the samples.
        IndexError: a target index that the output does not have.
    """

    def pullback(
        self,
        inputs: Inputs,
        target: Target = None,
        *,
        forward_kwargs: Mapping[str, Any] | None = None,
        wrt: str | Sequence[str] | None = None,
        batch_size: int | None = None,
        chunk: int | None = None,
    ) -> Any:
        """The soft pullback of the target direction: one forward and one backward, also for targets [B, T].

        `chunk` is the most of the T targets to pull back at once.
        """
        return pullbacks.pullback(self, Request(inputs, target, forward_kwargs, wrt, batch_size), chunk)

    def double_pullback(
        self,
        inputs: Inputs,
        target: Target = None,
        *,
        step: float = 2.0,
        forward_kwargs: Mapping[str, Any] | None = None,
        wrt: str | None = None,
        batch_size: int | None = None,
    ) -> Any:
        """The pullback at `x + step * pullback(x)`; with target None, of the class predicted at `x`."""
        return pullbacks.double_pullback(self, Request(inputs, target, forward_kwargs, wrt, batch_size), step)

    def ascend(
        self,
        inputs: Inputs,
        target: Target = None,
        *,
        steps: int = 5,
        step_size: float | None = None,
        bounds: Bounds | None = None,
        radius: float | None = None,
        clip: Clip = "every",
        norm: float | None = 2.0,
        relative: bool = False,
        return_path: bool = False,
        forward_kwargs: Mapping[str, Any] | None = None,
        wrt: str | None = None,
        batch_size: int | None = None,
    ) -> Any:
        """Pullback ascent: where `steps` normalised steps along the pullback lead, minus where they started.

        With target None the class predicted at the start is kept; another class makes it a counterfactual.

        Args:
            steps: at least 1.
            step_size: the length of a step over a whole sample, in `norm`; None is the paper's for inputs in [-1, 1], scaled to
                their size: 20 * sqrt(numel / 150528) in L2.
            bounds: (low, high), numbers or tensors that broadcast to an input: the box to stay in.
            radius: the radius of the L2 ball round the input to stay in.
            clip: when `bounds` apply: after "every" step, after the "last", "never", or a number n, after each n-th and the last.
            norm: p of the L^p norm that measures a step: 2, 1, `math.inf`, ...; None for `x + step_size * v` as it is.
            relative: `step_size` is a part of the norm of the inputs as they are then.
            return_path: return (map, path), where path has all iterates, [steps + 1, B, ...], the input first.
        """
        ascent = Ascent(steps, step_size, bounds, radius, clip, norm, relative)
        return pullbacks.ascend(self, Request(inputs, target, forward_kwargs, wrt, batch_size), ascent, return_path)

    def tokens(
        self,
        inputs: Inputs,
        target: Target = None,
        *,
        tokenizer: Any = None,
        embedding: str | None = None,
        forward_kwargs: Mapping[str, Any] | None = None,
        batch_size: int | None = None,
    ) -> Tokens:
        """The share of each token of a text in what is explained: which words speak for the target, and which against it.

        One pullback at the embedding of the tokens, times the embedding. `print` shows the words with their parts in per cent, a
        notebook on a scale of red and blue; `in_colour()` is for terminals.

        Args:
            inputs: token ids [B, L], as what a tokenizer returns has them, with their attention mask; what is masked has share 0.
            target: as for `pullback`; `targets.token`, `targets.similarity` and `targets.span` are those of texts.
            tokenizer: what makes words of ids: one of transformers, a function, or a sequence of words by id. None shows the ids.
            embedding: the activation of the tokens, [B, L, width]; None for the first table that ids are looked up in.

        Raises:
            TypeError: nothing is looked up in a table, or the embedding is of another shape.
            ValueError: an `embedding` that names no activation.
        """
        options: dict[str, Any] = {"embedding": embedding, "tokenizer": tokenizer}
        return tokens(self, inputs, target, **options, forward_kwargs=forward_kwargs, batch_size=batch_size)

    def attribute(self, inputs: Inputs, target: Target = None, additional_forward_args: Any = None) -> Any:
        """The soft pullback under the calling convention of Captum's attribution methods.

        Raises:
            AssertionError: `target` is None and the model has more than one output for each sample.
        """
        return pullbacks.attribute(self, inputs, target, additional_forward_args)

    def split(self, name: str) -> tuple[Self, Self]:
        """This explainer in two at the inner activation `name`: `stem(*inputs)` returns it, `tail(activation, **inputs)` goes on
        from it; `tail` takes those of the inputs, by name, that it needs. Both share the modules, and can be compiled.

        Names are those of modules and the places of the report's gates, `#2` for a second call there.

        Raises:
            ValueError: no activation has this name; the message has the nearest that do.
        """
        return super().split(name)

    def compile(  # type: ignore[override]  # in place of nn.Module.compile, on purpose
        self,
        method: str = "pullback",
        *,
        example_inputs: Inputs | None = None,
        dynamic_batch: bool = True,
        dynamic_lengths: bool = True,
        inductor: bool = True,
        **method_args: Any,
    ) -> Program:
        """`method` as one compiled inference graph, `program(inputs, target) -> (outputs, map)`: the model's own outputs and
        the explanation, by one pass.

        The program is compared with this explainer on the example, and refused where it differs by more than 1e-4 in relative L2,
        for float32 (`sp_fx.program.comparing.TOLERANCE`). It keeps the weights of this moment: later changes of the model do not
        reach it.

        Args:
            method: "pullback", "double_pullback" or "ascend"; or "tokens", whose map is the share of each token of a text [B, L].
            example_inputs: inputs of the shapes, dtypes and device that the program is for, any values: a tensor, or a tuple or a
                mapping of tensors. Required.
            dynamic_batch: whether it takes any batch size, or the example's alone. Convolutional networks on a CPU are compiled
                twice for it, since they run faster at a batch size that is known: that of the example, which should be the
                usual one.
            dynamic_lengths: whether it takes texts and other sequences of any length, where the model does, or the example's
                alone. `program.shapes` names the sizes that vary. Height and width of pictures are the example's.
            inductor: False leaves the graph to PyTorch, which runs it op by op. Such a program is made in seconds, where
                compiling takes minutes, and is what `save` needs: an `.onnx` is never compiled here, and a `.pt2` when it is
                saved.
            method_args: the method's own arguments (`step`; those of `ascend` from `steps` to `relative`; `embedding`, the
                activation of the tokens), and
                `target`: "class" (the default), for programs called with class numbers [B], -1 being the predicted class;
                "direction", for programs called with a tensor shaped like the output; or a callable that takes scores from the
                output, [B, classes] or one for each sample [B], such as `lambda out: out["age"][:, 0]` or one of `targets`;
                `unrolled`: an ascent as one graph of all its steps, instead of a loop round a graph of one step.

        Raises:
            TypeError, ValueError: an argument that the method does not take, or inputs that a program cannot have.
            ProgramError: the compiled program differs from this explainer; a model whose outputs are others at each call, since
                it draws random numbers.
            ModuleNotFoundError: the inputs are on a GPU, and Triton is not installed.
        """
        from .program.compiling import build  # here, since it brings in torch's tracers: `import sp_fx` stays light

        if example_inputs is None:
            raise ValueError("a program is made for the shape and dtype of its inputs: pass example_inputs")
        options: dict[str, Any] = {"dynamic_batch": dynamic_batch, "dynamic_lengths": dynamic_lengths, "inductor": inductor}
        return build(self, method, example_inputs, **options, **method_args)

    def report(self, batches: Batches | None = None, *, forward_kwargs: Mapping[str, Any] | None = None) -> Report:
        """Each gating call of the model, its place and temperature, and what was left as it is and why. Printable.

        With `batches` (as `calibrate` takes them) also the standard deviation of each pre-activation over them and the
        temperature in units of it, with a warning beside gates that are effectively hard or effectively open.
        """
        report = super().report()
        return report if batches is None else with_spreads(report, measure(self, batches, forward_kwargs or {}))

    def calibrate(self, batches: Batches | None = None, *, forward_kwargs: Mapping[str, Any] | None = None) -> Self:
        """A new explainer whose temperatures are in units of the scale that each pre-activation has over `batches`.

        One forward over the data, which needs no labels. The scale of a gate is the standard deviation of its pre-activation over
        all numbers of all samples, a constant from then on: it costs nothing when explaining, does not depend on how the data was
        cut into batches or where the sample's axis is, and is saved with the rules: `transform(model, rules=new.report().rules)`
        needs no data. This explainer stays as it is.

        Without `batches`, the gates that a BatchNorm feeds get the deviation that its own parameters and statistics say their
        pre-activation has, over the data that it was trained on; the others keep the scale they had, as the report shows. Gates
        whose temperature is by what a batch norm says of each channel (`Soft(scale="batch_norm")`, ReLU6) keep that either way.

        Args:
            batches: a tensor, or an iterable of batches: tensors, or tuples or mappings of several inputs.
            forward_kwargs: keyword arguments of the model, the same for every batch.

        Raises:
            ValueError: no sample; a batch that the model cannot take; only constant inputs; pre-activations that are not finite;
                without `batches`, no gate is fed by a BatchNorm.
            TypeError: a batch that is neither a tensor nor a tuple or a mapping.

        Warns:
            UserWarning: gates that are constant over the data, which stay hard, and gates that are never active on it.
        """
        other = copy.copy(self)
        if batches is None:
            other.edited(calibrated_by_norms(self._report, self, other.graph))
        else:
            other.edited(calibrated(self._report, other.graph, measure(self, batches, forward_kwargs or {})))
        return other
