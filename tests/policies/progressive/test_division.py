"""The division into groups, compared with all divisions."""

from itertools import combinations, pairwise
from string import ascii_lowercase

from fedbonsai.policies.progressive.division import MOST_UNITS, choose_groups
from hypothesis import given
from hypothesis import strategies as st

BASE = 7


class Peaks:
    """Memory of a stage: a base, so much for each block that is held, more for each trained one, and its proxies.

    ``trained``, ``proxies``: for each block; a proxy needs what the first of its blocks says. Each stage may be asked for once.
    """

    def __init__(self, trained, *, held=0, proxies=0):
        self.names = tuple(ascii_lowercase[: len(trained)])
        self.trained = dict(zip(self.names, trained, strict=True))
        self.proxies = dict(zip(self.names, proxies or [0] * len(trained), strict=True))
        self.held, self.asked = held, set()

    def __call__(self, groups, stage):
        assert tuple(name for group in groups for name in group) == self.names
        assert stage <= 1, "how the frozen blocks are divided makes no difference"
        key = groups[stage:]
        assert key not in self.asked
        self.asked.add(key)
        return self.needed(groups, stage)

    def needed(self, groups, stage):
        held = self.held * sum(len(group) for group in groups[: stage + 1])
        trained = sum(self.trained[name] for name in groups[stage])
        return BASE + held + trained + sum(self.proxies[group[0]] for group in groups[stage + 1 :])

    def chosen(self, most):
        return choose_groups((*self.names, "head"), most, peak=self)

    def ranked(self, groups):
        """Worst stage, number of groups, and all stages from the worst on."""
        peaks = sorted((self.needed(groups, stage) for stage in range(len(groups))), reverse=True)
        return peaks[0], len(groups), peaks


def divisions(names, most):
    """All divisions into at most so many groups."""
    for count in range(1, min(most, len(names)) + 1):
        for inner in combinations(range(1, len(names)), count - 1):
            yield tuple(names[start:end] for start, end in pairwise([0, *inner, len(names)]))


six = st.lists(st.integers(0, 20), min_size=6, max_size=6)


@given(trained=six, proxies=six, held=st.integers(0, 5), most=st.integers(1, 7))
def test_no_other_division_needs_less(trained, proxies, held, most):
    peaks = Peaks(trained, held=held, proxies=proxies)
    found = peaks.chosen(most)
    assert len(found) <= most
    assert peaks.ranked(found) == min(peaks.ranked(groups) for groups in divisions(peaks.names, most))
    assert found == Peaks(trained, held=held, proxies=proxies).chosen(most)


def test_divisions_by_hand():
    # 10 | 2 3 5: the worst is 10; in three groups too, so there are two.
    assert Peaks([10, 2, 3, 5]).chosen(4) == (("a",), ("b", "c", "d"))
    assert Peaks([10, 2, 3, 5]).chosen(1) == (("a", "b", "c", "d"),)
    # 8 8 | 8 8 needs 16 + 7 and 16. A third group costs a proxy: 8 | 8 | 8 8 needs 8 + 8 + 7, 8 + 7 and 16, not less at worst.
    assert Peaks([8, 8, 8, 8], proxies=[0, 8, 7, 8]).chosen(3) == (("a", "b"), ("c", "d"))
    # 9 1 | 9 needs 10 + 1 and 9, 9 | 1 9 needs 9 + 2 and 10: the same at worst, and less in the other stage.
    assert Peaks([9, 1, 9], proxies=[0, 2, 1]).chosen(2) == (("a", "b"), ("c",))
    # 16 | 1 2 3 has 16 and 6; any other boundary has more at worst.
    assert Peaks([16, 1, 2, 3]).chosen(2) == (("a",), ("b", "c", "d"))
    assert Peaks([1]).chosen(4) == (("a",),)


def test_of_thirteen_blocks_few_stages_are_predicted():
    # Memory as of VGG-16: the front has the activations, the end the weights.
    trained = [30, 35, 18, 20, 12, 15, 15, 20, 30, 30, 28, 28, 28]
    peaks = Peaks(trained, held=3, proxies=[0, 1, 1, 2, 2, 4, 4, 8, 13, 13, 13, 13, 13])
    assert peaks.ranked(peaks.chosen(6)) == min(peaks.ranked(groups) for groups in divisions(peaks.names, 6))
    assert len(peaks.asked) <= 400  # of 3171


def test_of_many_blocks_neighbours_stay_together():
    class Even:
        """Memory of a stage: the number of its blocks."""

        calls = 0

        def __call__(self, groups, stage):
            self.calls += 1
            return len(groups[stage])

    names, peak = tuple(f"block{number}" for number in range(120)), Even()
    found = choose_groups((*names, "head"), 6, peak=peak)
    assert tuple(name for group in found for name in group) == names
    assert [len(group) for group in found] == [20] * 6  # of 24 runs of 5
    assert peak.calls <= MOST_UNITS * (MOST_UNITS + 1)
