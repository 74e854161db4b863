"""What a width of a model costs: parameters, bytes, multiply-accumulates, seconds of a step, and memory, beside a masked model.

    python benchmarks/widths.py --quick    two steps, once
    python benchmarks/widths.py --save

VGG-16 for 32x32 images with the 4096-4096 head (33,642,442 parameters), trained on batches of 64 with one thread, each width in
a process of its own; in each of five repetitions all take turns, and times and ratios are medians over these (``..._each``: of
one repetition). ``MACs``: of the forward pass for one sample, counted on the operations that run. ``step_s``: measured,
seconds of the processor (one thread: those of a wall clock where nothing else runs), median of the steps. ``rss_MB``:
measured, the process's peak resident memory beyond that after the imports. ``..._MB``: of the model as it is sent to a
device, without a codec, as float16, and with 8 and 4 bits for each entry. ``identity``: taken out of the full model and put
back, it leaves the model as it was, and is read back to the same bits. ``mask``: the rival, the whole network with 79 % of its
weights masked by L1 norm (torch.nn.utils.prune). Aims: a step 3.5 times faster at width 0.5, and 6 times at 0.25.

The last line is JSON.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from common import Results, add_options

WIDTHS = (1.0, 0.75, 0.5, 0.25, 0.125)
BATCH = 64


def measure(width: float, steps: int, masked: bool) -> dict[str, Any]:
    """Figures of VGG-16 at one width, in this process, which must be new."""
    import torch

    torch.set_num_threads(1)
    from fedbonsai.actors.device.module import Module
    from fedbonsai.actors.messages.messages import array_specs
    from fedbonsai.comms.codec import CodecSpec
    from fedbonsai.comms.codecs.make_codec import make_codec
    from fedbonsai.comms.packet import sealed_bytes
    from fedbonsai.learning.costs.cost import part_cost
    from fedbonsai.learning.data.config import DataConfig
    from fedbonsai.learning.data.types import Samples
    from fedbonsai.learning.parts.part import Part
    from fedbonsai.learning.spec import Call, Optimiser, Training
    from fedbonsai.learning.training.losses import make_loss
    from fedbonsai.learning.training.training import train
    from fedbonsai.learning.workload import Workload
    from fedbonsai.learning.workload_settings import WorkloadSettings

    data = DataConfig(name="synthetic", kwargs={"shape": [3, 32, 32], "classes": 10, "samples_per_device": BATCH})
    workload = Workload(WorkloadSettings(model=Call("vgg16_bn"), data=data, metrics=(), num_devices=1, seed=0))
    samples = Samples(torch.randn(BATCH, 3, 32, 32), torch.arange(BATCH) % 10)
    before = _peak_rss()
    blocks = _block_names()
    part = Part(blocks=blocks, trained=blocks, width=width)
    submodel = workload.submodel(part)
    module = Module(workload.architecture(part), layout="contiguous")
    with torch.no_grad():
        for parameter in module.model.parameters():
            parameter.normal_(std=0.02)
    training = Training(batch_size=BATCH, optimiser=Optimiser(learning_rate=0.001), steps=1)
    if masked:
        from torch.nn.utils import prune

        for layer in module.model.modules():
            if isinstance(layer, torch.nn.Conv2d | torch.nn.Linear):
                prune.l1_unstructured(layer, "weight", amount=0.79)
    seconds = []
    for _ in range(1 + steps):
        started = time.process_time()
        train(
            module.model,
            samples,
            training=training,
            loss=make_loss(training.loss),
            transform=lambda x, _: x,
            seed=0,
            trainable=None if masked else submodel.trained,
        )
        seconds.append(time.process_time() - started)
    rss = _peak_rss() - before
    example = samples.x[0], samples.y[0]
    cost = part_cost(submodel, example=example, training=training, loss=make_loss(training.loss))
    codecs: dict[str, tuple[CodecSpec, ...]] = {
        "packet": (),
        "float16": (CodecSpec("float16"),),
        "8_bit": (CodecSpec("uniform"),),
        "4_bit": (CodecSpec("uniform", {"bits": 4}), CodecSpec("pack", {"bits": 4})),
    }
    expected = array_specs(submodel.down)
    sent = {
        f"{name}_MB": round(sealed_bytes(make_codec(specs), expected)[0] / 1e6, 2) for name, specs in codecs.items()
    }
    return {
        "parameters": submodel.parameters,
        "MiB": round(4 * submodel.parameters / 2**20, 2),
        "MACs": cost.forward_flops // 2,
        "step_s": round(statistics.median(seconds[1:]), 4),
        "rss_MB": round(rss / 1e6, 1),
        **sent,
        "identity": _identity(workload.slices(part)),
    }


def _identity(slices: dict[str, Any]) -> bool:
    """Whether each slice of a random model can be taken out and put back without any change, and read back from zeros."""
    import torch
    from fedbonsai.learning.models.cnn import vgg16_bn
    from fedbonsai.learning.parts.slices import gather, put

    full = {name: torch.randn_like(value.float()) for name, value in vgg16_bn().state_dict().items()}
    for name, part in slices.items():
        taken, before, zeros = gather(full[name], part), full[name].clone(), torch.zeros_like(full[name])
        put(full[name], part, taken)
        put(zeros, part, taken)
        if not torch.equal(full[name], before) or not torch.equal(gather(zeros, part), taken):
            return False
    return True


def _block_names() -> tuple[str, ...]:
    """Names of the network's blocks, from a copy without weights."""
    import torch
    from fedbonsai.learning.models.cnn import vgg16_bn
    from fedbonsai.learning.parts.blocks import cut

    with torch.device("meta"):
        return cut(vgg16_bn()).spec.block_names


