"""The paper's evaluation (arXiv:2507.22832) for whoever has its networks and pictures: `python bench/fidelity.py --paper`.

The six measures, and Focus on mosaics, with the settings of the paper's published code, which are Quantus 0.6's: features are
single numbers of the picture, 3 x H x W of them, 150,528 at 224 (12,544 and 3,136 features at a time are a twelfth and a
forty-eighth of them). Correlations sum the map as it is; infidelity takes it times the change of the picture, Focus times the
picture. Thirteen explainers, those of its evaluator, with its settings; the two of this project by the paper's rules, and by the
default ones. Its ablations change one number at a time.

    python bench/fidelity.py --paper --images imagenet/val --labels val.txt --samples 1000 --mosaics 500
    python bench/fidelity.py --paper --ablations --networks zoo/residual_cnn --samples 12    # in small, offline
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace

import faithfulness as ask
import torch
from fidelity_cases import Case
from methods import Method, Run, explainer_of, fusion, gradient, gradient_ascent, last_spatial, own_relus, seeded
from torch import Tensor, nn

import sp_fx
from sp_fx.methods.ascent import Ascent

NETWORKS = ("resnet50", "vgg11_bn", "timm/pvt_v2_b1")
RUNS, DRAWS = 100, 10  # of faithfulness correlation; of monotonicity, sensitivity
GROUPS, FINE = 12, 48  # of features, in correlation and monotonicity; in faithfulness estimate
RADIUS = 0.02
BOX = {"bounds": (-1.0, 1.0)}
ABLATIONS = {
    "relu": (0.3, 0.4, 0.5, 1.0),
    "max_pool": (0.01, 0.5),
    "gelu": (0.5, 2.0),
    "attention": (0.5, 5.0),
    "steps": (1, 2, 3, 10),
    "step_size": (5.0, 10.0, 40.0),
}


# -- explainers


def paper_methods(model: nn.Module, x: Tensor) -> tuple[dict[str, Method], dict[str, str]]:
    """Returns the explainers by name, and of those left out why they do not apply; `x` [B, 3, H, W] are pictures."""
    warnings.filterwarnings("ignore", "Setting (forward, )?backward hooks")
    paper, side = sp_fx.PRESETS["paper"], side_of(x)
    chosen: dict[str, Method] = {}
    for name, rules in (("", paper.rules), (", default rules", sp_fx.Rules())):
        chosen |= pullbacks(explainer_of(model, x, rules), name, paper.steps, paper.step_size * side)
    plain = gradient_ascent(model, steps=paper.steps, step_size=paper.step_size * side, **BOX)
    chosen["gradient ascent"] = Method(plain, paper.steps)
    chosen["gradient"] = Method(summed(gradient(model)), 1)
    chosen["FusionGrad"] = Method(seeded(summed(fusion(model, gradient, 0.5, 0.5, 10, 10))), 100)
    chosen["SmoothGrad"] = Method(seeded(smoothed(model, 0.15, 50)), 50)
    captum, left = captum_explainers(model, x)
    return chosen | captum, left


def side_of(x: Tensor) -> float:
    """Returns the length of a step on pictures like `x` in units of that on pictures of 3 x 224 x 224."""
    return Ascent().length([x]) / Ascent().length([x.new_empty(1, 3, 224, 224)])


def pullbacks(explainer: sp_fx.Explainer, suffix: str, steps: int, length: float) -> dict[str, Method]:
    def ascent(x: Tensor, target: Tensor) -> Tensor:
        return explainer.ascend(x, target, steps=steps, step_size=length, **BOX)  # type: ignore[arg-type]

    return {f"soft pullback{suffix}": Method(explainer.pullback, 1), f"pullback ascent{suffix}": Method(ascent, steps)}


def ablations(model: nn.Module, x: Tensor) -> dict[str, Method]:
    """Returns soft pullback and ascent by the paper's rules, and with one of its numbers changed at a time."""
    side, paper = side_of(x), sp_fx.PRESETS["paper"]
    base = explainer_of(model, x, paper.rules)
    kinds = {site.kind for site in base.report().sites}
    chosen = pullbacks(base, "", paper.steps, paper.step_size * side)
    for setting, values in ABLATIONS.items():
        for value in values:
            suffix = f", {setting} {value:g}"
            if setting in ("steps", "step_size"):
                steps, length = (value, paper.step_size) if setting == "steps" else (paper.steps, value)
                name = f"pullback ascent{suffix}"
                chosen[name] = pullbacks(base, suffix, int(steps), length * side)[name]
            elif setting in kinds:
                rules = replace(paper.rules, **{setting: value})
                chosen |= pullbacks(explainer_of(model, x, rules), suffix, paper.steps, paper.step_size * side)
    return chosen


