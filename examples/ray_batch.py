"""Explain a folder of pictures by one package on a Ray cluster, or on this machine: `pip install 'sp-fx[ray]'`

    python examples/ray_batch.py PACKAGE PICTURES OUT [--workers 2] [--batch 8] [--threads 1] [--gpus 0]

The batches of `sp_fx.offline`, by number, go to a pool of actors that each have loaded the package, and the results are written
to OUT/maps as Parquet: for each picture `id`, the number of its batch, `name`, `error` ("" where there is none), `logits`, `map`,
float16, to be multiplied by `scale`, and `provenance`. Ray restarts actors that die and runs their batches again; its checkpoints
in OUT/done say which batches are written, so that a job that died as a whole goes on when it is started again. Not
`ray.data.read_images`: one picture that cannot be read ends its job, and its batches are of whatever arrives together.

PACKAGE, PICTURES and OUT are paths that all nodes see. For a package of a GPU, `--gpus 1` gives each worker one.
"""

import argparse
import os
from pathlib import Path

import numpy as np
import ray
from ray.data.checkpoint import CheckpointConfig

from sp_fx.offline import Batches, begin, pictures


class Explain:
    """An actor: takes rows of batch numbers, returns rows of pictures."""

    def __init__(self, *args, **kwargs):
        self.batches = Batches(*args, **kwargs)

    def __call__(self, rows):
        (number,) = rows["id"].tolist()
        results = self.batches(number)
        count = len(results["names"])
        return {
            "id": np.full(count, number),
            **{column: results[f"{column}s"] for column in ("name", "error", "map", "scale")},
            "logits": results["logits"],
            "provenance": np.full(count, self.batches.provenance),
        }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", type=Path)
    parser.add_argument("pictures", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1, help="of the CPU, for each worker")
    parser.add_argument("--gpus", type=float, default=0, help="for each worker")
    args = parser.parse_args()
    arguments = [args.package.absolute(), pictures(args.pictures.absolute()), args.batch]
    batches = Batches(*arguments, threads=args.threads)
    out = begin(args.out.absolute(), batches)
    if "RAY_ADDRESS" not in os.environ:  # beside the actors, one processor filters what is done and one writes
        ray.init(num_cpus=args.workers * args.threads + 2, include_dashboard=False)
    ray.data.DataContext.get_current().checkpoint_config = CheckpointConfig(
        id_column="id", checkpoint_path=str(out / "done"), delete_checkpoint_on_success=False
    )
    # A block a batch: Ray then writes a batch whole or not at all.
    numbers = ray.data.range(len(batches), override_num_blocks=len(batches))
    results = numbers.map_batches(
        Explain,
        fn_constructor_args=arguments,
        fn_constructor_kwargs={"threads": args.threads},
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=args.workers),
        num_cpus=args.threads,
        num_gpus=args.gpus,
    )
    results.write_parquet(str(out / "maps"))


if __name__ == "__main__":
    main()
