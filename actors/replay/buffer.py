"""The replay buffer of a host: packets of activations that devices sent through the frozen trunk, stored as they were sent.

Wu et al., "EcoFed: Efficient Communication for DNN Partitioning-based Federated Learning", IEEE TPDS 35(3), 2024,
arXiv 2304.05495. A *view* is one complete upload of one device: its sealed activation packets, never decoded. They stay
valid, since the trunk never changes.

    begin ── add, add, ... ──┬── commit: a view, in memory ── on disk ── dropped
                             └── abort

The server decides which views exist (``replay_index``). Unfinished uploads do not count in the budgets: otherwise the place of
views would depend on how the packets of several devices interleave.
"""

from collections.abc import Collection

from ...clusters.scratch import Scratch
from ...comms.codec import Array
from .spill import DamagedFile, Spill
from .upload import UploadFault, ViewKey, ViewUpload, split
from .view_tiers import Tiers, sizes_of


class ViewGone(LookupError):
    """The buffer does not have a view. One sentence says why."""


class ReplayBuffer:
    """Packets of views by key, within budgets. The time of one ``commit`` does not grow with their number.

    ``damaged``: number of views lost to disk errors. A notice reports the first, and every doubling of their number.
    """

    def __init__(self, *, memory_bytes: int, disk_bytes: int = 0, scratch: Scratch | None = None) -> None:
        """Empty. ``scratch``: where files go. Raises ``ValueError`` for a budget that is too small."""
        self.tiers = Tiers(memory_budget=memory_bytes, disk_budget=disk_bytes)
        self._uploads: dict[ViewKey, ViewUpload] = {}
        self._lengths: dict[ViewKey, Array] = {}
        self._bodies: dict[ViewKey, Array] = {}  # of views in memory
        self._spill = Spill(scratch)
        self.damaged = 0
        self.notices: list[str] = []

    @property
    def upload_bytes(self) -> int:
        """Bytes of the unfinished uploads."""
        return sum(upload.held_bytes for upload in self._uploads.values())

    def __len__(self) -> int:
        """Number of views."""
        return len(self._lengths)

    def __contains__(self, key: ViewKey) -> bool:
        """Whether the buffer has a view."""
        return key in self._lengths

    def begin(self, key: ViewKey) -> None:
        """Start an upload. Raises ``UploadFault`` if one of this key has started already."""
        if key in self._uploads:
            raise UploadFault(f"{key} is being uploaded already")
        self._uploads[key] = ViewUpload(key, limit_bytes=self.tiers.memory_budget)

    def add(self, key: ViewKey, number: int, packet: Array) -> None:
        """Add a copy of one packet, in any order. Raises ``UploadFault`` for an invalid or repeated number."""
        self._upload(key).add(number, packet)

    def commit(self, key: ViewKey, packets: int) -> None:
        """Make an upload of so many packets a view.

        Raises ``UploadFault`` if it is not complete, ``ValueError`` if it alone exceeds the budget; the upload is then
        unchanged.
        """
        upload = self.check(key, packets)
        del self._uploads[key]
        self.put(key, *upload.join())

    def check(self, key: ViewKey, packets: int) -> ViewUpload:
        """Return an upload that can be committed; raises what ``commit`` does."""
        upload = self._upload(key)
        upload.check(packets)
        if upload.num_bytes > self.tiers.memory_budget:
            raise ValueError(f"replay.memory_bytes is {self.tiers.memory_budget}; {key} alone needs {upload.num_bytes}")
        return upload

    def abort(self, key: ViewKey) -> None:
        """Drop an upload, if it exists."""
        self._uploads.pop(key, None)

    def put(self, key: ViewKey, lengths: Array, body: Array) -> None:
        """Add a view, as ``ViewUpload.join`` returns it, in memory."""
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
        """The packets of these views, as far as the buffer has them, as ``put`` takes them. It does not count as a use."""
        bodies = {}
        for key in keys:
            if key in self._lengths:
                try:
                    bodies[key] = self._body(key)
                except ViewGone:  # its file is damaged; a notice reports it
                    continue
        return bodies

    def drop(self, keys: Collection[ViewKey]) -> None:
        """Drop views from memory and disk; those that the buffer has lost before are ignored."""
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
            raise UploadFault(f"no upload of {key} has started")
        return self._uploads[key]

    def _make_room(self, num_bytes: int) -> None:
        """Write the least recently used views to files until so many more bytes fit into the budget of memory."""
        for action, key in self.tiers.make_room(num_bytes):
            if action == "evict":
                self.drop([key])
                continue
            try:
                self._spill.write(key, self._bodies.pop(key))
            except OSError as error:
                self._lose(key, f"could not be written to disk ({error})")

    def _body(self, key: ViewKey) -> Array:
        """The packets of a view; a view that cannot be read is dropped. Raises ``ViewGone``."""
        if key in self._bodies:
            return self._bodies[key]
        try:
            return self._spill.read(key)
        except (OSError, DamagedFile) as error:
            self._lose(key, f"could not be read from disk ({error})")
            raise ViewGone(f"{key} could not be read from disk ({error})") from error

    def _lose(self, key: ViewKey, why: str) -> None:
        """Drop a view after a disk error."""
        self.drop([key])
        self.damaged += 1
        if self.damaged.bit_count() == 1:
            self.notices.append(f"{key} {why}; dropped (number {self.damaged} lost to the disk)")
