"""Tasks of the server: work on the model that belongs to a round, beside folding updates.

A task begins with the decision that holds it, sees each update when it is folded, and changes the model when the version
closes. It runs in an actor of its own (``actors/distiller``), and the virtual clock charges it at the server's declared speed.
"""

from typing import Annotated, Literal

import msgspec

from ..learning.spec import Count, CountOrZero, NonNegative, Positive


class Distil(
    msgspec.Struct,
    frozen=True,
    kw_only=True,
    omit_defaults=True,
    forbid_unknown_fields=True,
    tag="distil",
    tag_field="name",
):
    """Ensemble distillation on the public set: the updated models of the devices teach the averaged model.

    Lin et al., "Ensemble Distillation for Robust Model Fusion in Federated Learning", NeurIPS 2020, arXiv 2006.07242. Each
    update that is folded is a teacher. The teachers' logits on the public set are averaged, and the mean of the updates is
    trained towards them::

        loss = T^2 KL(softmax(mean_k logits_k / T) || softmax(logits / T))

    Attributes:
        steps: optimiser steps (Adam, learning rate decaying to 0 by a cosine); 0 evaluates and changes nothing.
        learning_rate: at the first step.
        batch_size: samples of one step.
        temperature: T.
        weighting: teachers count equally, or by their samples.
        class_prior: strength of the correction for teachers that lack classes: ``class_prior`` x the log of the teacher's share
            of each class is subtracted from its logits (Menon et al., ICLR 2021, arXiv 2007.07314). The
            devices' label counts are sent for it.
        held_out: share of the public set on which the student is evaluated and not trained.
        check_every: steps between evaluations on the held-out share.
        patience: steps without a better evaluation after which training stops.
    """

    steps: CountOrZero = 1000
    learning_rate: Positive = 1e-3
    batch_size: Count = 128
    temperature: Positive = 1.0
    weighting: Literal["equal", "samples"] = "equal"
    class_prior: NonNegative = 0.0
    held_out: Annotated[float, msgspec.Meta(gt=0, lt=1)] = 0.1
    check_every: Count = 50
    patience: Count = 500


ServerTask = Distil  # a union, once there are more
