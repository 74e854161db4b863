"""ZeroFL (Qiu et al., ICLR 2022, arXiv 2208.02507): bytes of updates, and seconds of training steps beside dense ones.

    python benchmarks/zerofl.py --quick                  the network for FEMNIST at 95 %, few turns
    python benchmarks/zerofl.py --data ROOT --save       ROOT: folder of MNIST and CIFAR-10 (without: drawn images)

Models: ResNet-18 for 32x32 images, batches of 32 (sparse: its 3x3 convolutions but the first one), and LEAF's network for
FEMNIST, batches of 10 (sparse: all layers but the last one). One thread.

``bytes`` (zerofl_bytes.py): sealed updates of trained models by rule, with values of 16 bits, and of 8; ``paper_MB``: the
file of the paper at this sparsity and mask ratio; ``share_of_paper``: ours by it; ``csr_MB``: float32 values and int32
positions of the same entries, and all else as float32. ``seal_s``, ``open_s``: processor seconds of ``top_weights``,
selection included.

``layers``: milliseconds of the passes of each sparse layer, by torch's dense kernels and by sparse ones, in the faster of two
memory formats each; ``chosen``: the kernels of output, input gradient and weight gradient that the library chooses for
contiguous tensors: "dense" where sparse ones lose. ``step`` is the sum of a layer's passes, packing included.

``steps`` (zerofl_steps.py): milliseconds of whole training steps, thresholds and optimiser included, each in two memory
formats; ``times_faster``: the faster dense one by the faster sparse one. ``momentum`` 0 is plain SGD. The last line is JSON.
"""

import argparse
import sys
from typing import Any

import torch
from common import Results, add_options
from fedbonsai.learning.sparse.kernels import native
from zerofl_bytes import PAPER_MB, Update, row_of
from zerofl_steps import MODELS, layer_rows, step_rows

SPARSITIES, RATIOS = (0.9, 0.95), (0.0, 0.1, 0.2)


def updates(results: Results, *, models: list[str], root: str | None, quick: bool) -> list[dict[str, Any]]:
    """A row for each model, sparsity and mask ratio."""
    rows = []
    for model in models:
        for sparsity in (0.95,) if quick else SPARSITIES:
            update: Update | None = None
            for ratio in (0.2,) if quick else RATIOS:
                key = f"bytes, {model}, {sparsity:g}, {ratio:g}"
                if key not in results and update is None:
                    update = Update(model, sparsity, root=root, steps=8 if quick else 60)
                rows.append(results.row(key, row_of, update, model, sparsity, ratio))
    return rows


def main() -> None:
    """Parse the command line, and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--data", help="folder of MNIST and CIFAR-10 (data.root)")
    parser.add_argument(
        "--parts", nargs="+", choices=["bytes", "layers", "steps"], default=["bytes", "layers", "steps"]
    )
    parser.add_argument("--models", nargs="+", choices=list(PAPER_MB), default=list(PAPER_MB))
    parser.add_argument("--turns", type=int, help="of steps; default: 12 for FEMNIST's network, 3 for ResNet-18")
    add_options(parser)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if reason := native.build():
        sys.exit(reason)
    results = Results("zerofl", options)
    models = ["femnist_cnn"] if options.quick else options.models
    found: dict[str, Any] = {}
    if "bytes" in options.parts:
        found["bytes"] = updates(results, models=models, root=options.data, quick=options.quick)
    sparsities = (0.95,) if options.quick else SPARSITIES
    if "layers" in options.parts:
        found["layers"] = [
            row
            for model in models
            for sparsity in sparsities
            for row in results.row(
                f"layers, {model}, {sparsity:g}", layer_rows, model, sparsity, turns=2 if options.quick else 7
            )
        ]
    if "steps" in options.parts:
        found["steps"] = [
            row
            for model in models
            for momentum in ((0.0,) if options.quick else (0.0, 0.9))
            for row in results.row(
                f"steps, {model}, momentum {momentum:g}",
                step_rows,
                model,
                sparsities,
                momentum=momentum,
                turns=options.turns or (4 if options.quick else MODELS[model]["turns"]),
            )
        ]
    results.finish(found)


if __name__ == "__main__":
    main()