def summed(run: Run) -> Run:
    """Returns `run` with maps that are the same in each channel, their sum: what Quantus makes of Captum's."""
    return lambda x, target: run(x, target).sum(1, keepdim=True).expand_as(x)


def smoothed(model: nn.Module, deviation: float, count: int) -> Run:
    slope = gradient(model)

    def run(x: Tensor, target: Tensor) -> Tensor:
        total = torch.zeros_like(x)
        for _ in range(count):
            total += slope(x + deviation * torch.randn_like(x), target)
        return total / count

    return run


def captum_explainers(model: nn.Module, x: Tensor) -> tuple[dict[str, Method], dict[str, str]]:
    """Returns Captum's with the settings of Quantus: baselines of 0, ten steps of integrated gradients."""
    from captum.attr import Deconvolution, DeepLift, GradientShap, GuidedGradCam, InputXGradient, IntegratedGradients, Saliency

    left: dict[str, str] = {}
    try:
        own = own_relus(model)  # hooks are of modules: each call of a ReLU gets its own
    except Exception as error:  # torch.fx has errors of every kind for models that it does not trace
        own = model
        left["DeepLift, Deconvolution and GuidedGradCam, functional ReLUs"] = f"unseen by hooks: torch.fx says {error}"
    calls: dict[str, tuple[Callable[..., Tensor], int]] = {
        "Saliency": (Saliency(model).attribute, 1),
        "InputXGradient": (InputXGradient(model).attribute, 1),
        "IntegratedGradients": (
            lambda x, target: IntegratedGradients(model).attribute(x, target=target, n_steps=10, method="riemann_trapezoid"), 10,
        ),
        "GradientShap": (lambda x, target: GradientShap(model).attribute(x, torch.zeros_like(x), target=target), 5),
        "DeepLift": (DeepLift(own).attribute, 2),
        "Deconvolution": (Deconvolution(own).attribute, 1),
    }  # fmt: skip
    try:
        layer = own.get_submodule(last_spatial(own, x))
        calls["GuidedGradCam"] = (GuidedGradCam(own, layer).attribute, 2)
    except ValueError as error:
        left["GuidedGradCam"] = str(error)

    def as_run(call: Callable[..., Tensor]) -> Run:
        return seeded(summed(lambda x, target: call(x, target=target).detach()))

    return {name: Method(as_run(call), passes) for name, (call, passes) in calls.items()}, left


# -- measures, of maps as they are, [N, C, H, W]


