"""Smooth, integrated, Shapley and guided-CAM pullbacks: Captum's gradient methods on the explainer, which is a model to them.

    pip install 'sp-fx[bench]' && python examples/captum_pullbacks.py [--out captum_pullbacks.png]

Offline: the residual network of the zoo and three drawn scenes. Each column costs what its method costs: 1, 25, 25, 5 and 2 passes.
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path

import torch
from captum.attr import GradientShap, IntegratedGradients, LayerAttribution, LayerGradCam, NoiseTunnel, Saliency

import sp_fx
from sp_fx import zoo
from sp_fx.plot import robust_limit, show_map, show_picture


def pullbacks(explainer: sp_fx.Explainer, x: torch.Tensor, target: torch.Tensor) -> dict[str, torch.Tensor]:
    """Maps shaped like `x` [B, 3, H, W] for classes [B]."""
    smooth = NoiseTunnel(Saliency(explainer))
    integrated, shap = IntegratedGradients(explainer), GradientShap(explainer)
    grey = torch.zeros_like(x[:1])
    soft = explainer.pullback(x, target)
    # Containers can be hooked: the last stage's output is where the class activation map is taken.
    cam = LayerGradCam(explainer, explainer.blocks).attribute(x, target=target)
    return {
        "pullback": soft,
        "smooth pullback": smooth.attribute(x, target=target, abs=False, nt_samples=25, stdevs=0.3),
        "integrated pullback": integrated.attribute(x, grey, target=target, n_steps=25),
        "Shapley pullback": shap.attribute(x, grey, target=target, n_samples=5, stdevs=0.1),
        "guided-CAM pullback": soft * LayerAttribution.interpolate(cam.relu(), x.shape[2:], "bilinear"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("captum_pullbacks.png"))
    args = parser.parse_args()
    from matplotlib.figure import Figure

    torch.manual_seed(0)
    warnings.filterwarnings("ignore", "Input Tensor .* did not already require gradients")
    explainer = sp_fx.transform(zoo.load("residual_cnn"))
    x, _, _ = zoo.draw(7, 3)
    target = explainer(x).argmax(1)
    maps = pullbacks(explainer, x, target)

    figure = Figure(figsize=(2.1 * (1 + len(maps)), 2.3 * len(x)), layout="constrained", dpi=100)
    for i, row in enumerate(figure.subplots(len(x), 1 + len(maps))):
        show_picture(row[0], x[i], zoo.KINDS[target[i]])
        for axis, (name, found) in zip(row[1:], maps.items()):
            show_map(axis, found[i].detach(), name if i == 0 else "", robust_limit(found[i]))
    figure.savefig(args.out)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
