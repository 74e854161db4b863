"""Where the actors of a run on Ray are placed: the nodes of its real devices, and a bundle for every other actor."""

from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from ...actors.ray_backend.actor_placement import ActorPlacement
from ...clusters.ray_backend.nodes import await_devices
from ...clusters.ray_backend.placement import Request, Reservation
from ...clusters.ray_backend.real_devices import RealDevice, Site
from ..configuration.config import Config
from .ray_connection import cores


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Placements of the actors of a run: server, workers, partition hosts and distiller; and the real devices.

    ``distiller``: None in a run without tasks of the server. ``min_devices``: real devices without which the run does not
    begin.
    """

    server: ActorPlacement
    workers: Sequence[ActorPlacement]
    hosts: Sequence[ActorPlacement]
    distiller: ActorPlacement | None = None
    devices: Sequence[RealDevice] = ()
    min_devices: int = 0


def wait_for_devices(
    devices: Sequence[RealDevice], config: Config, *, replaces: bool, notices: list[str]
) -> Generator[str, None, dict[int, Site]]:
    """The nodes of the real devices that have joined; yields what is waited for. Raises ``ValueError`` if too few have.

    ``replaces``: a server is replaced, and the run goes on with any number of devices; the others may join later.
    """
    cpus, least = config.ray.cpus, min_devices(devices, config, replaces=replaces)
    if replaces:
        devices = [replace(device, join_timeout_s=0.0) for device in devices]
    sites = yield from await_devices(devices, cpus=cpus)
    missing = [device for device in devices if device.number not in sites]
    if not missing:
        return sites
    first, rule = missing[0], config.ray.min_real_devices
    why = f"{first.name} is missing: {first.requirement(cpus)} has not joined"
    count = f"{len(sites)} of {len(devices)} real devices are there"
    if len(sites) < least:
        needed = "all are needed (ray.min_real_devices is null)" if rule is None else f"ray.min_real_devices is {rule}"
        raise ValueError(f"{count}, and {needed}; {why} within {first.join_timeout_s:g} s")
    notices.append(f"{count}, and the run goes on with them; {why}")
    return sites


def min_devices(devices: Sequence[RealDevice], config: Config, *, replaces: bool) -> int:
    """Real devices without which the run does not begin; none if it goes on. Raises ``ValueError``."""
    rule = config.ray.min_real_devices
    if rule is not None and rule > len(devices):
        raise ValueError(f"ray.min_real_devices is {rule}; the fleet has {len(devices)} real devices")
    return 0 if replaces else len(devices) if rule is None else rule


class Bundles:
    """The bundles of server, workers, partition hosts and distiller, in this order, as they are numbered in notices."""

    def __init__(
        self,
        config: Config,
        devices: Sequence[RealDevice],
        sites: Mapping[int, Site],
        *,
        has_distiller: bool,
        replaces: bool,
    ) -> None:
        """Reserve the bundles, if possible not on the nodes of real devices (``sites``).

        ``has_distiller``: whether the policy gives the server tasks. ``replaces``: a server is replaced.
        """
        options, fleet = config.ray, config.load_fleet()
        self._config, self._devices, self._replaces = config, devices, replaces
        num_workers, num_hosts, num_distillers = (
            config.workers or max(cores() // config.threads, 1),
            fleet.hosts.count,
            int(has_distiller),
        )
        reserved = options.server_cpus + options.host_cpus * num_hosts + options.distiller_cpus * num_distillers
        spare = max(float(cores()), 1.0) - reserved
        self._worker_cpus = options.cpus or spare / num_workers
        of_worker = {"CPU": self._worker_cpus}
        if options.memory_bytes:
            of_worker["memory"] = float(options.memory_bytes)
        self._num_workers = num_workers if len(devices) < fleet.num_devices else 0
        self._num_hosts = num_hosts
        requests = [
            Request("server", {"CPU": options.server_cpus}),
            *[Request("worker", of_worker)] * self._num_workers,
            *[Request("partition host", {"CPU": options.host_cpus})] * num_hosts,
            *[Request("distiller", {"CPU": options.distiller_cpus})] * num_distillers,
        ]
        # A server that replaces another needs its hosts and its distiller before any worker.
        workers_last = [0, *range(1 + self._num_workers, len(requests)), *range(1, 1 + self._num_workers)]
        self._reservation = Reservation(
            requests, keep_off={site.node for site in sites.values()}, order=workers_last if replaces else None
        )

    def wait(self, notices: list[str]) -> Iterator[str]:
        """Wait until the bundles are placed; yields what is waited for. Raises ``ValueError`` if they cannot be placed.

        When a server is replaced, its bundle and that of one worker are enough; the others may be placed later.
        """

        def server_and_a_worker(placed: list[bool]) -> bool:
            return placed[0] and (not self._num_workers or any(placed[1 : 1 + self._num_workers]))

        enough = server_and_a_worker if self._replaces else all
        yield from self._reservation.wait(timeout_s=self._config.ray.placement_timeout_s, enough=enough)
        if why := self._reservation.explain():
            notices.append(f"the run goes on with the bundles that have a place; {why}")

    def layout(self) -> Layout:
        """The placements in these bundles."""
        options = self._config.ray
        server, *others = self._reservation.groups
        first_host, first_distiller = self._num_workers, self._num_workers + self._num_hosts
        workers = [
            ActorPlacement(
                name=f"worker of bundle {number}",
                cpus=self._worker_cpus,
                memory_bytes=options.memory_bytes,
                bundle=bundle,
            )
            for number, bundle in enumerate(others[:first_host], start=1)
        ]
        hosts = [
            ActorPlacement(
                name=f"partition host {number}",
                group=f"partition host {number}",
                cpus=options.host_cpus,
                bundle=bundle,
                fallback=server,
            )
            for number, bundle in enumerate(others[first_host:first_distiller])
        ]
        distillers = [
            ActorPlacement(
                name="distiller", group="distiller", cpus=options.distiller_cpus, bundle=bundle, fallback=server
            )
            for bundle in others[first_distiller:]
        ]
        return Layout(
            server=ActorPlacement(name="server", cpus=options.server_cpus, bundle=server),
            workers=workers,
            hosts=hosts,
            distiller=distillers[0] if distillers else None,
            devices=self._devices,
            min_devices=min_devices(self._devices, self._config, replaces=self._replaces),
        )

    def close(self) -> None:
        """Release the bundles."""
        self._reservation.close()
