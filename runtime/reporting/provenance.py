"""What weights were trained on, as their file says, and whether that is what the devices of a run hold."""

from collections.abc import Mapping

from ...learning.data.config import DataConfig
from ...learning.workload import Workload
from ...learning.workload_settings import Initialisation


def describe_init(workload: Workload) -> dict[str, str]:
    """Where the first model came from, for people: ``mode``; ``weights`` (the file's name), the ``hash`` of its tensors.

    ``trunk``: the last block taken over, of mode partial. ``random``: tensors that the file had in another shape, of mode
    holistic.
    """
    init = workload.settings.init
    if init.mode == "random":
        return {"mode": init.mode}
    told = {"mode": init.mode, "weights": init.file.name if init.file else str(init.weights), "hash": str(init.hash)}
    if init.mode == "partial":
        told["trunk"] = init.trunk or workload.spec.block_names[0]
    return told | ({"random": ", ".join(workload.left_random)} if workload.left_random else {})


def provenance(init: Initialisation) -> dict[str, str]:
    """What the file of the weights says about itself; empty where it says nothing."""
    from safetensors import safe_open

    if init.file is None:
        return {}
    with safe_open(init.file, framework="pt") as opened:
        return dict(opened.metadata() or {})


def seen_samples(origin: Mapping[str, str], config: DataConfig, digest: str) -> str:
    """A sentence when weights of that origin were trained on samples that devices have; "" when not, or not known.

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
