"""The policy contract.

A policy receives a view and returns a decision; the runtime carries it out. The loop that calls it::

    state = policy.init()
    while not stopped:
        view = ...                                    # numbers only, frozen
        decision, state = policy.decide(view, state, Decision())
        for plan in decision.plans: dispatch(plan)
        wait for an outcome, fold it, close the version when the decision says so

``decide`` is called at the start, after every version, and after every outcome.

A policy is a frozen dataclass: its fields are its configuration, so it prints, compares and can be written to the run
folder. It has no hidden state: everything that it needs later is the state, plain data (numbers, strings, lists, dicts)
that is passed in and returned, so that a run can be saved, replayed and resumed. Random numbers come from ``view.seed``. The
return value is checked after every call (``policies.checks.answer``).

A policy may state facts about itself, as attributes of its class or as properties. They are compared with each other and with
the configuration before anything is built, so that a combination that cannot work is refused at once with one sentence
(``policies.checks.statements``, ``runtime.configuration.policy_checks``). All of them may be missing; a policy without any
chooses devices and is compatible with everything.

Against the other policies of the chain. Names are those of fields of ``Plan`` and ``Decision``; a reason completes the sentence
that the user gets:

    writes            fields that it sets ("split", "codec_up", "close_at", ...); "plans": it chooses devices. ``left_out`` and
                      ``reasons`` need not be named. Missing: ("plans",), or () for a policy that needs "plans". A policy that
                      changes one field of a part, a split or an upload only may name that field: "part.width". To need or
                      forbid "part" is to need or forbid each of its fields
    needs             {field: reason}: fields that a policy before it must have written. The sentence is
                      "<this policy> <reason>". ``NEEDS_PLANS`` is that of a policy which only changes plans
    forbids_before    {field: reason}: fields that no policy before it may write. The sentence is
                      "<other policy> cuts the model before <this policy>, <reason>"
    forbids_behind    {field: reason}: fields that no policy behind it may write

Against the configuration, the fleet and the model:

    needs_settings    {setting: reason}: settings that must be set, not null, empty, false or 0 ("server.staleness").
                      The sentence is "<setting> is <value>; <this policy> <reason>"
    forbids_settings  {setting: reason}: settings that must not be set
    replaces          "codec_down", "codec_up": codec chains that it sets in every plan, whatever ``codecs`` says
    needs_codecs      names of codecs that every class of the fleet must be able to run
    needs_kinds       kinds of data that every class of the fleet must be allowed to send (``may_send``)
    by_class          {field: names}: fields of the policy that hold a value for each class of the fleet, and the classes that
                      they name, which must be all classes and no other
    cuts              names of blocks behind which it may cut the model, in the model's order
    sparsities        sparsities of weights and activations that its plans may have, beside the configured one
    auxiliaries       method: given the names of the model's blocks, names of the auxiliaries that its plans may train

Not checked, but acted on:

    fits_plans        bool: it makes plans that fit their devices' memory, and leaves out devices for which there is none;
                      policies before it in a chain see ``view.fits_later``
    distils           bool: its tasks include ensemble distillation, for which the run has a distiller and a public set
    freezes           bool: the blocks before the cut are never trained; a notice is given where their weights are random
    trunk_end         name of the last of these blocks, one of ``cuts`` (missing, "": the model's first block)
    upload_period     method: given (by keyword) the numbers of ``devices`` that can take part, devices in a ``cohort`` and
                      ``rounds``, how often its plans upload views, on which the hosts train in between: an ``UploadPeriod``
    notices           method: given the configured ``training``, sentences for the operator when the run is made
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from .checks.answer import check_answer, check_state
from .decision import Decision
from .view import View

# Plain data: None, bool, int, float, str, bytes, and lists, tuples, sets and dicts of these (``policies.checks.answer``).
State = Any

# ``needs`` of a policy that only changes plans.
NEEDS_PLANS = {
    "plans": "only changes plans of the policies before it, and none of them chooses devices; "
    "allowed: a selection before it, such as {name: all}"
}


@runtime_checkable
class Policy(Protocol):
    """Decides which devices do what.

    ``init`` gives the state before the first decision. ``decide`` receives the decision of the policies before it in the
    chain and returns its own version of it, and the new state; it changes neither argument.
    """

    def init(self) -> State:
        """The state before the first decision."""
        ...

    def decide(self, view: View, state: State, decision: Decision) -> tuple[Decision, State]:
        """The decision on one view, and the new state; the module's docstring says when it is called."""
        ...


@dataclass(frozen=True)
class Identity:
    """Changes nothing: the smallest policy, and the empty chain."""

    def init(self) -> State:
        """No state."""
        return None

    def decide(self, view: View, state: State, decision: Decision) -> tuple[Decision, State]:
        """Return the decision unchanged."""
        return decision, state


@dataclass(frozen=True)
class Chain:
    """Policies one after another, each refining the decision of those before it. The state is the list of their states."""

    links: tuple[Policy, ...]

    def init(self) -> State:
        """The links' states, in order."""
        states = [link.init() for link in self.links]
        for position, (link, state) in enumerate(zip(self.links, states, strict=True)):
            check_state(state, who=_name(position, link))
        return states

    def decide(self, view: View, state: State, decision: Decision) -> tuple[Decision, State]:
        """Call each link in turn. Raises ``BadAnswer`` for a link that breaks the contract."""
        after = []
        for position, (link, before) in enumerate(zip(self.links, state, strict=True), 1):
            link_view = view
            if any(_fits_plans(later) for later in self.links[position:]):
                link_view = dataclasses.replace(view, fits_later=True)
            answer: Any = link.decide(link_view, before, decision)
            check_answer(answer, who=_name(position - 1, link))
            decision, new = answer
            after.append(new)
        return decision, after


def _name(position: int, link: Policy) -> str:
    """A policy of a chain, as errors name it."""
    return f"policy[{position}] ({type(link).__name__})"


def _fits_plans(policy: Policy) -> bool:
    """Whether a policy, or one of a chain, makes plans that fit memory."""
    if isinstance(policy, Chain):
        return any(_fits_plans(link) for link in policy.links)
    return bool(getattr(policy, "fits_plans", False))


def chain(*links: Policy) -> Policy:
    """Policies one after another: itself a policy. ``chain()`` is the identity, ``chain(p)`` is ``p``."""
    if not links:
        return Identity()
    return links[0] if len(links) == 1 else Chain(links)
