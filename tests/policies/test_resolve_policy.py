"""Policies by name: built in, from an installed package, from a module of the user; and the error sentences."""

import sys

import pytest
from fedbonsai.policies.decision import Decision
from fedbonsai.policies.policy import Identity, chain
from fedbonsai.policies.resolve_policy import make_policy
from fedbonsai.policies.selection.deadline import ByDeadline
from fedbonsai.policies.selection.plain import All, RandomCohort

STRANGER = """
from dataclasses import dataclass

@dataclass(frozen=True)
class First:
    cohort: int
    tags: tuple[str, ...] = ()

    def init(self):
        return None

    def decide(self, view, state, decision):
        return decision, state

class Thawed:
    init = decide = print

@dataclass(frozen=True)
class Mute:
    cohort: int = 1

    def init(self):
        return None

def function():
    return First(1)
"""


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """Packages as installed by pip: ``good`` offers a policy, ``bad`` one that raises on import, two offer the same name."""

    def install(package, source, offers):
        (tmp_path / f"{package}.py").write_text(source)
        metadata = tmp_path / f"{package}-1.0.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        (metadata / "entry_points.txt").write_text(f"[fedbonsai.policies]\n{offers}\n")

    install("good_stranger", STRANGER, "first = good_stranger:First\ntwice = good_stranger:First")
    install("bad_stranger", "raise RuntimeError('no licence')", "broken = bad_stranger:Any\ntwice = bad_stranger:Any")
    monkeypatch.syspath_prepend(tmp_path)
    yield
    for name in ("good_stranger", "bad_stranger"):
        sys.modules.pop(name, None)


def test_built_in_names():
    assert make_policy([{"name": "all"}]) == All()
    assert make_policy([{"name": "random", "cohort": 0.5}]) == RandomCohort(cohort=0.5)


def test_several_are_a_chain_in_order_and_none_is_the_identity():
    specs = [{"name": "deadline", "deadline_s": 60}, {"name": "random", "cohort": 4}]
    assert make_policy(specs) == chain(ByDeadline(deadline_s=60), RandomCohort(cohort=4))
    assert make_policy([]) == Identity()


def test_an_entry_point_works_beside_a_broken_one(packages):
    policy = make_policy([{"name": "first", "cohort": 3, "tags": ["a", "b"]}])
    assert repr(policy) == "First(cohort=3, tags=('a', 'b'))"  # a list is converted to the annotated tuple
    assert policy.decide(None, None, Decision()) == (Decision(), None)
    assert "bad_stranger" not in sys.modules


def test_a_class_of_the_user(packages):
    assert repr(make_policy([{"name": "good_stranger:First", "cohort": 3}])) == "First(cohort=3, tags=())"


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        (
            {"name": "broken"},
            r"policy\[0\].name is 'broken', which bad_stranger offers but .* RuntimeError: no licence",
        ),
        ({"name": "twice"}, r"policy\[0\].name is 'twice', which bad_stranger and good_stranger both offer"),
        (
            {"name": "frist"},
            r"policy\[0\].name is 'frist' \(did you mean 'first'\?\); allowed: all, random, .*broken, first",
        ),
        (
            {"name": "good_stranger:Gone"},
            r"policy\[0\].name is 'good_stranger:Gone', but 'good_stranger' has no 'Gone'",
        ),
        (
            {"name": "good_stranger:Thawed"},
            r"'good_stranger:Thawed', which is not a policy: it is not a frozen dataclass",
        ),
        ({"name": "good_stranger:function"}, r"which is not a policy: it is not a class; allowed: a frozen"),
        (
            {"name": "good_stranger:Mute"},
            r"which is not a policy: it has no decide; allowed: a frozen dataclass with init",
        ),
        ({"name": "first", "cohort": "many"}, r"policy\[0\].cohort is 'many': expected `int`, got `str`$"),
    ],
)
def test_errors_of_policies_that_are_not_built_in(packages, spec, sentence):
    with pytest.raises(ValueError, match=sentence):
        make_policy([spec])


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        (
            {"name": "randm"},
            r"^policy\[1\].name is 'randm' \(did you mean 'random'\?\); allowed: all, random, fastest, ",
        ),
        ({"cohort": 3}, r"^policy\[1\].name is None; allowed: all, random"),
        ("all", r"^policy\[1\] is 'all'; allowed: a mapping, as in {name: random, cohort: 10}$"),
        ({"name": 3}, r"^policy\[1\].name is 3; allowed"),
        ({"name": "random"}, r"^policy\[1\].cohort is missing; 'random' has no default for it$"),
        ({"name": "random", "size": 3}, r"^policy\[1\].size is not a field of 'random'; allowed: cohort$"),
        ({"name": "all", "size": 3}, r"^policy\[1\].size is not a field of 'all'; it has no fields$"),
        ({"name": "random", "cohort": "x"}, r"^policy\[1\].cohort is 'x': expected `int \| float`, got `str`$"),
        ({"name": "random", "cohort": 0}, r"^policy\[1\] \(random\): cohort is 0; allowed: a whole number of devices"),
        ({"name": "oort", "cohort": 1, "penalty": -1}, r"^policy\[1\].penalty is -1: expected `float` >= 0.0$"),
        ({"name": "no_such_module:Policy"}, r"^policy\[1\].name is 'no_such_module:Policy', but there is no module"),
    ],
)
def test_errors_of_wrong_entries(spec, sentence):
    with pytest.raises(ValueError, match=sentence):
        make_policy([{"name": "all"}, spec])
