"""How much an update counts that comes late: the less, the more versions have closed since the one that it started from.

    constant      1
    polynomial    (1 + t)^-a
    hinge         1 where t <= b, else 1 / (a (t - b) + 1)

Xie, Koyejo and Gupta, "Asynchronous Federated Optimization", arXiv 1903.03934, section 5.2; with a = 1/2 the polynomial is that
of FedBuff (Nguyen et al., AISTATS 2022, arXiv 2106.06639).
"""

from typing import Annotated, Literal

import msgspec

from .spec import CountOrZero


class Staleness(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``rule``, with its ``a`` and ``b`` (hinge: versions without a loss). ``most``: an older update is not folded at all."""

    rule: Literal["constant", "polynomial", "hinge"] = "polynomial"
    a: Annotated[float, msgspec.Meta(ge=0)] = 0.5
    b: CountOrZero = 4
    most: CountOrZero | None = None

    def counts(self, versions: int) -> bool:
        """Whether an update is folded that started so many versions ago."""
        return self.most is None or versions <= self.most

    def scale(self, versions: int) -> float:
        """What an update is multiplied by that started so many versions ago: 1 where that is none."""
        if self.rule == "polynomial":
            return float((1 + versions) ** -self.a)
        if self.rule == "hinge" and versions > self.b:
            return 1 / (self.a * (versions - self.b) + 1)
        return 1.0
