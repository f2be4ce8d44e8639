"""Explain a folder of pictures, on one machine, by one package:

    torchrun --nproc-per-node 2 --max-restarts 3 examples/torchrun_batch.py PACKAGE PICTURES OUT [--batch 8]

The pictures, by name, are cut into batches once and for all; batch k belongs to rank k mod world, and becomes
OUT/batch_kkkkkk.npz, written under another name and renamed when whole. So a job that was killed goes on: a batch that
is there is not run again, nothing is there by halves, and since the last batch is filled up with zeros, every picture is computed
in the same company: the files are the same to the last bit as those of a job that was left alone. A picture that cannot be read
is recorded as such.

Each file has `names`, `errors` ("" where there is none), `logits`, `maps` (float16, each divided by its `scales`, which is its
greatest magnitude, since pullbacks go below what float16 holds) and `provenance`, JSON.
"""

import argparse
import hashlib
import json
import os
import re
from pathlib import Path

import numpy as np
import torch

import sp_fx
from sp_fx.pictures import PictureError, decode

ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


def explain(program, files, batch):
    """The arrays of one batch of `files`, at most `batch` of them."""
    _, height, width = program.shapes[0]
    pixels, errors = np.zeros((batch, 3, height, width), np.float32), []
    for place, file in zip(pixels, files):
        try:
            place[:] = decode(file.read_bytes(), (height, width), 1 << 26)
            errors.append("")
        except (PictureError, OSError) as error:
            errors.append(re.sub(r" at 0x[0-9a-f]+", "", str(error))[:300])  # Pillow's has an address, another in each run
    logits, maps = (t.cpu().numpy()[: len(files)] for t in program(torch.from_numpy(pixels).to(program.device)))
    scales = np.abs(maps).max((1, 2, 3)).astype(np.float32)
    small = maps / np.where(scales > 0, scales, 1)[:, None, None, None]
    names = np.array([file.name for file in files])
    return {"names": names, "errors": np.array(errors), "logits": logits, "maps": small.astype(np.float16), "scales": scales}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", type=Path)
    parser.add_argument("pictures", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--batch", type=int, default=8)
    args = parser.parse_args()
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // world))  # the same in every run: sums depend on how they are cut
    device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else None
    program = sp_fx.load(args.package, device=device)
    told = {k: program.manifest[k] for k in ("model", "method", "rules", "weights_sha256", "versions", "input_space")}
    digest = hashlib.sha256(args.package.read_bytes()).hexdigest()
    provenance = json.dumps({**told, "package_sha256": digest, "batch": args.batch}, sort_keys=True)
    files = sorted(f for f in args.pictures.iterdir() if f.suffix.lower() in ENDINGS)
    args.out.mkdir(parents=True, exist_ok=True)
    for number in range(rank, -(-len(files) // args.batch), world):
        final = args.out / f"batch_{number:06d}.npz"
        if final.exists():
            continue
        found = explain(program, files[number * args.batch : (number + 1) * args.batch], args.batch)
        draft = args.out / f".{final.name}.{rank}"
        with draft.open("wb") as file:
            np.savez(file, **found, provenance=np.array(provenance))
            file.flush()
            os.fsync(file.fileno())
        draft.rename(final)


if __name__ == "__main__":
    main()
