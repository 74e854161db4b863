"""Tasks of the server: work on the model that belongs to a round, beside folding updates.

A task begins with the decision that holds it, may see each update when it is folded, and may change the model when the version
closes. A version has at most one task of each kind. ``Distil`` runs in an actor of its own (``actors/distiller``), and the
virtual clock charges it at the server's declared speed; the others are copies and sums of tensors that the server holds.
"""

import msgspec

from ..learning.spec import Count, Distillation


class Distil(Distillation, frozen=True, kw_only=True, omit_defaults=True, tag="distil", tag_field="name"):
    """Ensemble distillation with the given settings. Unknown fields are refused."""


class TrackMovement(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="track_movement", tag_field="name"
):
    """Measure the effective movement of blocks in this version, see ``learning.movement``; the view shows it under ``label``.

    Versions with the same label, blocks and window form one series. Only parameters count, not running statistics.
    """

    label: str
    blocks: tuple[str, ...]
    window: Count


class Snapshot(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="snapshot", tag_field="name"):
    """Keep the tensors of these blocks and auxiliaries as they are now; they replace an earlier snapshot."""

    blocks: tuple[str, ...]
    auxiliaries: tuple[str, ...] = ()


class Restore(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="restore", tag_field="name"):
    """Set the tensors of the snapshot when the version closes, in place of its mean. Without a snapshot nothing is set."""


ServerTask = Distil | TrackMovement | Snapshot | Restore
