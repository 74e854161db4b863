"""Forged checkpoints: correct hashes around a mutated graph."""

import copy
import random
from typing import Any

import msgspec
import numpy as np
import safetensors.numpy
from fedbonsai.runtime.checkpointing.folder import data_name
from fedbonsai.runtime.checkpointing.types import CONTAINERS, DATACLASSES, ENUMS, STRUCTS

TAGS = [*CONTAINERS, *ENUMS, *STRUCTS, *DATACLASSES, "array", "tensor", "stored"]
SCALARS = [None, True, -1, 0, 1, 2**63 - 1, -(2**63), 2**64 - 1, 0.5, -1e308, float("nan"), float("inf"), "", "x", b"", b"\xc1",
           "x" * 10_000, "0" * 32 + ".data"]  # fmt: skip
ARRAYS = [np.zeros(0), np.zeros((2, 3), np.float32), np.zeros(5, np.uint8), np.array(1), np.full(4, -1, np.int64)]


def graph(folder, manifest) -> tuple[Any, list[list[Any]]]:
    """The root and the nodes of a checkpoint's graph."""
    root, nodes = msgspec.msgpack.decode((folder / manifest.root).read_bytes())
    return root, nodes


def forge(folder, manifest, data: bytes):
    """Write these bytes as a graph, and a manifest that names it, with correct hashes."""
    name = data_name(data)
    (folder / name).write_bytes(data)
    forged = msgspec.structs.replace(manifest, root=name, files={**manifest.files, name: len(data)})
    (folder / forged.name).write_bytes(forged.encode())
    return forged


def mutated(root: Any, nodes: list[list[Any]], seed: int) -> tuple[str, bytes]:
    """A graph with one or two random changes: their description, and the bytes."""
    draw, nodes = random.Random(seed), copy.deepcopy(nodes)
    changes = [draw.choice(MUTATIONS)(draw, nodes) for _ in range(draw.choice([1, 1, 1, 2]))]
    return "; ".join(changes), msgspec.msgpack.encode([root, nodes])


def _place(draw: random.Random, nodes: list[list[Any]]) -> tuple[list[Any], int]:
    """A node that is not empty, and an index in it after its tag."""
    node = draw.choice([node for node in nodes if len(node) > 1])
    return node, draw.randrange(1, len(node))


def _scalar(draw, nodes):
    node, place = _place(draw, nodes)
    before, node[place] = node[place], draw.choice(SCALARS)
    return f"{node[0]}[{place}]: {str(before)[:30]} is {str(node[place])[:30]!r}"


def _reference(draw, nodes):
    node, place = _place(draw, nodes)
    node[place] = [
        draw.choice([draw.randrange(len(nodes)), nodes.index(node), len(nodes), -1, 2**40, 0.5, "0", True, None])
    ]
    return f"{node[0]}[{place}] is node {node[place]}"


def _number(draw, nodes):
    places = [
        (n, p) for n in nodes for p in range(1, len(n)) if isinstance(n[p], int | float) and not isinstance(n[p], bool)
    ]
    node, place = draw.choice(places)
    before, node[place] = node[place], draw.choice([-1, 0, 1, 7, node[place] / -2, node[place] // 2, 10**15])
    return f"{node[0]}[{place}]: {before} is {node[place]}"


def _tag(draw, nodes):
    node, _ = _place(draw, nodes)
    before, node[0] = node[0], draw.choice([*TAGS, "os:system", "fedbonsai.actors.pool:Task", "", 3, None])
    return f"{before} is {node[0]!r}"


def _less(draw, nodes):
    node, place = _place(draw, nodes)
    del node[place]
    return f"{node[0]} without [{place}]"


def _twice(draw, nodes):
    node, place = _place(draw, nodes)
    node.insert(place, node[place])
    return f"{node[0]} with [{place}] twice"


def _swapped(draw, nodes):
    one, other = (draw.randrange(len(nodes)) for _ in range(2))
    nodes[one], nodes[other] = nodes[other], nodes[one]
    return f"nodes {one} and {other} change places"


def _bytes(draw, nodes):
    places = [
        (node, place)
        for node in nodes
        for place in range(1, len(node))
        if isinstance(node[place], bytes) and node[place]
    ]
    node, place = draw.choice(places)
    data = bytearray(node[place])
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    node[place] = bytes(data[: draw.choice([len(data), len(data), len(data) // 2])])
    return f"{node[0]}: a bit of its bytes"


def _array(draw, nodes):
    node = draw.choice([node for node in nodes if node[0] in ("array", "tensor")])
    node[1:] = [safetensors.numpy.save({"": draw.choice(ARRAYS)})]
    return f"another {node[0]}"


MUTATIONS = [_scalar, _reference, _number, _number, _tag, _less, _twice, _swapped, _bytes, _array]
