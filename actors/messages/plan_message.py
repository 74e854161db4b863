"""The control message down: a plan without its default values, deflated with a dictionary that both ends know."""

import zlib
from typing import Any

import msgspec

from ...comms.codec import CodecSpec
from ...comms.links.predict import Residual
from ...learning.parts.part import Part
from ...learning.spec import Optimiser, Training
from ...policies.plan import Objective, Plan, Split, Upload

_DEFAULTS: dict[str, Any] = msgspec.to_builtins(Training())
# msgspec omits a string only if it is the default object itself, not if it is equal to it (one from another process).
_SPLIT_DEFAULTS: dict[str, Any] = {field.name: field.default for field in msgspec.structs.fields(Split)}
_MOST_BYTES = 1 << 22  # of a plan, inflated


def plan_message(plan: Plan) -> bytes:
    """The bytes of a plan: without its reasons, which are for people, without default values, deflated.

    The dictionary is the message of a typical plan. A plan of some 650 bytes takes about 150.
    """
    deflater = zlib.compressobj(9, zlib.DEFLATED, -15, zdict=_DICTIONARY)
    return deflater.compress(_encode(plan)) + deflater.flush()


def read_plan(message: bytes) -> Plan:
    """The plan in a message; raises ``ValueError`` for a message that cannot be read."""
    inflater = zlib.decompressobj(-15, zdict=_DICTIONARY)
    try:
        return msgspec.msgpack.decode(inflater.decompress(message, _MOST_BYTES), type=Plan)
    except (zlib.error, msgspec.DecodeError, RecursionError) as error:
        raise ValueError(f"a plan's message of {len(message)} bytes cannot be read: {error}") from error


def _encode(plan: Plan) -> bytes:
    """The fields of a plan that differ from their defaults."""
    plain = msgspec.to_builtins(msgspec.structs.replace(plan, reasons=()))
    plain["training"] = _without_defaults(plain["training"], _DEFAULTS)
    if "optimiser" in plain["training"]:
        plain["training"]["optimiser"] = _without_defaults(plain["training"]["optimiser"], _DEFAULTS["optimiser"])
    if "split" in plain:
        plain["split"] = _without_defaults(plain["split"], _SPLIT_DEFAULTS)
    return msgspec.msgpack.encode(plain)


def _without_defaults(plain: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """The fields of a structure whose values differ from ``defaults``."""
    return {key: value for key, value in plain.items() if value != defaults[key]}


def _typical_plan() -> bytes:
    """The message of a typical plan: the compressor's dictionary. (Deflate reaches what stands last with the fewest bits.)"""
    stages = (
        CodecSpec("topk", {"density": 0.007, "scope": "global"}),
        CodecSpec("ternary", {"levels": 1, "scope": "global"}),
        CodecSpec("uniform", {"bits": 8, "roles": ["vector", "statistic"]}),
        CodecSpec("entropy"),
    )
    plan = Plan(
        id=1,
        device=1,
        version=1,
        part=Part(blocks=("features.0",), trained=("features.0",)),
        training=Training(
            optimiser=Optimiser(learning_rate=0.01, nesterov=True, weight_decay=0.1, clip_norm=1.0, proximal=0.1),
            epochs=2,
            steps=1,
            batch_size=64,
            accumulation=2,
            precision="bf16",
            layout="channels_last",
        ),
        seed=1 << 62,
        attempt=1,
        objective=Objective(kind="evaluate"),
        upload=Upload(statistics=False),
        codec_down=stages,
        codec_up=stages,
        link_down=Residual(rule="stationary", feedback=True),
        link_up=Residual(rule="delta", feedback=True),
        acknowledged=1,
        deadline_s=1.0,
    )
    return _encode(plan)


_DICTIONARY = _typical_plan()
