"""Statements of policies, compared with each other, the fleet and the configuration; by themselves and in a run."""

from dataclasses import dataclass, field
from typing import ClassVar

import fedbonsai
import pytest
from fedbonsai.policies.compression.residuals import Residuals
from fedbonsai.policies.partitioning.splitfed import SplitFed
from fedbonsai.policies.policy import NEEDS_PLANS, Identity, chain
from fedbonsai.policies.selection.plain import All, RandomCohort
from fedbonsai.runtime.configuration.config import load_config
from fedbonsai.runtime.configuration.policy_checks import check_policy
from fedbonsai.runtime.errors import ConfigError
from torch import nn

CLASS = {"name": "a", "flop_per_s": 1, "memory_bytes": 1, "up_bytes_per_s": 1, "down_bytes_per_s": 1}


@dataclass(frozen=True)
class Changes:
    """Changes plans, needs a codec, and replaces a codec chain."""

    needs: ClassVar[dict[str, str]] = NEEDS_PLANS
    needs_codecs: ClassVar[tuple[str, ...]] = ("lz4",)
    replaces: ClassVar[tuple[str, ...]] = ("codec_up",)

    def init(self):
        return None

    def decide(self, view, state, decision):
        return decision, state


def check(policy, *, runs=None, **changes):
    """``runs``: codecs of the only class; None: all."""
    config = load_config({"fleet": {"classes": [CLASS | ({} if runs is None else {"codecs": runs})]}} | changes)
    check_policy(policy, config, config.load_fleet())


def test_a_policy_without_statements_is_compatible_with_everything():
    for policy in (All(), chain(Identity(), All()), chain(All(), All())):
        check(policy, runs=[], codecs={"up": ["lz4"]})


@pytest.mark.parametrize("policy", [Identity(), chain(), chain(Identity(), Identity())])
def test_an_empty_policy_is_refused(policy):
    with pytest.raises(
        ConfigError, match=r"^policy is empty, so that no device would be chosen; allowed: a list such as"
    ):
        check(policy)


def test_an_empty_list_is_refused_when_the_run_is_made(tmp_path):
    with pytest.raises(ConfigError, match=r"^policy is empty"):
        fedbonsai.run({"policy": []}, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@dataclass
class Thawed:
    def init(self):
        return None

    def decide(self, view, state, decision):
        return decision, state


@dataclass(frozen=True)
class Mute:
    def decide(self, view, state, decision):
        return decision, state


@pytest.mark.parametrize(
    ("policy", "sentence"),
    [
        (All, "policy is the class All; allowed: an instance of it, as All(...)"),
        (
            Thawed(),
            "policy is Thawed(), which is not a policy: it is not a frozen dataclass; allowed: a frozen dataclass with ",
        ),
        (
            Mute(),
            "policy is Mute(), which is not a policy: it has no init; allowed: a frozen dataclass with init(self) and ",
        ),
        (3, "policy is 3, which is not a policy: it is not a frozen dataclass; "),
        (chain(All(), Mute()), "policy.links[1] is Mute(), which is not a policy: it has no init; "),
        (
            [All()],
            "policy[0] is All(), a fedbonsai.policies.selection.plain.All; it must be text, a number, true, false, null, ",
        ),
    ],
    ids=str,
)
def test_an_object_that_is_not_a_policy_is_refused_in_one_sentence(policy, sentence):
    with pytest.raises(ConfigError) as caught:
        fedbonsai.run(policy=policy)
    assert str(caught.value).startswith(sentence)


@pytest.mark.parametrize("policy", [Changes(), chain(Changes(), All()), chain(Identity(), Changes()),
                                    chain(chain(Changes(), Changes()), All())])  # fmt: skip
def test_a_policy_that_changes_plans_needs_a_selection_before_it(policy):
    with pytest.raises(ConfigError, match=r"^policy\[0\] \(.*:Changes\) only changes plans of the policies before it"):
        check(policy)


def test_behind_a_selection_it_may_have_any_place():
    check(chain(All(), Changes(), Changes(), All()))


def test_every_class_runs_what_a_policy_needs():
    check(chain(All(), Changes()), runs=["lz4", "topk"])
    with pytest.raises(
        ConfigError, match=r"^fleet class 'a' has codecs topk; policy\[1\] .* needs lz4 on every class$"
    ):
        check(chain(All(), Changes()), runs=["topk"])
    with pytest.raises(ConfigError, match=r"^fleet class 'a' has codecs none; "):
        check(chain(All(), Changes()), runs=[])


def test_a_chain_that_would_be_replaced_is_refused():
    check(chain(All(), Changes()), codecs={"down": ["lz4"]})
    with pytest.raises(ConfigError, match=r"^codecs.up is \[lz4\], which policy\[1\] .* would replace in every plan"):
        check(chain(All(), Changes()), codecs={"up": ["lz4"]})


def test_the_codec_chain_down_is_still_used_where_devices_evaluate():
    both = chain(All(), Residuals())
    check(both, codecs={"down": ["lz4"]}, evaluation={"where": "devices"})
    with pytest.raises(ConfigError, match=r"^codecs.down is \[lz4\], which policy\[1\] \(residuals\) would replace"):
        check(both, codecs={"down": ["lz4"]})


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"policy": [{"name": "residuals"}, {"name": "oort", "cohort": 0.5}]},
            "policy[0] (residuals) only changes plans of the policies before it, and none of them chooses devices; "
            "allowed: a selection before it, such as {name: all}",
        ),
        (
            {"fleet": {"classes": [CLASS | {"codecs": ["lz4"]}]}},
            "fleet class 'a' has codecs lz4; policy[1] (residuals) ",
        ),
        ({"codecs": {"up": ["lz4"]}}, "codecs.up is [lz4], which policy[1] (residuals) would replace in every plan; "),
    ],
)
def test_a_run_is_refused_before_it_begins(changes, sentence):
    with pytest.raises(ConfigError) as caught:
        fedbonsai.run({"preset": "resfed"} | changes)
    assert str(caught.value).startswith(sentence)
    assert "\n" not in str(caught.value)


