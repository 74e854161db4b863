"""The plans of split learning by local losses."""

import pytest
from fedbonsai.learning.parts.part import Part
from fedbonsai.policies.decision import Decision
from fedbonsai.policies.partitioning.local_loss import LocalLoss


def test_a_device_holds_the_front_and_a_head_of_its_own(make_view, make_plan):
    view = make_view(hosts=2)
    policy = LocalLoss(window=3, bits=4)
    decided, _ = policy.decide(view, policy.init(), Decision(plans=(make_plan(1), make_plan(2))))
    head = "linear@conv"
    for plan, host in zip(decided.plans, (1, 0), strict=True):
        assert plan.part == Part(blocks=("conv",), trained=("conv",), head=head, auxiliaries=(head,))
        assert (plan.split.cut, plan.split.host, plan.split.mode, plan.split.window) == ("conv", host, "local_loss", 3)
        assert [codec.name for codec in plan.split.codec_up] == ["uniform", "entropy"]
        assert plan.reasons == ("local_loss: cut behind conv",)


def test_wrong_cuts_are_refused(make_view, make_plan):
    policy = LocalLoss(cut="fc")
    with pytest.raises(ValueError, match=r"^cut is 'fc'; this model can be cut behind: conv$"):
        policy.decide(make_view(), None, Decision(plans=(make_plan(0),)))
    with pytest.raises(ValueError, match="bits is 1"):
        LocalLoss(bits=1)
    with pytest.raises(ValueError, match="window"):
        LocalLoss(window=0)
