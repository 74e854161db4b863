"""Bytes, ratios and speed of the residual codecs, compared with the order-0 entropy of the symbols and with other coders.

Rows, each with both entropy coders: all weights of ``resfed_cnn`` at 8 and at 4 bits, and its largest 10 %, 1 % and 0.25 %
with one level for each sign. Inputs: ``synthetic`` (independent normal values, for which order 0 is the optimum) and
``real`` (the update of one local epoch on five of ten classes, from a pre-trained model: on CIFAR-10 in ``--data``, else on
digits scaled to its size).

    bytes               of a sealed packet of the weights, with frame and headers
    order0_bytes        entropy of the symbols' histogram: of each tensor (dense), of all together (top-k)
    ratio               float32 bytes of the weights divided by ``bytes``
    whole_message_bytes of a sealed packet of all tensors, vectors and statistics at 8 bits; whole_message_ratio likewise
    encode_MBps         float32 megabytes of the weights per second: selection, quantisation, coding, sealing
    decode_MBps         likewise, from the packet to tensors
    coder_MBps          the entropy coder alone, from symbols to bytes; coder_decode_MBps: from bytes to symbols
    max_abs_error       largest difference between a weight and its reconstruction

Speeds are of one core, in the processor time of the thread, best of several repetitions. ``rivals``: bytes that other
coders need for the same symbols, without a frame: zlib at its best level on bytes and on packed symbols, lz4 on bytes, and
Golomb-Rice gaps with a bit for the sign, by the closed form of Sparse Ternary Compression (arXiv 1903.02891, eq. 14). ResFed's
own count (arXiv 2212.05602) gives a ratio of 710 at 0.25 %. Aim of the coder: 200 MB/s.

    python benchmarks/codecs.py --quick                 less training, fewer repetitions
    python benchmarks/codecs.py --data ROOT --save
"""

import argparse
import time
import zlib
from collections.abc import Callable
from typing import Any

import lz4.block
import numpy as np
import torch
from common import Results, add_options
from fedbonsai.clusters.processor import emulates_bf16, numerics_here
from fedbonsai.comms.codec import Array, Arrays, Codec, CodecSpec, Context, specs_of
from fedbonsai.comms.codecs.make_codec import make_codec
from fedbonsai.comms.entropy.coders import constriction_runs
from fedbonsai.comms.packet import PacketKind, Stamp, seal, unseal
from fedbonsai.learning.data.config import CyclicClasses, DataConfig
from fedbonsai.learning.data.load import load
from fedbonsai.learning.data.types import Samples
from fedbonsai.learning.models.cnn import resfed_cnn
from fedbonsai.learning.spec import Call, Optimiser, Training
from fedbonsai.learning.training.losses import make_loss
from fedbonsai.learning.training.training import train

STAMP = Stamp(kind=PacketKind.UPDATE)
SETTINGS: dict[str, float | int] = {
    "dense 8 bit": 8,
    "dense 4 bit": 4,
    "top 10 %": 0.1,
    "top 1 %": 0.01,
    "top 0.25 %": 0.0025,
}
VECTORS = CodecSpec("uniform", {"bits": 8, "roles": ["vector", "statistic"]})


def lossy(setting: float) -> list[CodecSpec]:
    """The stages before the coder."""
    if setting > 1:
        return [CodecSpec("uniform", {"bits": setting, "roles": ["weight"]})]
    return [CodecSpec("topk", {"density": setting}), CodecSpec("ternary", {"levels": 1, "scope": "global"})]


def roles_of(model: torch.nn.Module) -> dict[str, str]:
    """Weight, vector or statistic for each floating-point tensor."""
    statistics = {name for name, buffer in model.named_buffers() if buffer.is_floating_point()}
    weights = {name for name, parameter in model.named_parameters() if parameter.dim() >= 2}
    names = [name for name, tensor in model.state_dict().items() if tensor.is_floating_point()]
    return {n: "statistic" if n in statistics else "weight" if n in weights else "vector" for n in names}


