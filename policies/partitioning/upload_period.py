"""How often devices upload under EcoFed, over a whole run: what a mean over its rounds is taken of.

``EcoFed.decide`` says who uploads; here its devices are counted as an amount, so that a run of ten thousand of them is a sum of
one number for each round. It follows from the policy's fields, as if every upload arrived and none were evicted.
"""

from typing import NamedTuple

from .ecofed import EcoFed


class UploadPeriod(NamedTuple):
    """``full``: rounds in which the whole cohort uploads; ``some``: those in which ``part`` of it does, on average."""

    full: float
    some: float
    part: float


def rhythm(method: EcoFed, *, devices: int, cohort: int, rounds: int) -> UploadPeriod:
    """Of ``rounds`` rounds, each with a cohort of so many of the ``devices``; all three at least 1."""
    if method.uploads == "period":
        return UploadPeriod(full=-(-rounds // method.period), some=0.0, part=0.0)
    most, share = -(-cohort // method.period), cohort / devices
    without, old = float(devices - cohort), 0.0  # who has nothing buffered, or something that is old enough
    sent = [float(cohort)]  # nothing is buffered in the first round
    for now in range(1, rounds):
        if 0 < method.refresh <= now:
            old += sent[now - method.refresh]
        new = min(most, without * share)
        again = min(most - new, old * share)
        without, old = without - new, old - again
        sent.append(new + again)
    later = sum(sent[1:])
    some = sum(min(1.0, number) for number in sent[1:])  # less than one device: in so many of such rounds
    return UploadPeriod(full=1.0, some=some, part=later / some / cohort if some else 0.0)
