"""Explain a folder of pictures, on one machine, by one package:

    torchrun --nproc-per-node 2 --max-restarts 3 examples/torchrun_batch.py PACKAGE PICTURES OUT [--batch 8]

Batch k, as `sp_fx.offline` cuts them, belongs to rank k mod world, and becomes OUT/batch_kkkkkk.npz, written under another name
and renamed when whole. So a job that was killed goes on: a batch that is there is not run again, nothing is there by halves. A
picture that cannot be read is recorded as such. Each file has `names`, `errors`, `logits`, `maps`, `scales` and `provenance`.
"""

import argparse
import io
import os

import numpy as np
import torch

from sp_fx.offline import Batches, begin, pictures, whole


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package")
    parser.add_argument("pictures")
    parser.add_argument("out")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1, help="of the CPU, for each worker")
    args = parser.parse_args()
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else None
    batches = Batches(args.package, pictures(args.pictures), args.batch, device=device, threads=args.threads)
    out = begin(args.out, batches)
    for number in range(rank, len(batches), world):
        final = out / f"batch_{number:06d}.npz"
        if not final.exists():
            content = io.BytesIO()
            np.savez(content, **batches(number), provenance=np.array(batches.provenance))
            whole(final, content.getvalue())


if __name__ == "__main__":
    main()