def subsets(features: int, runs: int = RUNS, groups: int = GROUPS) -> Tensor:
    """Returns `runs` random sets of a part of the features, numbers int64 [runs, features / groups], the same at every call."""
    draw = torch.Generator().manual_seed(12)
    return torch.stack([torch.randperm(features, generator=draw)[: features // groups] for _ in range(runs)])


def blackened(case: Case, chosen: Tensor) -> Tensor:
    """Returns how far each score falls where features become the picture's least value; `chosen` [K, n] are sets of them, or
    [N, K, n] sets of each sample. float64 [N, K]."""
    drops = []
    for i, (picture, target) in enumerate(zip(case.pixels, case.target)):
        sets = chosen if chosen.dim() == 2 else chosen[i]
        changed = picture.flatten().repeat(len(sets), 1).scatter(1, sets, float(picture.min())).view(-1, *picture.shape)
        scores = case.score(torch.cat([picture[None], changed]), target.expand(len(sets) + 1)).double()
        drops.append(scores[0] - scores[1:])
    return torch.stack(drops)


def in_order(values: Tensor, groups: int) -> Tensor:
    """Returns the features of each sample [N, F] in ascending order, cut into `groups`: int64 [N, groups, F / groups]. What is
    left over where F is no multiple belongs to one group more, in the paper's code; here it is left out."""
    order = values.argsort(dim=1, stable=True)
    size = order.shape[1] // groups
    return order[:, : groups * size].view(len(order), groups, size)


def sums_of(values: Tensor, chosen: Tensor) -> Tensor:
    """Returns the sum of `values` [N, F] in each set, float64 [N, K]; `chosen` as of `blackened`."""
    sets = chosen if chosen.dim() == 3 else chosen.expand(len(values), *chosen.shape)
    return values.double().gather(1, sets.flatten(1)).view(sets.shape).sum(2)


def estimate(case: Case, maps: Tensor) -> Tensor:
    """Faithfulness estimate: Pearson's correlation of the sum of the map in each group of features, the greatest first, and how
    far the score falls when the group is black."""
    groups = in_order(-maps.flatten(1), FINE)
    return ask.pearson(sums_of(maps.flatten(1), groups), blackened(case, groups))


def monotonicity(case: Case, maps: Tensor) -> Tensor:
    """Monotonicity correlation: Spearman's of the sum of the map's magnitude in each group, the least first, and the mean square
    change of the class's probability, in units of it, when the group becomes one grey, drawn from [0, 1] ten times. The others
    ask for the score; for this measure Quantus puts a softmax behind the model."""
    sizes = maps.flatten(1).abs()
    groups, draw = in_order(sizes, GROUPS), torch.Generator().manual_seed(13)
    changes = []
    for picture, target, sets in zip(case.pixels, case.target, groups):
        greys = torch.rand(len(sets), DRAWS, generator=draw)
        flat = picture.flatten().repeat(len(sets) * DRAWS, 1)
        changed = flat.scatter(1, sets.repeat_interleave(DRAWS, 0), greys.view(-1, 1).expand(-1, sets.shape[1]))
        before = case.probability(picture[None], target[None]).double()
        after = case.probability(changed.view(-1, *picture.shape), target.expand(len(changed))).double()
        unit = before.square() if float(before) >= 1e-5 else 1.0
        changes.append((after - before).square().view(len(sets), DRAWS).mean(1) / unit)
    return ask.spearman(sums_of(sizes, groups), torch.stack(changes))


def paper_measured(
    case: Case, chosen: dict[str, Method], explained: Callable[[Method], Callable[[Tensor, Tensor], Tensor]],
    other: Tensor | None,
    answers: Callable[..., Tensor],
) -> dict[str, dict[str, Tensor]]:  # fmt: skip
    """Returns every measure of every explainer, [N] each.

    `explained(method)` runs it in batches; `other` [N] are the classes of the random-logit test, None where there is one class;
    `answers(name, compute, *args)` keeps what is computed.
    """
    x, target = case.pixels, case.target
    blocks = ask.grid(*x.shape[2:], 4)
    greys = ask.grey_pictures(x.shape[1:], blocks)
    overwriting = ask.Overwriting(
        blocks, greys, answers("drops overwritten", ask.overwritten, case.score, x, target, blocks, greys)
    )
    sets = subsets(x[0].numel())
    fallen = answers("paper drops", blackened, case, sets)
    results: dict[str, dict[str, Tensor]] = {}
    for name, method in chosen.items():
        run = explained(method)
        maps = answers(f"paper {name} maps", run, x, target)
        flat = maps.flatten(1)
        results[name] = {
            "infidelity, paper": ask.infidelity_published(lambda instead, maps=maps: maps * (x - instead), overwriting),
            "faithfulness correlation, paper": ask.pearson(sums_of(flat, sets), fallen),
            "faithfulness estimate, paper": answers(f"paper {name} estimate", estimate, case, maps),
            "monotonicity, paper": answers(f"paper {name} monotonicity", monotonicity, case, maps),
            "max-sensitivity, paper": answers(
                f"paper {name} sensitivity", ask.max_sensitivity, run, x, target, maps, DRAWS, RADIUS, 4
            ),
        }
        if other is not None:
            results[name]["random logit, paper"] = answers(f"paper {name} logit", other_logit, run, x, other, flat)
        if case.mosaics is not None:
            results[name]["focus, paper"] = answers(f"paper {name} focus", focused, run, *case.mosaics)
    return results


def focused(run: Run, mosaics: Tensor, classes: Tensor, tiles: Tensor) -> Tensor:
    return ask.focus(run(mosaics, classes) * mosaics, tiles)


def other_logit(run: Run, x: Tensor, other: Tensor, maps: Tensor) -> Tensor:
    return ask.pearson(run(x, other).flatten(1), maps)
