"""Bytes and time of sparse updates, compared with the files of ZeroFL (Qiu et al., ICLR 2022, arXiv 2208.02507, table 1).

Models: ResNet-18 for 32 x 32 images (sparse: its 3 x 3 convolutions but the stem), and the CNN of LEAF for FEMNIST (sparse:
both convolutions and the first linear layer). Weights are drawn: Student's t with five degrees of freedom, scaled by lognormal
factors of each output and input channel (0.3), since large entries concentrate in channels. At each density of the paper, the
largest entries of each sparse layer are sent by these chains, all other tensors whole:

    float16        topk, float16, sparse
    float16, fast  topk, float16, sparse without entropy coding
    8 bit          topk, uniform 8 bit with a step for each output channel (sparse layers only), float16, sparse
    8 bit, fast    the same without entropy coding
    8 bit, entropy the same by the codec entropy, which sends the float16 tensors as they are

    MB            of a sealed packet with all tensors
    paper_MB      file of the paper at this density
    csr_MB        float32 values and int32 indices of the same entries, as in the paper, and all other tensors as float32;
                  csr_zlib_MB: these arrays by zlib at its best level
    error         root of the mean square of what the kept entries of sparse layers lose, over that of the entries
    encode_s      processor seconds from float32 tensors to the packet, selection included, best of several repetitions;
                  decode_s likewise

    python benchmarks/sparse_uploads.py --quick      one density of each model, one repetition
    python benchmarks/sparse_uploads.py --save
"""

import argparse
import time
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from common import Results, add_options
from fedbonsai.comms.codec import Array, Arrays, CodecSpec, Context, specs_of
from fedbonsai.comms.codecs.make_codec import make_codec
from fedbonsai.comms.packet import PacketKind, Stamp, seal, unseal
from fedbonsai.learning.models.zoo import build
from fedbonsai.learning.spec import Call
from torch import nn

STAMP = Stamp(kind=PacketKind.UPDATE)
PAPER_MB = {
    "resnet18": {0.05: 5.9, 0.10: 10.1, 0.15: 14.4, 0.20: 18.7, 0.25: 23.0, 0.30: 27.3},
    "femnist_cnn": {0.05: 1.3, 0.15: 2.9, 0.25: 4.4},
}
STEPS = CodecSpec("uniform", {"bits": 8, "granularity": "channel", "roles": ["sparse"]})
FAST = CodecSpec("sparse", {"coder": "none"})
CHAINS = {
    "float16": (CodecSpec("float16"), CodecSpec("sparse")),
    "float16, fast": (CodecSpec("float16"), FAST),
    "8 bit": (STEPS, CodecSpec("float16"), CodecSpec("sparse")),
    "8 bit, fast": (STEPS, CodecSpec("float16"), FAST),
    "8 bit, entropy": (STEPS, CodecSpec("float16"), CodecSpec("entropy", {"coder": "rans"})),
}


class FemnistCnn(nn.Module):
    """The parameters of LEAF's CNN for 28 x 28 images of 62 classes (Caldas et al., 2018, arXiv 1812.01097)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 32, 5), nn.Conv2d(32, 64, 5)
        self.linear, self.out = nn.Linear(3136, 2048), nn.Linear(2048, 62)


def drawn(model: nn.Module, sparse: set[str]) -> tuple[Arrays, dict[str, str]]:
    """Tensors for a model's shapes, and their roles."""
    generator, buffers = np.random.default_rng(0), {name for name, _ in model.named_buffers()}
    tensors, roles = {}, {}
    for name, tensor in model.state_dict().items():
        if not tensor.is_floating_point():
            continue
        shape = tuple(tensor.shape)
        if len(shape) >= 2:
            roles[name] = "sparse" if name in sparse else "weight"
            outputs, inputs = (
                np.exp(generator.normal(0, 0.3, size)).reshape([-1 if i == axis else 1 for i in range(len(shape))])
                for axis, size in enumerate(shape[:2])
            )
            scale = (2 / np.prod(shape[1:])) ** 0.5
            values = generator.standard_t(5, shape) * scale * outputs * inputs
        else:
            roles[name] = "statistic" if name in buffers else "vector"
            values = 1 + 0.1 * generator.standard_normal(shape)
        tensors[name] = values.astype("<f4")
    return tensors, roles


