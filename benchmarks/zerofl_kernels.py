"""Seconds of each layer's passes with few active weights and activations, beside torch's dense ones.

    python benchmarks/zerofl_kernels.py --quick      one turn of each
    python benchmarks/zerofl_kernels.py --save       five turns

The layers are the 3x3 convolutions of ResNet-18 for 32x32 images (batch 32), and the first three layers of LEAF's network for
FEMNIST (batch 10). One thread; the faster of the two memory formats counts, pass by pass. A sparse kernel's times include
all conversions. The sparsity of a row is that of weights and of activations. Where the native kernels cannot be built, the
benchmark ends with the reason. The last line is JSON.
"""

import argparse
import sys
from typing import Any

from common import Results, add_options
from fedbonsai.learning.sparse.kernels import native
from fedbonsai.learning.sparse.kernels.measure import Geometry, PassSeconds, measure

LAYERS = {
    "64x64x3x3 @32": (Geometry((64, 64, 3, 3), (64, 32, 32), (1, 1), (1, 1)), 32),
    "128x64x3x3 @32 /2": (Geometry((128, 64, 3, 3), (64, 32, 32), (2, 2), (1, 1)), 32),
    "128x128x3x3 @16": (Geometry((128, 128, 3, 3), (128, 16, 16), (1, 1), (1, 1)), 32),
    "256x128x3x3 @16 /2": (Geometry((256, 128, 3, 3), (128, 16, 16), (2, 2), (1, 1)), 32),
    "256x256x3x3 @8": (Geometry((256, 256, 3, 3), (256, 8, 8), (1, 1), (1, 1)), 32),
    "512x256x3x3 @8 /2": (Geometry((512, 256, 3, 3), (256, 8, 8), (2, 2), (1, 1)), 32),
    "512x512x3x3 @4": (Geometry((512, 512, 3, 3), (512, 4, 4), (1, 1), (1, 1)), 32),
    "32x1x5x5 @28": (Geometry((32, 1, 5, 5), (1, 28, 28), (1, 1), (2, 2)), 10),
    "64x32x5x5 @14": (Geometry((64, 32, 5, 5), (32, 14, 14), (1, 1), (2, 2)), 10),
    "2048x3136": (Geometry((2048, 3136), (3136,)), 10),
}
PASSES = ("pack", "forward", "grad_input", "grad_weight", "step")


def row(name: str, layer: Geometry, *, batch: int, sparsity: float, turns: int) -> dict[str, Any]:
    """Milliseconds by kernel and pass, and how many times faster the native kernel is than the dense one."""
    found = measure(
        layer, batch=batch, weight_sparsity=sparsity, activation_sparsity=sparsity, native=True, turns=turns
    )
    kernels = [kernel for kernel in ("dense", "native", "csr") if kernel in found]
    times = {kernel: {each: fastest(found, kernel, each) for each in PASSES[:-1]} for kernel in kernels}
    result: dict[str, Any] = {"layer": name, "sparsity": sparsity}
    for each in times.values():
        each["step"] = sum(each.values())
    for each in PASSES:
        result[each] = {f"{kernel}_ms": round(times[kernel][each], 3) for kernel in kernels}
        if each != "pack":
            result[each]["faster"] = round(times["dense"][each] / times["native"][each], 2)
    return result


def fastest(found: dict[str, PassSeconds], name: str, pass_name: str) -> float:
    """Milliseconds of a pass in the memory format in which it is faster."""
    return 1e3 * min(float(getattr(each, pass_name)) for kernel, each in found.items() if kernel.startswith(name))


def main() -> None:
    """Measure, print a table, and finish with JSON."""
    parser = argparse.ArgumentParser(description="sparse kernels beside dense ones, layer by layer")
    parser.add_argument("--quick", action="store_true", help="one turn of each kernel instead of five")
    add_options(parser)
    arguments = parser.parse_args()
    results = Results("zerofl_kernels", arguments)
    if reason := native.build():
        sys.exit(reason)
    rows = []
    print(f"{'layer':20} {'sparsity':>8} {'pack':>6}  " + "  ".join(f"{each:>22}" for each in PASSES[1:]))
    for name, (layer, batch) in LAYERS.items():
        for sparsity in (0.9, 0.95):
            turns = 1 if arguments.quick else 5
            rows.append(
                results.row(f"{name}, {sparsity}", row, name, layer, batch=batch, sparsity=sparsity, turns=turns)
            )
            cells = [rows[-1][each] for each in PASSES[1:]]
            text = [f"{c['dense_ms']:7.2f} {c['native_ms']:6.2f} ms {c['faster']:4.1f}x" for c in cells]
            print(f"{name:20} {sparsity:8} {rows[-1]['pack']['native_ms']:6.2f}  " + "  ".join(text), flush=True)
    results.finish({"rows": rows})


if __name__ == "__main__":
    main()
