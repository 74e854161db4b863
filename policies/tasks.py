"""Tasks of the server: work on the model that belongs to a round, beside folding updates.

A task begins with the decision that holds it, sees each update when it is folded, and changes the model when the version
closes. It runs in an actor of its own (``actors/distiller``), and the virtual clock charges it at the server's declared speed.
"""

from ..learning.spec import Distillation


class Distil(Distillation, frozen=True, kw_only=True, omit_defaults=True, tag="distil", tag_field="name"):
    """Ensemble distillation with the given settings. Unknown fields are refused."""


ServerTask = Distil  # a union, once there are more
