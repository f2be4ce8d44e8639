"""All of docs/evidence.md anew: `python bench/evidence.py [--minutes M] [--threads N]`, some hours on two cores.

Runs fidelity.py on every network and seed of the page, the paper's evaluation in small, the study of temperatures and what is
known of the zoo's scenes (zoo_truth.py), and then makes the tables, the plots and the figures. What has been answered is kept in
`out/` (see fidelity.py), so that a run that was cut short, or stopped by `--minutes` (exit status 3), goes on where it was.
Networks whose weights or packages are not there are left out, and named.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
ZOO = ("zoo/residual_cnn", "zoo/pyramid_transformer")
SEEDS = {"zoo/residual_cnn": (2025, 3025), "zoo/pyramid_transformer": (2025, 3025, 4025)}
CARRIED = ("efficientnet_lite0", "all_minilm_l6_v2")
PROVING = ("efficientnet_lite1", "efficientnet_lite2")  # on which nothing was chosen
FEW = ("pullback", "gradient")  # methods there


def commands() -> list[list[str]]:
    """Returns every step but the tables, as arguments of Python."""
    fidelity = [["fidelity.py", "--networks", name, "--seed", str(seed)] for name in ZOO for seed in SEEDS[name]]
    fidelity += [["fidelity.py", "--networks", name] for name in ("squeezenet1_0", *CARRIED)]
    fidelity += [["fidelity.py", "--networks", name, "--methods", *FEW] for name in PROVING]
    paper = [["fidelity.py", "--paper", "--networks", name, "--samples", "20", "--mosaics", "20"] for name in ZOO]
    ablations = [[*paper[0], "--ablations"]]
    tables = [["zoo_truth.py", "--out", "bench/results/zoo_truth.json"], ["fidelity_table.py", "--plots"], ["figures.py"]]
    return [*fidelity, *paper, *ablations, ["temperatures.py"], *tables]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=float("inf"))
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    deadline, failed = time.monotonic() + 60 * args.minutes, []
    for name, *options in commands():
        left = (deadline - time.monotonic()) / 60
        if left <= 0:
            print("evidence: stopped; run the same command again to go on", file=sys.stderr)
            return 3
        if name == "fidelity.py" and left < float("inf"):
            options += ["--minutes", f"{left:.1f}"]
        if name in ("fidelity.py", "temperatures.py"):
            options += ["--threads", str(args.threads)]
        print("==", name, *options, file=sys.stderr, flush=True)
        status = subprocess.run([sys.executable, str(HERE / name), *options]).returncode
        if status == 3:
            return 3
        if status:
            failed.append(" ".join([name, *options]))
    for command in failed:
        print(f"evidence: left out, since it failed: {command}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
