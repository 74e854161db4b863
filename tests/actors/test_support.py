from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from fedbonsai.actors.support import PlanRefused, check_plan
from fedbonsai.clusters.profile import DeviceProfile
from fedbonsai.comms.codec import CodecSpec
from fedbonsai.learning.parts.blocks import Blocks
from fedbonsai.learning.parts.part import Part, whole
from fedbonsai.learning.parts.structure import BlockSpec, ModelSpec, TensorSpec
from fedbonsai.learning.parts.submodel import SubModel
from fedbonsai.learning.spec import Sparsity, Training
from fedbonsai.policies.plan import Objective, Plan, Split, Upload
from torch import nn

SPEC = ModelSpec(
    (
        BlockSpec("conv", (TensorSpec("w", (2, 2), "<f4", "weight"), TensorSpec("mean", (2,), "<f4", "statistic"))),
        BlockSpec("fc", (TensorSpec("v", (2, 2), "<f4", "weight"),)),
    ),
    auxiliary=lambda name: BlockSpec(name, (TensorSpec(f"{name}.weight", (2, 2), "<f4", "weight"),)),
)
PROXY = "proxy@conv..conv"
LAST = "proxy@fc..fc"
WHOLE = whole(SPEC)
PLAN = Plan(id=1, device=4, version=7, part=WHOLE, training=Training(), seed=0)
PHONE = DeviceProfile(name="phone", flop_per_s=1e9, memory_bytes=1, up_bytes_per_s=1, down_bytes_per_s=1)
LZ4 = (CodecSpec("lz4"),)


class FakeWorkload:
    """Two families of models, of which only the structure is known."""

    families = ("", "tiny")
    settings = SimpleNamespace(sparsity=None)

    spec = SPEC

    def family(self, name: str) -> "FakeWorkload":
        assert name in self.families
        return self

    @property
    def groups(self) -> None:
        raise ValueError("this model cannot be narrowed: it has no channels")

    def submodel(self, part: Part) -> SubModel:
        return SubModel(part, Blocks(nn.Identity(), {}, SPEC), SPEC)


def check(plan: dict[str, Any], profile: dict[str, Any] | None = None) -> None:
    check_plan(
        msgspec.structs.replace(PLAN, **plan), FakeWorkload(), profile=msgspec.structs.replace(PHONE, **(profile or {}))
    )


# what the plan and the profile have, and words of the sentence
Row = tuple[dict[str, Any], dict[str, Any], str]


def part(**changes: Any) -> dict[str, Any]:
    return {"part": msgspec.structs.replace(WHOLE, **changes)}


def may_send(*kinds: str) -> dict[str, Any]:
    return {"may_send": frozenset(kinds)}


