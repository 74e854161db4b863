"""Where the checkpoints of a run go, and the one that it goes on from: worked out by the driver, carried out by the server."""

from dataclasses import dataclass
from typing import Any

from ..checkpointing.checkpoints import Checkpoints
from ..checkpointing.folder import Manifest
from ..configuration.config import CheckpointSettings
from ..storage.files import open_files


@dataclass(frozen=True)
class SavePlan:
    """Where checkpoints of a run go and when; and, of one that is resumed, the one that it goes on from, and what to tell.

    ``run``: names what must be equal in all runs that share a checkpoint. ``token``: of the place, which was claimed.
    """

    place: str
    settings: CheckpointSettings
    run: str
    token: str = ""
    manifest: Manifest | None = None
    notices: tuple[str, ...] = ()


def open_checkpoints(plan: SavePlan, *, channel: Any) -> Checkpoints:
    """The checkpoints of a plan's place. Raises ``ValueError``."""
    files = open_files(plan.place)
    return Checkpoints(files, channel=channel, run=plan.run, settings=plan.settings, token=plan.token)
