"""Smooth, integrated, Shapley and guided-CAM pullbacks: Captum's gradient methods on the explainer, which is a model to them.

    pip install 'sp-fx[bench]' && python examples/captum_pullbacks.py [--out captum_pullbacks.png]

Offline: the residual network of the zoo and three drawn scenes. The columns cost 1, 25, 25, 5 and 2 passes.
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path

import torch
from captum.attr import GradientShap, IntegratedGradients, LayerAttribution, LayerGradCam, NoiseTunnel, Saliency

import sp_fx
from sp_fx import zoo
from sp_fx.models.weights import weights_hash
from sp_fx.plot import SLOPE, picture, save, signed_map, table


def pullbacks(explainer: sp_fx.Explainer, x: torch.Tensor, target: torch.Tensor) -> dict[str, torch.Tensor]:
    """Returns maps by name, each shaped like `x` [B, 3, H, W], for classes `target` [B]."""
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
    torch.manual_seed(0)
    warnings.filterwarnings("ignore", "Input Tensor .* did not already require gradients")
    model = zoo.load("residual_cnn")
    explainer = sp_fx.transform(model)
    x, _, _ = zoo.draw(7, 3)
    target = explainer(x).argmax(1)
    maps = pullbacks(explainer, x, target)

    units = {name: "share of the score" if "integrated" in name or "Shapley" in name else SLOPE for name in maps}
    rows = [
        [
            picture(x[i], zoo.KINDS[target[i]]),
            *(signed_map(m[i], name if i == 0 else "", units[name]) for name, m in maps.items()),
        ]
        for i in range(len(x))
    ]
    rules, versions = str(explainer.report().rules), {"sp_fx": sp_fx.__version__, "torch": torch.__version__}
    save(table(rows), args.out, {"weights_sha256": weights_hash(model), "rules": rules, "seed": 7, "versions": versions})
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
