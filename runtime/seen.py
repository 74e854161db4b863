"""What a run has seen of its devices so far, as far as policies are told."""

from typing import ClassVar

from ..actors.partition_host import BufferedViews
from ..learning.spec import CountOrZero
from ..policies.report import Report


class Seen:
    """By device: its last report, and the plans that it was sent and that have ended; by host: what it has buffered."""

    # By a checkpoint.
    SAVED: ClassVar = {
        "reports": dict[int, Report],
        "participation": dict[int, CountOrZero],
        "_views": dict[int, BufferedViews],
    }
    NOT_SAVED = ()

    def __init__(self) -> None:
        """Nothing yet."""
        self.reports: dict[int, Report] = {}
        self.participation: dict[int, int] = {}
        self._views: dict[int, BufferedViews] = {}

    def ended(self, report: Report) -> None:
        """A plan has come to its end."""
        device = report.plan.device
        self.reports[device] = report
        self.participation[device] = self.participation.get(device, 0) + 1

    def buffered(self, host: int, views: BufferedViews) -> None:
        """All that a host has buffered now."""
        self._views[host] = views

    def host_died(self, host: int) -> None:
        """With all that it had buffered."""
        self._views.pop(host, None)

    def replay(self, version: int, *, lifetime: int | None) -> list[tuple[str, str, int, str, int, int]]:
        """What the hosts have buffered, by age in versions; what has outlived its time is dropped by its host's next plan."""
        return [
            (trunk, cut, device, view, version - since, size)
            for _, views in sorted(self._views.items())
            for trunk, cut, device, view, since, size in views
            if lifetime is None or version - since <= lifetime
        ]