def _peak_rss() -> int:
    """The peak resident memory of this process, bytes."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))


def in_a_process(width: float, steps: int, masked: bool) -> dict[str, Any]:
    """Figures of one width, from a new process."""
    command = [sys.executable, __file__, "--measure", str(width), "--steps", str(steps)]
    command += ["--masked"] if masked else []
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    figures: dict[str, Any] = json.loads(output.splitlines()[-1])
    return figures


def widths(results: Results, steps: int, repetitions: int) -> dict[str, Any]:
    """A row for each width, and one for the masked network: medians of the repetitions, in each of which all take turns."""
    names = [*((f"{width:g}", width, False) for width in WIDTHS), ("mask", 1.0, True)]
    found: dict[str, list[dict[str, Any]]] = {name: [] for name, _, _ in names}
    for repetition in range(repetitions):
        for name, width, masked in names:
            key = f"width {name}, repetition {repetition + 1}"
            found[name].append(results.row(key, in_a_process, width, steps, masked))
    rows = {
        name: each[0] | {key: round(statistics.median(one[key] for one in each), 4) for key in ("step_s", "rss_MB")}
        for name, each in found.items()
    }
    faster: dict[str, Any] = {f"MACs_of_1_by_MACs_of_{name}": macs_ratio(rows, name) for name in rows}
    for name in ("0.75", "0.5", "0.25", "0.125", "mask"):
        pairs = zip(found["1"], found[name], strict=True)
        ratios = [round(whole["step_s"] / other["step_s"], 2) for whole, other in pairs]
        faster[f"step_of_1_by_step_of_{name}"] = round(statistics.median(ratios), 2)
        faster[f"step_of_1_by_step_of_{name}_each"] = ratios
    return {"rows": rows, **faster}


def macs_ratio(rows: dict[str, Any], name: str) -> float:
    """How many times the multiply-accumulates of a row the whole network needs."""
    return round(rows["1"]["MACs"] / rows[name]["MACs"], 2)


def main() -> None:
    """Parse the command line, and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    add_options(parser)
    parser.add_argument("--measure", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, default=5, help=argparse.SUPPRESS)
    parser.add_argument("--masked", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure is not None:
        print(json.dumps(measure(options.measure, options.steps, options.masked)))
        return
    results = Results("widths", options)
    results.finish(widths(results, *((2, 1) if options.quick else (5, 5))))


if __name__ == "__main__":
    main()