SHARED = {"name": "splitfed", "head": "shared"}


@pytest.mark.parametrize(
    ("policy", "sentence"),
    [
        (
            ["all", SHARED, {"name": "fastest", "cohort": 2}],
            "policy[2] (fastest) chooses devices behind policy[1] (splitfed), which sends plans one after another, so that "
            "only those of one turn could be chosen from; allowed: a selection before it",
        ),
        (
            ["all", "splitfed", "local_loss"],
            "policy[1] (splitfed) cuts the model before policy[2] (local_loss), which cuts it too; allowed: one policy that "
            "cuts the model",
        ),
        (
            ["all", "local_loss", "residuals"],
            "policy[1] (local_loss) cuts the model before policy[2] (residuals), which gives links a memory, and those of a "
            "cut model cannot have one yet; allowed: one of the two",
        ),
        (
            ["all", "residuals", "ecofed"],
            "policy[2] (ecofed) cuts the model behind policy[1] (residuals), which gives links a memory, and those of a cut ",
        ),
        (
            ["all", SHARED, {"name": "closing", "at": 0.5}],
            "policy[1] (splitfed) keeps versions open for plans to come before policy[2] (closing), which closes at a share of "
            "the plans of a version, all of which it must see at once; allowed: a number of updates, or the other order",
        ),
        (
            ["all", SHARED, {"name": "closing", "after_s": 9.0, "partial": True}],
            "policy[2] (closing) has devices stop early behind policy[1] (splitfed), which sends the plans of a round one "
            "after another; allowed: one of the two",
        ),
        (
            ["all", {"name": "closing", "after_s": 9.0, "partial": True}, SHARED],
            "policy[1] (closing) has devices stop early before policy[2] (splitfed), which sends the plans of a round one ",
        ),
        (
            ["asynchronous", {"name": "closing", "at": 2}],
            "policy[0] (asynchronous) sets the number of updates that closes a version before policy[1] (closing), which sets "
            "it too; allowed: one of the two",
        ),
        (
            ["all", {"name": "closing", "after_s": 9.0, "partial": True}, "ecofed"],
            "policy[1] (closing) has devices stop early before policy[2] (ecofed), which has some of them upload views, and a "
            "view must be whole; allowed: the other order",
        ),
    ],
)
def test_policies_that_do_not_go_together_are_refused(policy, sentence):
    with pytest.raises(ConfigError) as caught:
        fedbonsai.run({"policy": policy, "server": {"staleness": {"rule": "constant"}}})
    assert str(caught.value).startswith(sentence)


