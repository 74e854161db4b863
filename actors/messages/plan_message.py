"""The control message down: a plan, as few bytes as both ends' knowledge of what plans are like allows."""

import zlib
from typing import Any

import msgspec

from ...comms.codec import CodecSpec
from ...comms.links.predict import Residual
from ...learning.parts.part import Part
from ...learning.spec import Optimiser, Training
from ...policies.plan import Objective, Plan, Split, Upload

_DEFAULT: dict[str, Any] = msgspec.to_builtins(Training())
# msgspec omits what *is* the default: not a word equal to it, such as one that came from another process.
_SPLIT: dict[str, Any] = {field.name: field.default for field in msgspec.structs.fields(Split)}
_MOST_BYTES = 1 << 22  # of a plan, inflated


def plan_message(plan: Plan) -> bytes:
    """A plan as it travels: without the reasons, which are for people, without settings that are the default, deflated.

    Both ends know what plans are like: the dictionary holds the words of one. A plan of some 650 bytes comes to about 150.
    """
    deflater = zlib.compressobj(9, zlib.DEFLATED, -15, zdict=_DICTIONARY)
    return deflater.compress(_spell(plan)) + deflater.flush()


def read_plan(message: bytes) -> Plan:
    """The plan in a message; raises ``ValueError`` for one that cannot be read."""
    inflater = zlib.decompressobj(-15, zdict=_DICTIONARY)
    try:
        return msgspec.msgpack.decode(inflater.decompress(message, _MOST_BYTES), type=Plan)
    except (zlib.error, msgspec.DecodeError, RecursionError) as error:
        raise ValueError(f"a plan's message of {len(message)} bytes cannot be read: {error}") from error


def _spell(plan: Plan) -> bytes:
    """What a plan says beyond the defaults."""
    plain = msgspec.to_builtins(msgspec.structs.replace(plan, reasons=()))
    plain["training"] = _changed(plain["training"], _DEFAULT)
    if "optimiser" in plain["training"]:
        plain["training"]["optimiser"] = _changed(plain["training"]["optimiser"], _DEFAULT["optimiser"])
    if "split" in plain:
        plain["split"] = _changed(plain["split"], _SPLIT)
    return msgspec.msgpack.encode(plain)


def _changed(plain: dict[str, Any], default: dict[str, Any]) -> dict[str, Any]:
    """What of a structure is not as in ``default``."""
    return {key: value for key, value in plain.items() if value != default[key]}


def _typical() -> bytes:
    """The words that plans are made of, the most frequent last."""
    stages = (
        CodecSpec("topk", {"density": 0.01, "scope": "global"}),
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
            channels_last=True,
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
    return _spell(plan)


_DICTIONARY = _typical()
