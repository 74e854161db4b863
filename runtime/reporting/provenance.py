"""Provenance of initial weights: what they were trained on, and whether devices of the run hold those samples."""

from collections.abc import Mapping

from ...learning.data.config import DataConfig
from ...learning.workload import Workload
from ...learning.workload_settings import Initialisation


def describe_init(workload: Workload) -> dict[str, str]:
    """Where the initial model came from: ``mode``; ``weights`` (the file's name), ``hash`` of its tensors.

    ``trunk`` (mode partial): the last block that was taken over. ``random`` (mode holistic): tensors that the file has in
    another shape.
    """
    init = workload.settings.init
    if init.mode == "random":
        return {"mode": init.mode}
    described = {
        "mode": init.mode,
        "weights": init.file.name if init.file else str(init.weights),
        "hash": str(init.hash),
    }
    if init.mode == "partial":
        described["trunk"] = init.trunk or workload.spec.block_names[0]
    return described | ({"random": ", ".join(workload.left_random)} if workload.left_random else {})


def provenance(init: Initialisation) -> dict[str, str]:
    """The metadata of the file of weights; empty if there is none."""
    from safetensors import safe_open

    if init.file is None:
        return {}
    with safe_open(init.file, framework="pt") as opened:
        return dict(opened.metadata() or {})


def overlap_notice(origin: Mapping[str, str], config: DataConfig, digest: str) -> str:
    """A notice if weights with this metadata were trained on samples that devices hold; "" if not, or if it is unknown.

    ``digest``: hash of the run's data.
    """
    if origin.get("data_digest") != digest:
        return ""
    share, seed = float(origin.get("public_share", 1)), int(origin.get("public_seed", 0))
    if share <= config.public_share and seed == config.public_seed:
        return ""
    whole_set = f"{share:g} of these very data" if share < 1 else "all of these very data"
    return (
        f"init.weights were trained on {whole_set} (public_seed {seed}), of which devices have samples, since "
        f"data.public_share is {config.public_share:g} (public_seed {config.public_seed})"
    )
