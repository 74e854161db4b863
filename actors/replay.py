"""The replay buffer: what devices have sent through the frozen trunk, kept as it was sent, to train on again without them.

Wu et al., "EcoFed: Efficient Communication for DNN Partitioning-based Federated Learning", IEEE TPDS 35(3), 2024,
arXiv 2304.05495. A *view* is one complete upload of one device: its sealed activation packets, never decoded. As the
trunk never changes, they stay valid.

    begin ── add, add, ... ──┬── commit: a view, in memory ── spilled to a file ── evicted
                             └── abort, erase: gone

Departures: the paper's buffer has no bound, and forgets a device's last upload when the next one begins. Here an upload
counts once it is complete, and bytes in memory and on disk have budgets. Uploads under way are not counted in them, else
what is evicted would depend on how the packets of several devices happen to interleave.
"""

from collections import OrderedDict
from dataclasses import dataclass

from ..clusters.scratch import Scratch
from ..comms.codecs import Array, NumBytes
from ..learning.spec import CountOrZero
from .replay_files import CHECKSUM_BYTES, DamagedFile, Spill
from .replay_upload import Upload, UploadFault, ViewKey, split


class ViewGone(LookupError):
    """A view is not in the buffer (any more). One sentence says why."""


@dataclass(frozen=True)
class ViewRecord:
    """What is known of a view without its packets.

    ``version``: of the model, when it was uploaded. ``samples``: in all its packets. ``about``: what its owner needs to open
    them. ``num_bytes``: what it counts for. ``lengths``: [packet] bytes.
    """

    version: CountOrZero
    samples: CountOrZero
    about: bytes
    num_bytes: NumBytes
    lengths: Array