def test_policies_that_go_together_are_accepted():
    none = {"name": "residuals", "up": "none", "down": "none"}
    for policy in (
        [{"name": "fastest", "cohort": 2}, SHARED],
        ["all", "splitfed", {"name": "fastest", "cohort": 2}],
        ["all", "splitfed", none],
        ["all", {"name": "closing", "at": 0.5}, SHARED],
        ["all", SHARED, {"name": "closing", "at": 2, "after_s": 9.0}],
        ["all", "ecofed", {"name": "closing", "after_s": 9.0, "partial": True}],
        ["all", "residuals"],
    ):
        fedbonsai.run({"policy": policy}).close()


@dataclass(frozen=True)
class Stating:
    """A policy with the statements that a test sets."""

    writes: tuple[str, ...] = ()
    needs: dict[str, str] = field(default_factory=dict)
    forbids_before: dict[str, str] = field(default_factory=dict)
    forbids_behind: dict[str, str] = field(default_factory=dict)
    needs_settings: dict[str, str] = field(default_factory=dict)
    forbids_settings: dict[str, str] = field(default_factory=dict)
    by_class: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def init(self):
        return None

    def decide(self, view, state, decision):
        return decision, state


NAME = f"{__name__}:Stating"


def test_a_users_policy_may_need_what_any_policy_before_it_writes():
    needing = Stating(needs={"split": "codes what crosses a cut, and no policy before it cuts the model"})
    with pytest.raises(ConfigError) as caught:
        check(chain(All(), needing))
    assert str(caught.value) == f"policy[1] ({NAME}) codes what crosses a cut, and no policy before it cuts the model"
    check(chain(All(), SplitFed(), needing))


def test_a_users_policy_may_forbid_what_others_write_on_either_side_of_it():
    sparse = Stating(writes=("training.sparsity",))
    before, behind = (
        Stating(forbids_before={"training.sparsity": "why"}),
        Stating(forbids_behind={"training.sparsity": "why"}),
    )
    check(chain(All(), before, sparse))
    check(chain(All(), sparse, behind))
    for policy, sentence in (
        (
            chain(All(), sparse, before),
            f"policy[1] ({NAME}) sets how sparsely the model is trained before policy[2] ({NAME}), why",
        ),
        (
            chain(All(), behind, sparse),
            f"policy[2] ({NAME}) sets how sparsely the model is trained behind policy[1] ({NAME}), why",
        ),
    ):
        with pytest.raises(ConfigError) as caught:
            check(policy)
        assert str(caught.value) == sentence


def test_to_need_or_forbid_a_field_is_to_need_or_forbid_each_of_its_fields():
    wide, whole = Stating(writes=("part.width",)), Stating(writes=("part",))
    forbidding, exact = Stating(forbids_before={"part": "why"}), Stating(forbids_before={"part.width": "why"})
    for policy, deed in (
        (chain(All(), wide, forbidding), "narrows the model"),
        (chain(All(), whole, forbidding), "sets what part of the model is trained"),
    ):
        with pytest.raises(ConfigError) as caught:
            check(policy)
        assert str(caught.value) == f"policy[1] ({NAME}) {deed} before policy[2] ({NAME}), why"
    check(chain(All(), whole, exact))
    check(chain(All(), wide, Stating(needs={"part": "why"})))
    with pytest.raises(ConfigError, match=r"^policy\[2\] .* why$"):
        check(chain(All(), whole, Stating(needs={"part.width": "why"})))


def test_where_each_order_is_forbidden_neither_is_advised():
    other, none = Stating(writes=("split",), forbids_before={"part": "one"}), {"split": "the other order"}
    with pytest.raises(ConfigError, match=r", one$"):
        check(chain(All(), Stating(writes=("part",), forbids_behind=none), other))


def test_a_field_by_class_names_all_classes_of_the_fleet():
    check(chain(All(), Stating(by_class={"rates": ("a",)})))
    for named, sentence in (
        (("a", "b"), "rates names the class 'b', which the fleet does not have; allowed: a"),
        ((), "rates has no rate for the class 'a'; it must name all of: a"),
    ):
        with pytest.raises(ConfigError) as caught:
            check(chain(All(), Stating(by_class={"rates": named})))
        assert str(caught.value) == f"policy[1] ({NAME}): {sentence}"


def test_a_policy_that_states_no_writes_chooses_devices_unless_it_needs_them_chosen():
    barred = Stating(writes=("plans",), forbids_behind={"plans": "why"})
    check(chain(barred, Changes()))
    with pytest.raises(ConfigError, match=r"^policy\[1\] \(random\) chooses devices behind policy\[0\] .*, why$"):
        check(chain(barred, RandomCohort(cohort=1)))


