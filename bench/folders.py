"""How many pictures a second does `sp-fx batch` explain? `python bench/folders.py [--pictures 2000] [--ray] [--out FILE]`.

A network of the zoo as an .onnx package, drawn scenes as PNG files, batches of 8, one thread a worker: the command with one and
two workers and, with `--ray`, two of Ray's actors. A rate is of the batches alone, decoding and writing included: pictures by the
seconds that the whole folder takes beyond a tenth of it, so that what starting costs is apart. The page is made for none of them.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image
from provenance import provenance

import sp_fx
from sp_fx import zoo

WAYS = {"one worker": ["--workers", "1"], "two workers": ["--workers", "2"], "two actors of Ray": ["--workers", "2", "--ray"]}


def draw(folder: Path, count: int) -> Path:
    """Returns the folder with `count` drawn scenes as PNG files in it."""
    folder.mkdir()
    for start in range(0, count, 200):
        for i, pixels in enumerate(zoo.draw(60_000 + start, min(200, count - start)).pixels, start):
            image = ((pixels + 1) * 127.5).byte().permute(1, 2, 0).numpy()
            Image.fromarray(image).save(folder / f"{i:06d}.png")
    return folder


def seconds(package: Path, pictures: Path, out: Path, options: list[str]) -> float:
    """Returns how long the command takes from its start to its end."""
    command = [sys.executable, "-m", "sp_fx", "batch", str(package), str(pictures), "--out", str(out), "--page", "0", *options]
    started = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - started


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=2000)
    parser.add_argument("--network", default="residual_cnn", choices=zoo.NAMES)
    parser.add_argument("--ray", action="store_true", help="Ray too (extra 'ray')")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    few = max(args.pictures // 10, 8)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        package = root / f"{args.network}.onnx"
        explainer = sp_fx.transform(zoo.load(args.network))
        explainer.compile(example_inputs=zoo.draw(0, 2).pixels, inductor=False).save(package, class_names=zoo.labels)
        folders = {count: draw(root / str(count), count) for count in (few, args.pictures)}
        for way, options in WAYS.items():
            if "--ray" in options and not args.ray:
                continue
            spent = {count: seconds(package, each, root / f"{way} {count}", options) for count, each in folders.items()}
            each = (spent[args.pictures] - spent[few]) / (args.pictures - few)
            rows.append({"way": way, "per_second": 1 / each, "start_s": spent[few] - each * few, "seconds": spent})
            print("{way}: {per_second:.0f} pictures a second, and {start_s:.1f} s to start".format(**rows[-1]), flush=True)
    if args.out:
        record = {**provenance(), "network": args.network, "pictures": args.pictures, "cores": os.cpu_count(), "rows": rows}
        args.out.write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
