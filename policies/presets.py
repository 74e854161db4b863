"""Presets: named methods, each as the part of the configuration that it sets.

A preset is data, not code: the runtime merges its ``overrides`` under the user's settings, so a user's YAML and ``--set`` take
precedence. A new method is a row of ``PRESETS``.
"""

import copy
import difflib
from typing import Any

import msgspec


class Preset(msgspec.Struct, frozen=True, kw_only=True):
    """``description``: one line for the list of presets. ``source``: publication of the method, "" when it has none.

    ``overrides``: nested dictionaries in the shape of the configuration.
    """

    description: str
    source: str = ""
    overrides: dict[str, Any]


# Of HeteroFL and FedRolex: shares of the channels, without a floor, and activations scaled while training.
_STATIC_LEVELS: dict[str, Any] = {
    "name": "width",
    "levels": [1.0, 0.5, 0.25, 0.125, 0.0625],
    "unit": "width",
    "min_channels": 1,
    "scaled": True,
}

PRESETS: dict[str, Preset] = {
    "fedavg": Preset(
        description="every device trains the whole model; a policy.0.cohort below 1.0 draws that share at random",
        source="McMahan et al. 2017, arXiv 1602.05629",
        overrides={"policy": [{"name": "random", "cohort": 1.0}]},
    ),
    "fedprox": Preset(
        description="FedAvg with a proximal term that keeps local models near the global one",
        source="Li et al. 2020, arXiv 1812.06127",
        overrides={
            "policy": [{"name": "random", "cohort": 1.0}],
            "training": {"optimiser": {"proximal": 0.01}},
        },
    ),
    "fastest": Preset(
        description="the half of the devices that are estimated to finish first: a bound on speed, not on accuracy",
        overrides={"policy": [{"name": "fastest", "cohort": 0.5}]},
    ),
    "deadline": Preset(
        description="only devices that are estimated to finish within 180 s, and rounds that close then (FedCS)",
        source="Nishio and Yonetani 2019, arXiv 1804.08333",
        overrides={"policy": [{"name": "deadline", "deadline_s": 180.0}, {"name": "closing", "after_s": 180.0}]},
    ),
    "partial_work": Preset(
        description="every device takes part; rounds close after 180 s, and slower devices send what they have by then",
        source="after Li et al. 2020, arXiv 1812.06127",
        overrides={
            "policy": [{"name": "random", "cohort": 1.0}, {"name": "closing", "after_s": 180.0, "partial": True}]
        },
    ),
    "over_selection": Preset(
        description="more devices than are needed, and rounds that close when 77 % of them have delivered",
        source="Bonawitz et al. 2019, arXiv 1902.01046",
        overrides={"policy": [{"name": "random", "cohort": 1.0}, {"name": "closing", "at": 0.77}]},
    ),
    "power_of_choice": Preset(
        description="of 60 % drawn by data size, the 30 % of all devices with the highest last known loss",
        source="Cho et al. 2020, arXiv 2010.01243",
        overrides={"policy": [{"name": "power_of_choice", "cohort": 0.3, "candidates": 0.6}]},
    ),
    "oort": Preset(
        description="the 30 % of the devices with the highest utility for the time they take, with exploration and a pacer",
        source="Lai et al. 2021, arXiv 2010.06081",
        overrides={"policy": [{"name": "oort", "cohort": 0.3}]},
    ),
    "fedasync": Preset(
        description="asynchronous: every update closes a version, and counts less the later it arrives",
        source="Xie et al. 2019, arXiv 1903.03934",
        overrides={
            "policy": [{"name": "asynchronous", "concurrency": 1.0, "buffer": 1}],
            "server": {"optimiser": {"learning_rate": 0.6}, "staleness": {"rule": "polynomial", "a": 0.5}},
        },
    ),
    "fedbuff": Preset(
        description="asynchronous: every four updates close a version, and count less the later they arrive",
        source="Nguyen et al. 2022, arXiv 2106.06639",
        overrides={
            "policy": [{"name": "asynchronous", "concurrency": 1.0, "buffer": 4}],
            "server": {"staleness": {"rule": "polynomial", "a": 0.5}},
        },
    ),
    "resfed": Preset(
        description="both directions as residuals against shared predictions: 0.7 % of the entries, entropy coded",
        source="Song et al. 2024, arXiv 2212.05602",
        overrides={
            "policy": [{"name": "random", "cohort": 1.0}, {"name": "residuals"}],
            # Running statistics belong to a device's own weights: in a model rebuilt from 1 % of its update they are wrong.
            "server": {"statistics": "batch"},
        },
    ),
    "splitfed": Preset(
        description="every device keeps the first blocks and a partition host trains the rest; gradients come back",
        source="Thapa et al. 2022, arXiv 2004.12088",
        overrides={"policy": [{"name": "random", "cohort": 1.0}, {"name": "splitfed"}]},
    ),
    "local_loss": Preset(
        description="as splitfed, but devices train their blocks by a loss of their own: no gradient comes back",
        source="Han et al. 2021; Wu et al. 2024, arXiv 2304.05495",
        overrides={"policy": [{"name": "random", "cohort": 1.0}, {"name": "local_loss"}]},
    ),
    "ecofed": Preset(
        description="a frozen trunk: devices send coded activations every other round, partition hosts replay them between",
        source="Wu et al. 2024, arXiv 2304.05495",
        overrides={"policy": [{"name": "random", "cohort": 1.0}, {"name": "ecofed"}]},
    ),
    "reft": Preset(
        description="slow devices hold only as many channels as they train in the median time; updates teach the mean model",
        source="Desai et al. 2024, arXiv 2308.13662",
        overrides={
            "policy": [
                {"name": "random", "cohort": 1.0},
                {"name": "width", "rule": "deadline", "channels": "l1", "too_slow": "fewer_steps"},
                {"name": "distillation", "steps": 300, "class_prior": 1.0},
            ],
            "data": {"public_share": 0.1},
        },
    ),
    "profl": Preset(
        description="block by block, shrinking and then growing: devices train what fits their memory, behind frozen blocks",
        source="Wu, Li and Xu 2025, arXiv 2404.13349",
        overrides={"policy": [{"name": "all"}, {"name": "profl"}, {"name": "random", "cohort": 1.0}]},
    ),
    "exclusive": Preset(
        description="only devices whose memory fits the training of the whole model take part",
        source="the baseline ExclusiveFL of Wu, Li and Xu 2025, arXiv 2404.13349",
        overrides={"policy": [{"name": "random", "cohort": 1.0}]},
    ),
    "all_small": Preset(
        description="one narrow model for all devices, which the one with the least memory can train",
        source="the baseline AllSmall of Wu, Li and Xu 2025, arXiv 2404.13349",
        overrides={
            "policy": [{"name": "random", "cohort": 1.0}, {"name": "all_small"}],
            "server": {"statistics": "batch"},
        },
    ),
    "zerofl": Preset(
        description="layers train with a tenth of their weights, and updates hold the largest 30 % of them",
        source="Qiu et al. 2022, arXiv 2208.02507",
        overrides={
            "policy": [{"name": "random", "cohort": 1.0}, {"name": "zerofl"}],
            # The paper's rate for CIFAR-10: with a tenth of the weights, gradients are smaller.
            "training": {"optimiser": {"learning_rate": 0.1}, "sparsity": {"weights": 0.9, "activations": 0.9}},
        },
    ),
    "heterofl": Preset(
        description="slow devices train the first 1/2, 1/4, 1/8 or 1/16 of the channels, by what they can in the median time",
        source="Diao et al. 2021, arXiv 2010.01264",
        overrides={
            "policy": [{"name": "random", "cohort": 1.0}, _STATIC_LEVELS | {"channels": "prefix"}],
            # Its "static batch normalisation": running statistics of different widths have no common mean.
            "server": {"statistics": "batch"},
        },
    ),
    "fedrolex": Preset(
        description="as heterofl, but the channels are a window that moves on by one each round",
        source="Alam et al. 2022, arXiv 2212.01548",
        overrides={
            "policy": [{"name": "random", "cohort": 1.0}, _STATIC_LEVELS | {"channels": "rolling", "refresh": 1}],
            "server": {"statistics": "batch"},
        },
    ),
}


def find_preset(name: str) -> Preset:
    """The preset of that name; a copy, so that the caller may merge into its overrides.

    Raises ``ValueError`` listing all names for one that does not exist.
    """
    if name not in PRESETS:
        close = difflib.get_close_matches(name, PRESETS, n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise ValueError(f"preset is {name!r}{hint}; allowed: {', '.join(PRESETS)}")
    return copy.deepcopy(PRESETS[name])
