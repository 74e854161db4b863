"""The packets of the replay buffer: what devices have sent through the frozen trunk, kept as it was sent.

Wu et al., "EcoFed: Efficient Communication for DNN Partitioning-based Federated Learning", IEEE TPDS 35(3), 2024,
arXiv 2304.05495. A *view* is one complete upload of one device: its sealed activation packets, never decoded. As the
trunk never changes, they stay valid.

    begin ── add, add, ... ──┬── commit: a view, in memory ── on disk ── dropped
                             └── abort: gone

Which views there are is decided elsewhere (``replay_index``): a buffer is asked for them and told which go. Uploads under way
are not counted in its budgets, else what is where would depend on how the packets of several devices happen to interleave.
"""

from collections.abc import Collection

from ...clusters.scratch import Scratch
from ...comms.codec import Array
from .spill import DamagedFile, Spill
from .upload import UploadFault, ViewKey, ViewUpload, split
from .view_tiers import Tiers, sizes_of


class ViewGone(LookupError):
    """A view is not in the buffer (any more). One sentence says why."""


class ReplayBuffer:
    """Packets of views by key, under budgets. What one ``commit`` costs does not grow with their number.

    ``upload_bytes``: of the uploads under way. ``damaged``: views lost to the disk. A notice says so for the first, and
    whenever their number has doubled.
    """

    def __init__(self, *, memory_bytes: int, disk_bytes: int = 0, scratch: Scratch | None = None) -> None:
        """Empty. ``scratch``: for files. Raises ``ValueError``."""
        self.tiers = Tiers(memory_budget=memory_bytes, disk_budget=disk_bytes)
        self._uploads: dict[ViewKey, ViewUpload] = {}
        self._lengths: dict[ViewKey, Array] = {}
        self._bodies: dict[ViewKey, Array] = {}  # of those in memory
        self._spill = Spill(scratch)
        self.damaged = 0
        self.notices: list[str] = []

    @property
    def upload_bytes(self) -> int:
        """Bytes of the uploads under way."""
        return sum(upload.held_bytes for upload in self._uploads.values())

    def __len__(self) -> int:
        """Number of views."""
        return len(self._lengths)

    def __contains__(self, key: ViewKey) -> bool:
        """Whether a view is here."""
        return key in self._lengths

    def begin(self, key: ViewKey) -> None:
        """Start an upload. Raises ``UploadFault`` where one of this key is under way."""
        if key in self._uploads:
            raise UploadFault(f"{key} is being uploaded already")
        self._uploads[key] = ViewUpload(key, limit_bytes=self.tiers.memory_budget)

    def add(self, key: ViewKey, number: int, packet: Array) -> None:
        """One packet of an upload, in any order; it is copied. Raises ``UploadFault`` for a number that cannot be."""
        self._upload(key).add(number, packet)

    def commit(self, key: ViewKey, packets: int) -> None:
        """An upload of so many packets is a view now.

        Raises ``UploadFault`` where it is not complete, ``ValueError`` where the budget is too small for it: then nothing
        has changed, and the upload is still under way.
        """
        upload = self.check(key, packets)
        del self._uploads[key]
        self.put(key, *upload.join())

    def check(self, key: ViewKey, packets: int) -> ViewUpload:
        """An upload that can be committed. Raises what ``commit`` does."""
        upload = self._upload(key)
        upload.check(packets)
        if upload.num_bytes > self.tiers.memory_budget:
            raise ValueError(f"replay.memory_bytes is {self.tiers.memory_budget}; {key} alone needs {upload.num_bytes}")
        return upload

    def abort(self, key: ViewKey) -> None:
        """Forget an upload, if there is one."""
        self._uploads.pop(key, None)

    def put(self, key: ViewKey, lengths: Array, body: Array) -> None:
        """A view as ``ViewUpload.join`` makes it, in memory."""
        self.drop([key])
        sizes = sizes_of(lengths)
        self._make_room(sizes.memory)
        self.tiers.add(key, sizes)
        self._lengths[key], self._bodies[key] = lengths, body

    def read(self, key: ViewKey) -> list[Array]:
        """A view's packets as they were sent, read-only. Raises ``ViewGone``."""
        if key not in self._lengths:
            raise ViewGone(f"{key} is not in the replay buffer")
        body = self._body(key)
        if self.tiers.use(key):
            self._spill.remove(key)
            self._bodies[key] = body
        return split(body, self._lengths[key])

    def bodies(self, keys: Collection[ViewKey]) -> dict[ViewKey, Array]:
        """The packets of those of the views that are here, as ``put`` takes them. It does not count as a use."""
        found = {}
        for key in keys:
            if key in self._lengths:
                try:
                    found[key] = self._body(key)
                except ViewGone:  # its file is damaged: a notice says so
                    continue
        return found

    def drop(self, keys: Collection[ViewKey]) -> None:
        """Forget views, wherever they are; those that are not here have been lost before."""
        for key in keys:
            self.tiers.remove(key)
            self._bodies.pop(key, None)
            self._lengths.pop(key, None)
            if key in self._spill:
                self._spill.remove(key)

    def close(self) -> None:
        """Empty the buffer, and remove its folder."""
        self._uploads.clear()
        self.drop(list(self._lengths))
        self._spill.close()

    def _upload(self, key: ViewKey) -> ViewUpload:
        if key not in self._uploads:
            raise UploadFault(f"no upload of {key} is under way")
        return self._uploads[key]

    def _make_room(self, num_bytes: int) -> None:
        """Write the views used longest ago to files, until so many bytes more are within the budget."""
        for move, key in self.tiers.make_room(num_bytes):
            if move == "evict":
                self.drop([key])
                continue
            try:
                self._spill.write(key, self._bodies.pop(key))
            except OSError as error:
                self._lose(key, f"could not be written to disk ({error})")

    def _body(self, key: ViewKey) -> Array:
        """The packets of a view; one that cannot be read is dropped. Raises ``ViewGone``."""
        if key in self._bodies:
            return self._bodies[key]
        try:
            return self._spill.read(key)
        except (OSError, DamagedFile) as error:
            self._lose(key, f"could not be read from disk ({error})")
            raise ViewGone(f"{key} could not be read from disk ({error})") from error

    def _lose(self, key: ViewKey, why: str) -> None:
        """Drop a view for a fault of the disk."""
        self.drop([key])
        self.damaged += 1
        if self.damaged.bit_count() == 1:
            self.notices.append(f"{key} {why}; dropped (number {self.damaged} lost to the disk)")