FILLED_IN = "whole_steps, train_s or memory_bytes is set; the runtime fills them in"
REFUSED: dict[str, Row] = {
    "open precision": (
        {"training": Training(precision="auto")},
        {},
        "training.precision is 'auto'; of a plan it must be float32 or bf16",
    ),
    "open layout": (
        {"training": Training(layout="auto")},
        {},
        "training.layout is 'auto'; of a plan it must be contiguous or channels_last",
    ),
    "unknown block": (part(blocks=("conv", "head")), {}, "part names block 'head'; the model's blocks are: conv, fc"),
    "trained, not held": (part(blocks=("conv",)), {}, "part.trained names 'fc', which is not among part.blocks"),
    "half the model": (
        part(blocks=("conv",), trained=()),
        {},
        "part.blocks is conv; neither 'fc' nor a proxy for it is held",
    ),
    "no model": (part(blocks=(), trained=()), {}, "part.blocks is empty; neither 'conv' nor a proxy for it is held"),
    "another order": (part(blocks=("fc", "conv")), {}, "part.blocks is fc, conv; their order is: conv, fc"),
    "untrained, not held": (part(untrained=(PROXY,)), {}, f"part.untrained names {PROXY!r}, which is not among"),
    "a proxy of other blocks": (
        part(blocks=("fc",), trained=("fc",), auxiliaries=("proxy@x..conv",)),
        {},
        "part.auxiliaries names 'proxy@x..conv'; a proxy stands for neighbouring blocks of: conv, fc",
    ),
    "two proxies of one block": (
        part(blocks=("fc",), trained=("fc",), auxiliaries=(PROXY, "proxy@conv..fc")),
        {},
        f"part.auxiliaries names {PROXY!r} and 'proxy@conv..fc', which both stand for 'conv'",
    ),
    "a proxy of a block that is held": (
        part(auxiliaries=(LAST,)),
        {},
        f"part.auxiliaries names {LAST!r}, and the part holds blocks that it stands for",
    ),
    "a narrow part with frozen blocks": (
        part(trained=("fc",), width=0.5),
        {},
        "part.width is 0.5; a part with frozen blocks or proxies is of the global model, at the whole width",
    ),
    "frozen blocks of a family": (
        part(trained=("fc",), model="tiny"),
        {},
        "part.model is 'tiny'; a part with frozen blocks or proxies is of the global model, at the whole width",
    ),
    "imitation of other blocks than the last": (
        part(trained=(), auxiliaries=(PROXY,)) | {"objective": Objective(kind="imitate")},
        {},
        f"part.auxiliaries is {PROXY}; the one proxy that learns to imitate blocks stands for the last ones of part.blocks",
    ),
    "imitation by a proxy that is not trained": (
        part(trained=(), auxiliaries=(LAST,), untrained=(LAST,)) | {"objective": Objective(kind="imitate")},
        {},
        "the one proxy that learns to imitate blocks stands for the last ones",
    ),
    "imitation without the first blocks": (
        part(blocks=("fc",), trained=(), auxiliaries=(LAST,)) | {"objective": Objective(kind="imitate")},
        {},
        "part.blocks is fc; to imitate, a part holds the first blocks, and trains none",
    ),
    "collection of later blocks": (
        part(blocks=("fc",), trained=()) | {"objective": Objective(kind="collect")},
        {},
        "part.blocks is fc; to collect, a part holds the first blocks, and trains none",
    ),
    "collection with a proxy": (
        part(blocks=("conv",), trained=(), auxiliaries=(LAST,)) | {"objective": Objective(kind="collect")},
        {},
        f"part.auxiliaries names {LAST!r}; statistics are collected of blocks alone",
    ),
    "a split plan that collects": (
        part(blocks=("conv",), trained=("conv",))
        | {"split": Split(cut="conv"), "objective": Objective(kind="collect")},
        {},
        "objective.kind is 'collect'; a split plan trains or evaluates",
    ),
    "collected statistics are private": (
        part(blocks=("conv",), trained=())
        | {"objective": Objective(kind="collect"), "upload": Upload(statistics=False)},
        may_send("weights"),
        "it sends running statistics (upload.statistics is true, or it collects them), and",
    ),
    "the weights of a proxy are private": (
        part(trained=(), auxiliaries=(LAST,)) | {"objective": Objective(kind="imitate")},
        may_send("statistics"),
        "it sends weights, and",
    ),
    "width": (part(width=0.5), {}, "part.width is 0.5; this model cannot be narrowed"),
    "index map": (part(index_map="ab"), {}, "part.index_map is set; the runtime fills them in"),
    "head": (
        part(head="small"),
        {},
        "part.head is 'small'; without a local loss behind a cut the head is the model's own",
    ),
    "auxiliaries": (
        part(auxiliaries=("proxy",)),
        {},
        "part.auxiliaries names 'proxy'; a proxy stands for neighbouring blocks of: conv, fc",
    ),
    "cached": (part(cached=(("conv", "00"),)), {}, "part.cached, part.frozen or part.index_map is set"),
    "cut": ({"split": Split(cut="fc")}, {}, "split.cut is 'fc'; this model can be cut behind: conv"),
    "blocks of a cut": ({"split": Split(cut="conv")}, {}, "a plan cut behind 'conv' holds conv"),
    "a local loss without its head": (
        part(blocks=("conv",), trained=("conv",)) | {"split": Split(cut="conv", mode="local_loss")},
        {},
        "part.auxiliaries empty; a local loss behind 'conv' has the head 'linear@conv', its one auxiliary",
    ),
    "a local loss with another head": (
        part(blocks=("conv",), trained=("conv",), head="linear@fc", auxiliaries=("linear@fc",))
        | {"split": Split(cut="conv", mode="local_loss")},
        {},
        "part.head is 'linear@fc' and part.auxiliaries linear@fc; a local loss behind 'conv'",
    ),
    "one head for all views": (
        part(blocks=("conv",), trained=()) | {"split": Split(cut="conv", depth="conv", mode="ecofed", head="shared")},
        {},
        "split.head is 'shared'; under 'ecofed' every device has a copy of the host's blocks: 'slots'",
    ),
    "a trunk of a family": (
        part(blocks=("conv",), trained=(), model="tiny") | {"split": Split(cut="conv", depth="conv", mode="ecofed")},
        {},
        "part.model is 'tiny' under 'ecofed'; the frozen trunk is that of the global model",
    ),
    "one head for a narrow part": (
        part(blocks=("conv",), trained=("conv",), width=0.5) | {"split": Split(cut="conv", head="shared")},
        {},
        "part.width is 0.5 under 'splitfed' with head 'shared'; a cut model can be narrow only where each device has its own",
    ),
    "unknown family": (part(model="huge"), {}, "part.model is 'huge'; the families of models are: '', 'tiny'"),
    "no trunk": (
        part(blocks=("conv",), trained=()) | {"split": Split(cut="conv", mode="ecofed")},
        {},
        "split.depth is ''; the trunk ends at the cut or behind it, before the last block: conv",
    ),
    "a trained trunk": (
        part(blocks=("conv",), trained=("conv",)) | {"split": Split(cut="conv", depth="conv", mode="ecofed")},
        {},
        "part.trained is conv; a device trains nothing under 'ecofed'",
    ),
    "activations are private": (
        part(blocks=("conv",), trained=("conv",)) | {"split": Split(cut="conv")},
        may_send("weights", "labels", "statistics"),
        "it is split and sends activations, and",
    ),
    "sparsity": (
        {"training": Training(sparsity=Sparsity(weights=0.9))},
        {},
        "training.sparsity is set, and null in the configuration",
    ),
    "imitation": (
        {"objective": Objective(kind="imitate")},
        {},
        "to imitate, a part holds the first blocks, and trains none",
    ),
    "imitation without a proxy": (
        part(blocks=("conv",), trained=()) | {"objective": Objective(kind="imitate")},
        {},
        "part.auxiliaries is empty; the one proxy that learns to imitate blocks stands for the last ones of part.blocks",
    ),
    "collection of trained blocks": (
        {"objective": Objective(kind="collect")},
        {},
        "to collect, a part holds the first blocks",
    ),
    "selection of a model by the trained weights": (
        {"codec_down": (CodecSpec("topk", {"density": 0.1, "by": "reference"}), *LZ4)},
        {},
        "codec_down: by is 'reference', which selects by the trained weights; only an update can: use 'sent' here",
    ),
    "selection of activations by the trained weights": (
        part(blocks=("conv",), trained=("conv",))
        | {"split": Split(cut="conv", codec_up=(CodecSpec("topk", {"density": 0.1, "by": "reference"}),))},
        {},
        "split.codec_up: by is 'reference', which selects by the trained weights",
    ),
    "no time": ({"deadline_s": 0.0}, {}, "deadline_s is 0; it must be above 0"),
    "evaluation that stops early": (
        {"deadline_s": 2.5, "objective": Objective(kind="evaluate")},
        {},
        "deadline_s is 2.5; an evaluation cannot stop early",
    ),
    "a view that stops early": (
        part(blocks=("conv",), trained=())
        | {"deadline_s": 2.5, "split": Split(cut="conv", depth="conv", mode="ecofed")},
        {},
        "deadline_s is 2.5; under 'ecofed' a device uploads whole views, and cannot stop early",
    ),
    "steps that were cut down": ({"whole_steps": 5}, {}, FILLED_IN),
    "seconds of training": ({"train_s": 5.0}, {}, FILLED_IN),
    "a budget": ({"memory_bytes": 5}, {}, FILLED_IN),
    "codec down": (
        {"codec_down": LZ4},
        {"codecs": frozenset({"identity", "quantise"})},
        "codec_down names 'lz4', which does not run on fleet class 'phone'; it runs: identity, quantise",
    ),
    "codec up": ({"codec_up": LZ4}, {"codecs": frozenset()}, "codec_up names 'lz4', which does not run on"),
    "unknown codec": ({"codec_down": (CodecSpec("zstd"),)}, {}, "codec_down: unknown codec 'zstd'"),
    "codec option": ({"codec_up": (CodecSpec("lz4", {"level": 99}),)}, {}, "codec_up: codec 'lz4' with options"),
    "codecs in the wrong order": (
        {"codec_up": (*LZ4, CodecSpec("entropy"))},
        {},
        "codec_up: 'w' has no fixed shape; entropy must come before what made it",
    ),
    "weights are private": (
        {},
        may_send("logits", "labels"),
        "it sends weights, and fleet class 'phone' may send only: labels, logits",
    ),
    "all is private": ({}, may_send(), "may send only: nothing"),
    "statistics are private": ({}, may_send("weights"), "it sends running statistics (upload.statistics is true"),
}