def test_settings_that_a_policy_needs_or_forbids():
    needing = chain(All(), Stating(needs_settings={"codecs.up": "why", "server.staleness": "why not"}))
    with pytest.raises(ConfigError, match=r"^codecs.up is empty; policy\[1\] \(.*:Stating\) why$"):
        check(needing)
    with pytest.raises(ConfigError, match=r"^server.staleness is null; policy\[1\] \(.*:Stating\) why not$"):
        check(needing, codecs={"up": ["lz4"]})
    check(needing, codecs={"up": ["lz4"]}, server={"staleness": {"rule": "constant"}})
    forbidding = chain(All(), Stating(forbids_settings={"training.optimiser.momentum": "has its own; allowed: 0"}))
    check(forbidding, training={"optimiser": {"momentum": 0.0}})
    with pytest.raises(
        ConfigError, match=r"^training.optimiser.momentum is 0.5; policy\[1\] .* has its own; allowed: 0$"
    ):
        check(forbidding, training={"optimiser": {"momentum": 0.5}})
    with pytest.raises(
        ConfigError, match=r"^policy\[1\] \(.*:Stating\) names the setting 'server.stale', which there is not"
    ):
        check(chain(All(), Stating(needs_settings={"server.stale": "why"})))


@pytest.mark.parametrize(
    ("statement", "value", "sentence"),
    [
        ("needs", 3, "needs of WHO is 3; it must be a dict"),
        ("needs", {"split": 1}, "needs['split'] of WHO is 1; it must be text"),
        ("writes", "split", "writes of WHO is 'split'; it must be a list or tuple or None"),
        (
            "writes",
            ("part.widths",),
            "writes of WHO names 'part.widths' (did you mean 'part.width'?); allowed: fields of a decision or a plan, ",
        ),
        (
            "writes",
            ("splits",),
            "writes of WHO names 'splits' (did you mean 'split'?); allowed: fields of a decision or a plan, ",
        ),
        (
            "forbids_behind",
            {"x": ""},
            "forbids_behind of WHO names 'x'; allowed: fields of a decision or a plan, plans, ",
        ),
    ],
)
def test_a_statement_of_a_wrong_type_or_of_no_field_is_refused(statement, value, sentence):
    with pytest.raises(ConfigError) as caught:
        check(chain(All(), Stating(**{statement: value})))
    assert str(caught.value).startswith(sentence.replace("WHO", f"policy[1] ({NAME})"))


@pytest.mark.parametrize("name", ["splitfed", "local_loss", "ecofed"])
def test_clipping_is_refused_where_the_model_is_cut(name):
    clipped = {"training": {"optimiser": {"clip_norm": 1.5}}}
    with pytest.raises(
        ConfigError, match=rf"^training.optimiser.clip_norm is 1.5; policy\[1\] \({name}\) cuts the model, "
    ):
        fedbonsai.run(clipped | {"policy": ["all", name]})
    fedbonsai.run(clipped | {"policy": ["all"]}).close()


class ByName(nn.Module):
    """Its output is a dict, which no auxiliary head can replace."""

    def __init__(self):
        super().__init__()
        self.front, self.back = nn.Linear(4, 8), nn.Linear(8, 10)

    def forward(self, x):
        return {"scores": self.back(self.front(x))}


def first_loss(output, target):
    return nn.functional.cross_entropy(output["scores"], target)


def by_name(*policy):
    data = {"name": "synthetic", "kwargs": {"shape": [4], "classes": 10, "samples_per_device": 4}}
    fleet = {"classes": [CLASS | {"memory_bytes": 10**9}]}
    run = fedbonsai.run({"model": f"{__name__}:ByName", "data": data, "fleet": fleet, "backend": "inline",
                         "training": {"loss": f"{__name__}:first_loss"}, "stop": {"rounds": 1},
                         "evaluation": {"where": "none"}, "policy": ["all", *policy]})  # fmt: skip
    return [type(event).__name__ for event in run]


def test_a_local_loss_needs_a_head():
    expected = r"^policy\[1\] \(local_loss\) needs 'linear@front', and there can be none: the output of block 'back' is not one"
    for cut in ("front", "", "auto"):
        with pytest.raises(ConfigError, match=expected):
            by_name({"name": "local_loss", "cut": cut})
    assert "RunEnded" in by_name("splitfed")


def test_a_run_with_a_policy_object_is_refused_too():
    with pytest.raises(ConfigError, match=r"^policy\[0\] \(residuals\) only changes plans"):
        fedbonsai.run(policy=Residuals())