class ReplayBuffer:
    """Views by key, under budgets. What one ``commit`` costs does not grow with their number.

    ``memory_bytes``, ``disk_bytes``, ``upload_bytes``: held now. ``evicted``, ``damaged``: views lost to the budgets and to the
    disk. A notice says so for the first of each, and whenever their number has doubled.
    """

    def __init__(
        self,
        *,
        budget_bytes: int,
        disk_bytes: int = 0,
        views_per_device: int = 1,
        lifetime: int | None = None,
        scratch: Scratch | None = None,
    ) -> None:
        """Empty. ``lifetime``: in versions; None keeps views for ever. ``scratch``: for files. Raises ``ValueError``."""
        for name, value, least in (
            ("budget_bytes", budget_bytes, 1),
            ("disk_bytes", disk_bytes, 0),
            ("views_per_device", views_per_device, 1),
            ("lifetime", lifetime, 0),
        ):
            if value is not None and value < least:
                raise ValueError(f"{name} is {value}; it must be at least {least}")
        self._budget_bytes, self._disk_budget = budget_bytes, disk_bytes
        self._views_per_device, self._lifetime = views_per_device, lifetime
        self._uploads: dict[ViewKey, Upload] = {}
        self._records: dict[ViewKey, ViewRecord] = {}
        self._streams: dict[tuple[str, str, str, int], OrderedDict[ViewKey, None]] = {}  # oldest first
        self._memory: OrderedDict[ViewKey, Array] = OrderedDict()  # used longest ago first
        self._spill = Spill(scratch)
        self.memory_bytes = self.evicted = self.damaged = 0
        self.notices: list[str] = []

    @property
    def disk_bytes(self) -> int:
        """Bytes of all files."""
        return self._spill.num_bytes

    @property
    def upload_bytes(self) -> int:
        """Bytes of the uploads under way."""
        return sum(upload.held_bytes for upload in self._uploads.values())

    def __len__(self) -> int:
        """Number of views."""
        return len(self._records)

    def begin(self, key: ViewKey, *, version: int, samples: int, about: bytes = b"") -> None:
        """Start an upload. ``about`` is kept beside its packets. Raises ``UploadFault`` where one of this key is under way."""
        if key in self._uploads:
            raise UploadFault(f"{key} is being uploaded already")
        self._uploads[key] = Upload(key, version=version, samples=samples, about=about, limit_bytes=self._budget_bytes)

    def add(self, key: ViewKey, number: int, packet: Array) -> None:
        """One packet of an upload, in any order; it is copied. Raises ``UploadFault`` for a number that cannot be."""
        self._upload(key).add(number, packet)

    def commit(self, key: ViewKey, packets: int) -> None:
        """An upload of so many packets is a view now, in place of its device's oldest.

        Raises ``UploadFault`` where it is not complete, ``ValueError`` where the budget is too small for it: then nothing
        has changed, and the upload is still under way.
        """
        upload = self.check(key, packets)
        del self._uploads[key]
        if key in self._records:
            self._drop(key)
        older = self._streams.get(key.stream, ())
        while len(older) >= self._views_per_device:
            self._drop(next(iter(older)))
        self._make_room(upload.num_bytes)
        lengths, body = upload.join()
        self._records[key] = ViewRecord(upload.version, upload.samples, upload.about, upload.num_bytes, lengths)
        self._streams.setdefault(key.stream, OrderedDict())[key] = None
        self._keep(key, body)

    def check(self, key: ViewKey, packets: int) -> Upload:
        """An upload that can be committed. Raises what ``commit`` does."""
        upload = self._upload(key)
        upload.check(packets)
        if upload.num_bytes > self._budget_bytes:
            raise ValueError(f"replay.memory_bytes is {self._budget_bytes}; {key} alone needs {upload.num_bytes}")
        return upload

    def abort(self, key: ViewKey) -> None:
        """Forget an upload, if there is one; the views of its device stay."""
        self._uploads.pop(key, None)

    def peek(self, key: ViewKey) -> ViewRecord | None:
        """What is known of a view; None where it is not in the buffer. It does not count as used."""
        return self._records.get(key)

    def read(self, key: ViewKey) -> list[Array]:
        """A view's packets as they were sent, read-only. Raises ``ViewGone``."""
        record = self._records.get(key)
        if record is None:
            raise ViewGone(f"{key} is not in the replay buffer")
        if key in self._memory:
            body = self._memory[key]
            self._memory.move_to_end(key)
        else:
            body = self._read_file(key)
            # Views are drawn at random: to change places with one in memory would cost a write, and win nothing.
            if self.memory_bytes + record.num_bytes <= self._budget_bytes:
                self._spill.remove(key)
                self._keep(key, body)
        return split(body, record.lengths)

    def inventory(self) -> tuple[tuple[str, str, int, str, int, int], ...]:
        """(trunk, cut, device, view, version, bytes) of every view, sorted."""
        return tuple(
            sorted(
                (key.trunk, key.cut, key.device, key.view, record.version, record.num_bytes)
                for key, record in self._records.items()
            )
        )

    def expire(self, version: int) -> int:
        """Drop the views that are more than ``lifetime`` versions older than this one; how many."""
        if self._lifetime is None:
            return 0
        old = [key for key, record in self._records.items() if version - record.version > self._lifetime]
        for key in old:
            self._drop(key)
        return len(old)

    def erase(self, device: int) -> int:
        """Drop all that a device has sent: views in memory and on disk, and uploads under way; how many."""
        views = [key for key in self._records if key.device == device]
        uploads = [key for key in self._uploads if key.device == device]
        for key in views:
            self._drop(key)
        for key in uploads:
            del self._uploads[key]
        return len(views) + len(uploads)

    def close(self) -> None:
        """Empty the buffer, and remove its folder."""
        for held in (self._uploads, self._records, self._streams, self._memory):
            held.clear()
        self.memory_bytes = 0
        self._spill.close()

    def _upload(self, key: ViewKey) -> Upload:
        if key not in self._uploads:
            raise UploadFault(f"no upload of {key} is under way")
        return self._uploads[key]

    def _keep(self, key: ViewKey, body: Array) -> None:
        """Hold a view in memory, as the one used last."""
        self._memory[key] = body
        self.memory_bytes += self._records[key].num_bytes

    def _release(self, key: ViewKey) -> Array:
        """Hold a view in memory no more."""
        self.memory_bytes -= self._records[key].num_bytes
        return self._memory.pop(key)

    def _make_room(self, num_bytes: int) -> None:
        """Write the views used longest ago to files, until so many bytes more are within the budget."""
        while self.memory_bytes + num_bytes > self._budget_bytes:
            key = next(iter(self._memory))
            file_bytes = self._memory[key].nbytes + CHECKSUM_BYTES
            if file_bytes > self._disk_budget:
                self._evict(key)
                continue
            while self._spill.num_bytes + file_bytes > self._disk_budget:
                self._evict(self._spill.oldest())
            body = self._release(key)
            try:
                self._spill.write(key, body)
            except OSError as error:
                self._lose(key, f"could not be written to disk ({error})")

    def _read_file(self, key: ViewKey, *, uses: bool = True) -> Array:
        """A spilled view; one that cannot be read is dropped. Raises ``ViewGone``."""
        try:
            return self._spill.read(key, uses=uses)
        except (OSError, DamagedFile) as error:
            self._lose(key, f"could not be read from disk ({error})")
            raise ViewGone(f"{key} could not be read from disk ({error})") from error

    def _evict(self, key: ViewKey) -> None:
        """Drop a view for the budgets."""
        self._drop(key)
        self.evicted += 1
        if self.evicted.bit_count() == 1:
            self.notices.append(
                f"{key} was evicted from the replay buffer (number {self.evicted} beyond replay.memory_bytes, "
                f"{self._budget_bytes}, and replay.disk_bytes, {self._disk_budget})"
            )

    def _lose(self, key: ViewKey, why: str) -> None:
        """Drop a view for a fault of the disk."""
        self._drop(key)
        self.damaged += 1
        if self.damaged.bit_count() == 1:
            self.notices.append(f"{key} {why}; dropped (number {self.damaged} lost to the disk)")

    def _drop(self, key: ViewKey) -> None:
        """Forget a view, wherever it is."""
        if key in self._memory:
            self._release(key)
        if key in self._spill:
            self._spill.remove(key)
        del self._records[key]
        stream = self._streams[key.stream]
        del stream[key]
        if not stream:
            del self._streams[key.stream]