def state(model: torch.nn.Module) -> Arrays:
    """A copy of the floating-point tensors."""
    return {n: t.detach().clone().numpy() for n, t in model.state_dict().items() if t.is_floating_point()}


def synthetic(model: torch.nn.Module) -> Arrays:
    """Independent normal values in the model's shapes."""
    generator = np.random.default_rng(0)
    return {n: generator.standard_normal(a.shape).astype(np.float32) for n, a in state(model).items()}


def real(model: torch.nn.Module, root: str | None, *, warm: int, local: int) -> Arrays:
    """The update of a device's local epoch on ``local`` samples, after training on ``warm`` samples of all classes."""
    config = DataConfig(name="cifar10" if root else "digits", root=root, partition=CyclicClasses(classes_per_device=5))
    data = load(config, num_devices=10, seed=0)
    shares = [data.train(device) for device in range(10)]
    everyone = Samples(torch.cat([s.x for s in shares]), torch.cat([s.y for s in shares]))
    order = np.random.default_rng(0).permutation(len(everyone))
    training = Training(
        optimiser=Optimiser(learning_rate=0.01, momentum=0.9),
        batch_size=64,
        precision="float32" if emulates_bf16(numerics_here()) else "bf16",
        layout="channels_last",
    )

    def images(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        x = data.test_transform(x, generator)
        if x.shape[-1] != 32:  # digits: 8 x 8, one channel
            x = torch.nn.functional.interpolate(x, size=(32, 32)).expand(-1, 3, -1, -1)
        return x

    def epoch(samples: Samples) -> None:
        train(model, samples, training=training, loss=make_loss(Call("cross_entropy")), transform=images, seed=1)

    epoch(everyone.take(order[:warm]))
    before = state(model)
    epoch(shares[0].take(np.arange(min(local, len(shares[0])))))
    return {name: array - before[name] for name, array in state(model).items()}


def entropy_bytes(values: Array) -> float:
    """Order-0 entropy of these values, in bytes."""
    shares = np.unique(values, return_counts=True)[1] / values.size
    return float(-values.size * (shares * np.log2(shares)).sum() / 8)


def best_s(action: Callable[[], Any], repetitions: int) -> float:
    """Processor seconds of the fastest repetition."""
    times = []
    for _ in range(repetitions):
        start = time.thread_time()
        action()
        times.append(time.thread_time() - start)
    return min(times)


def rivals(symbols: Arrays, setting: float) -> dict[str, int]:
    """Bytes of the same symbols with other coders."""
    flat = np.concatenate([array.reshape(-1) for array in symbols.values()])
    raw = flat.view(np.uint8)
    bits = 8 if setting == 8 else 4 if setting > 1 else 2
    planes = np.unpackbits(raw[:, None], axis=1)[:, -bits:]  # the low bits in two's complement
    found = {
        "zlib9": len(zlib.compress(raw.tobytes(), 9)),
        "zlib9_packed": len(zlib.compress(np.packbits(planes).tobytes(), 9)),
        "lz4": len(lz4.block.compress(raw.tobytes(), store_size=False)),
    }
    if setting < 1:
        share = np.count_nonzero(flat) / flat.size
        low = max(0, 1 + int(np.floor(np.log2(np.log((np.sqrt(5) - 1) / 2) / np.log(1 - share)))))
        found["golomb"] = round(np.count_nonzero(flat) * (low + 1 / (1 - (1 - share) ** (2**low)) + 1) / 8)
    return found


def symbols_of(weights: Arrays, roles: dict[str, str], setting: float) -> Arrays:
    """What the entropy coder codes."""
    symbols, _ = make_codec(tuple(lossy(setting))).encode(weights, context=Context(roles=roles))
    return {name: symbols[name] for name in weights}


def weights_in(tensors: Arrays, roles: dict[str, str]) -> Arrays:
    """The tensors whose role is weight."""
    return {name: array for name, array in tensors.items() if roles[name] == "weight"}


def measure(tensors: Arrays, roles: dict[str, str], *, setting: float, coder: str, repetitions: int) -> dict[str, Any]:
    """One row."""
    context = Context(roles=roles)
    weights = weights_in(tensors, roles)
    entropy = CodecSpec("entropy", {"coder": coder})
    codec = make_codec((*lossy(setting), entropy))
    packet, held = seal(weights, codec=codec, context=context, stamp=STAMP)
    expected = specs_of(weights, roles)

    def opened(data: Array, whole: Codec, specs: Any) -> Arrays:
        return unseal(data, codec=whole, expected=specs, context=context)

    received = opened(packet, codec, expected)
    assert all(np.array_equal(received[name], held[name]) for name in weights), "the ends differ"
    message = make_codec((*lossy(setting), VECTORS, entropy))
    whole, _ = seal(tensors, codec=message, context=context, stamp=STAMP)
    symbols = symbols_of(weights, roles, setting)
    only, specs = make_codec((entropy,)), specs_of(symbols, roles)
    coded, _ = only.encode(symbols, context=context)
    if setting > 1:
        order0 = sum(entropy_bytes(array) for array in symbols.values())
    else:
        order0 = entropy_bytes(np.concatenate([array.reshape(-1) for array in symbols.values()]))
    size = sum(array.nbytes for array in weights.values())

    def speed(action: Callable[[], Any]) -> float:
        return round(size / 1e6 / best_s(action, repetitions), 1)

    return {
        "coder": coder,
        "bytes": packet.nbytes,
        "order0_bytes": round(order0),
        "of_order0": round(packet.nbytes / order0, 4),
        "ratio": round(size / packet.nbytes, 1),
        "whole_message_bytes": whole.nbytes,
        "whole_message_ratio": round(sum(array.nbytes for array in tensors.values()) / whole.nbytes, 1),
        "encode_MBps": speed(lambda: seal(weights, codec=codec, context=context, stamp=STAMP)),
        "decode_MBps": speed(lambda: opened(packet, codec, expected)),
        "coder_MBps": speed(lambda: only.encode(symbols, context=context)),
        "coder_decode_MBps": speed(lambda: only.decode(coded, expected=specs, context=context)),
        "max_abs_error": float(f"{max(np.abs(held[n] - a).max() for n, a in weights.items()):.3g}"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="bytes and speed of the residual codecs")
    parser.add_argument("--quick", action="store_true", help="less training, fewer repetitions")
    parser.add_argument("--data", help="torchvision root with CIFAR-10; digits without")
    add_options(parser)
    arguments = parser.parse_args()
    results = Results("codecs", arguments)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = resfed_cnn()
    roles = roles_of(model)
    warm, local = (1_280, 2_500) if arguments.quick else (20_000, 5_000)
    inputs = {"synthetic": synthetic(model), "real": real(model, arguments.data, warm=warm, local=local)}
    rows, others = [], []
    for name, setting in SETTINGS.items():
        for source, tensors in inputs.items():
            for coder in ("ans", "rans") if constriction_runs() else ("rans",):
                row = results.row(
                    f"{name}, {source}, {coder}",
                    measure,
                    tensors,
                    roles,
                    setting=setting,
                    coder=coder,
                    repetitions=3 if arguments.quick else 10,
                )
                rows.append({"setting": name, "input": source, **row})
            symbols = symbols_of(weights_in(tensors, roles), roles, setting)
            found = results.row(f"{name}, {source}, other coders", rivals, symbols, setting)
            others.append({"setting": name, "input": source, **found})
    results.finish({"data": "cifar10" if arguments.data else "digits", "rows": rows, "rivals": others})


if __name__ == "__main__":
    main()
