"""What a run has seen of its devices so far, as far as policies are told."""

from typing import ClassVar

from ...learning.spec import CountOrZero
from ...policies.report import Report


class DeviceHistory:
    """By device: its last report, and the plans that it was sent and that have ended."""

    # By a checkpoint.
    SAVED: ClassVar = {
        "reports": dict[int, Report],
        "participation": dict[int, CountOrZero],
    }
    NOT_SAVED = ()

    def __init__(self) -> None:
        """Nothing yet."""
        self.reports: dict[int, Report] = {}
        self.participation: dict[int, int] = {}

    def ended(self, report: Report) -> None:
        """A plan has come to its end."""
        device = report.plan.device
        self.reports[device] = report
        self.participation[device] = self.participation.get(device, 0) + 1
