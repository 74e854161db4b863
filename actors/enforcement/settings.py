"""The ``memory`` section of the configuration. Imports no torch: configuration and driver read it too."""

from typing import Annotated, Literal

import msgspec


class MemorySettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How memory is predicted, measured and enforced.

    ``enforce``: whether plans run under a limit of their device's budget: "auto" on Ray where the system can, not in process.
    ``admission``: whether selections leave out devices whose budget a plan is predicted to exceed; false, which needs
    enforcement, sends such plans, and they run out of memory, as under plain FedAvg. ``margin``: a plan is admitted if its
    predicted peak times this fits the budget. ``probe``: whether the peak is measured before the first round (None: if budgets
    are enforced). ``probed``: measured peaks by part and training setting; filled in by the runtime, which keeps them with the
    run.

    Without enforcement and probe, predictions are of tensors alone, a lower bound that is the same on every machine, and the
    margin is not applied.
    """

    enforce: bool | Literal["auto"] = False
    admission: bool = True
    margin: Annotated[float, msgspec.Meta(ge=1)] = 1.1
    probe: bool | None = None
    probed: dict[str, Annotated[int, msgspec.Meta(ge=0)]] = {}

    def __post_init__(self) -> None:
        """Raise ``ValueError`` where a plan would exceed a budget that nothing enforces."""
        if not self.admission and self.enforce is False:
            raise ValueError(
                "memory.admission is false and memory.enforce false; allowed: enforce true or auto, or admission true"
            )

    def is_enforced(self, backend: str) -> bool:
        """Whether plans are to run under a limit with this back end ("ray" or "inline")."""
        return self.enforce is True or (self.enforce == "auto" and backend == "ray")

    @property
    def probes(self) -> bool:
        """Whether peaks are measured before the first round."""
        return self.enforce is not False if self.probe is None else self.probe

    @property
    def counts_processes(self) -> bool:
        """Whether predictions are of a process on this machine, with what operations need inside, and not of tensors alone.

        The same with every back end, so that a run comes to the same model in process and on Ray.
        """
        return self.enforce is not False or self.probes