ALLOWED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "the whole model": ({}, {}),
    "a frozen front": (part(trained=("fc",)), {}),
    "evaluation": ({"objective": Objective(kind="evaluate")}, may_send()),
    "codecs": ({"codec_down": LZ4, "codec_up": LZ4}, {}),
    "codecs that it runs": ({"codec_down": LZ4, "codec_up": LZ4}, {"codecs": frozenset({"lz4"})}),
    "weights alone": ({"upload": Upload(statistics=False)}, may_send("weights")),
    "no statistics in what is trained": (
        part(trained=("fc",)),
        may_send("weights"),
    ),
    "a proxy": (part(blocks=("fc",), trained=("fc",), auxiliaries=(PROXY,)), {}),
    "a proxy that is not trained": (
        part(blocks=("fc",), trained=("fc",), auxiliaries=(PROXY,), untrained=(PROXY,)),
        {},
    ),
    "imitation": (
        part(trained=(), auxiliaries=(LAST,)) | {"objective": Objective(kind="imitate")},
        may_send("weights"),
    ),
    "imitation of all blocks": (
        part(trained=(), auxiliaries=("proxy@conv..fc",)) | {"objective": Objective(kind="imitate")},
        {},
    ),
    "collection": (
        part(blocks=("conv",), trained=()) | {"objective": Objective(kind="collect")},
        may_send("statistics"),
    ),
    "evaluation of stages": (
        part(blocks=("conv",), trained=(), auxiliaries=(LAST,)) | {"objective": Objective(kind="evaluate")},
        may_send(),
    ),
    "weights up": ({"upload": Upload(payload="weights")}, {}),
    "a frozen trunk sends no weights": (
        part(blocks=("conv",), trained=()) | {"split": Split(cut="conv", depth="conv", mode="ecofed", window=4)},
        may_send("activations", "labels"),
    ),
    "bf16": ({"training": Training(precision="bf16", accumulation=4, layout="channels_last", steps=3)}, {}),
}


@pytest.mark.parametrize(("plan", "profile", "words"), REFUSED.values(), ids=REFUSED.keys())
def test_a_plan_that_cannot_be_carried_out_is_refused(
    plan: dict[str, Any], profile: dict[str, Any], words: str
) -> None:
    with pytest.raises(PlanRefused) as caught:
        check(plan, profile)
    sentence = str(caught.value)
    assert sentence.startswith("plan for device 4 in round 7: ")
    assert words in sentence
    assert "\n" not in sentence


@pytest.mark.parametrize(("plan", "profile"), ALLOWED.values(), ids=ALLOWED.keys())
def test_a_plan_that_can_be_carried_out_is_not(plan: dict[str, Any], profile: dict[str, Any]) -> None:
    check(plan, profile)