def models() -> dict[str, tuple[Arrays, dict[str, str]]]:
    """The tensors and roles of both models."""
    resnet = build(Call("resnet18"), seed=0, outputs=10)
    convolutions = {n for n, p in resnet.named_parameters() if p.dim() == 4 and p.shape[-1] == 3 and p.shape[1] > 3}
    femnist = {"conv1.weight", "conv2.weight", "linear.weight"}
    return {"resnet18": drawn(resnet, convolutions), "femnist_cnn": drawn(FemnistCnn(), femnist)}


def best_s(action: Callable[[], Any], repetitions: int) -> float:
    """Processor seconds of the fastest repetition."""
    times = []
    for _ in range(repetitions):
        start = time.thread_time()
        action()
        times.append(time.thread_time() - start)
    return round(min(times), 4)


def csr(tensors: Arrays, kept: Arrays, roles: dict[str, str]) -> tuple[float, float]:
    """Megabytes of values and indices of the kept entries with all other tensors, as they are and by zlib."""
    arrays: list[Array] = []
    for name, array in tensors.items():
        if roles[name] != "sparse":
            arrays.append(array)
            continue
        flat = kept[name].reshape(-1)
        at = np.flatnonzero(flat).astype("<i4")
        arrays += [at, flat[at], np.array([0, at.size], "<i4")]
    packed = sum(len(zlib.compress(array.tobytes(), 9)) for array in arrays)
    return sum(array.nbytes for array in arrays) / 1e6, packed / 1e6


def rows_of(model: str, tensors: Arrays, roles: dict[str, str], density: float, *, repetitions: int) -> dict[str, Any]:
    """The figures of one model at one density."""
    topk = CodecSpec("topk", {"density": density, "scope": "tensor", "roles": ["sparse"]})
    kept, _ = make_codec((topk,)).encode(tensors, context=Context(roles=roles))
    plain, packed = csr(tensors, kept, roles)
    row: dict[str, Any] = {
        "model": model,
        "density": density,
        "dense_MB": round(sum(array.nbytes for array in tensors.values()) / 1e6, 2),
        "paper_MB": PAPER_MB[model][density],
        "csr_MB": round(plain, 2),
        "csr_zlib_MB": round(packed, 2),
    }
    return row | {name: coded((topk, *chain), tensors, roles, kept, repetitions) for name, chain in CHAINS.items()}


def coded(
    chain: tuple[CodecSpec, ...], tensors: Arrays, roles: dict[str, str], kept: Arrays, repetitions: int
) -> dict[str, float]:
    """The figures of one chain. ``kept``: the tensors after the selection."""
    context, expected, codec = Context(roles=roles), specs_of(tensors, roles), make_codec(chain)
    packet, held = seal(tensors, codec=codec, context=context, stamp=STAMP)

    def opened() -> Arrays:
        return unseal(packet, codec=codec, expected=expected, context=context)

    received = opened()
    assert all(received[n].tobytes() == held[n].tobytes() for n in tensors), "the ends differ"
    lost = sum(float(np.square(held[n] - kept[n]).sum()) for n in tensors if roles[n] == "sparse")
    whole = sum(float(np.square(kept[n]).sum()) for n in tensors if roles[n] == "sparse")
    return {
        "MB": round(packet.nbytes / 1e6, 2),
        "error": float(f"{(lost / whole) ** 0.5:.2g}"),
        "encode_s": best_s(lambda: seal(tensors, codec=codec, context=context, stamp=STAMP), repetitions),
        "decode_s": best_s(opened, repetitions),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="bytes and time of sparse updates")
    parser.add_argument("--quick", action="store_true", help="one density of each model, one repetition")
    add_options(parser)
    arguments = parser.parse_args()
    results = Results("sparse_uploads", arguments)
    torch.set_num_threads(1)
    rows = []
    for model, (tensors, roles) in models().items():
        for density in (0.05,) if arguments.quick else PAPER_MB[model]:
            repetitions = 1 if arguments.quick else 5
            key = f"{model}, {density}"
            rows.append(results.row(key, rows_of, model, tensors, roles, density, repetitions=repetitions))
    results.finish({"rows": rows})


if __name__ == "__main__":
    main()
