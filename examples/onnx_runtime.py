"""Explain with an .onnx package, NumPy and ONNX Runtime alone: `python onnx_runtime.py PACKAGE.onnx IN.npy OUT.npz [--target N]`.

IN.npy has the inputs, float32 [B, ...]; OUT.npz gets `outputs` and `map`. Neither torch nor sp_fx is imported. As `sp_fx.load`
does, it serves only a file whose digests are those of its manifest and whose answer to its probe is the one that was packaged.
"""

import argparse
import hashlib
import json
from pathlib import Path

import numpy as np
import onnxruntime


def load(path):
    """Returns the session and the manifest; raises ValueError where the package is not as it was written."""
    body = Path(path).read_bytes()
    session = onnxruntime.InferenceSession(body, providers=["CPUExecutionProvider"])
    manifest = json.loads(session.get_modelmeta().custom_metadata_map["sp_fx"])
    rest = {key: value for key, value in manifest.items() if key != "manifest_sha256"}
    manifest_digest = hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
    graph_digest = hashlib.sha256(body[: manifest["digest"]["bytes"]]).hexdigest()
    if manifest_digest != manifest["manifest_sha256"] or graph_digest != manifest["digest"]["sha256"]:
        raise ValueError(f"{path} was altered after it was written")
    if manifest["looped"] or len(manifest["inputs"]) != 1 or manifest["target"] != "class":
        raise ValueError("this example runs packages of one input, class targets and one graph; unroll an ascent to make it one")
    shape = [manifest["probe"]["batch"], *manifest["inputs"][0]["shape"]]
    outputs, map = explain(session, weyl(int(np.prod(shape))).reshape(shape), 0)
    probe = manifest["probe"]
    for answer, packaged in ((outputs.ravel()[:256], probe["outputs"][0]), (sketch(map), probe["maps"][0])):
        error = np.linalg.norm(answer - np.array(packaged)) / max(np.linalg.norm(packaged), 1e-30)
        if not error <= probe["tolerance"]:
            raise ValueError(f"{path} does not answer its probe: relative L2 distance {error:.1e} above {probe['tolerance']:.0e}")
    return session, manifest


def explain(session, inputs, target=-1):
    """Returns outputs and map; `target` is a class, or -1 for the predicted one."""
    return session.run(None, {"inputs": inputs.astype(np.float32), "target": np.full(len(inputs), target, np.int64)})


def weyl(count):
    """Returns the numbers of the probe's input, float32 in [-1, 1); `sp_fx/packages/probe.py` has the formula."""
    x = np.arange(1, count + 1, dtype=np.uint64) * 2654435769 % 2**32
    x = (x ^ x >> np.uint64(15)) * 2246822519 % 2**32
    return ((x >> np.uint64(8)) / 2**23 - 1).astype(np.float32)


def sketch(map):
    """Returns the 256 signed sums of a map's values that stand for it in the manifest: value i goes to sum `i mod 256`."""
    flat = map.astype(np.float64).ravel()
    signed = np.where(weyl(len(flat)) < 0, -flat, flat)
    return np.pad(signed, (0, -len(flat) % 256)).reshape(-1, 256).sum(0)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", type=Path)
    parser.add_argument("inputs", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--target", type=int, default=-1)
    args = parser.parse_args()
    session, manifest = load(args.package)
    outputs, map = explain(session, np.load(args.inputs, allow_pickle=False), args.target)
    np.savez(args.out, outputs=outputs, map=map)
    print(f"{manifest['model']}, {manifest['method']}, {manifest['rules']}: predicted {outputs.argmax(1).tolist()}")


if __name__ == "__main__":
    main()
