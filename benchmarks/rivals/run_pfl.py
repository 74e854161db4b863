"""pfl: FedAvg by its simulation backend. Mode ``processes``: started by torchrun, a rank a worker; else in one process.

Pfl trains by its own loop, on batches in the order of the samples; nothing is evaluated.
"""

from typing import Any

import numpy as np
import torch
from pfl.aggregate.simulate import SimulatedBackend
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.dataset import Dataset
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.sampling import get_user_sampler
from pfl.hyperparam.base import NNEvalHyperParams, NNTrainHyperParams
from pfl.internal.ops.selector import get_framework_module
from pfl.metrics import Metrics
from pfl.model.pytorch import PyTorchModel
from work import LEARNING_RATE, sgd, work, write_end, write_round

SETTINGS = work()


class Counted:
    """Loss of the network, and how often a rank computed it. ``first``: losses of the devices' first batches in round 1."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model, self.steps, self.first, self.round = model, 0, list[float](), 1
        self.batches = -(-len(SETTINGS.shard(0)[0]) // SETTINGS.batch)

    def loss(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Pfl's name for the training loss."""
        self.model.train()
        value = torch.nn.functional.cross_entropy(self.model(inputs.contiguous(memory_format=SETTINGS.layout)), targets)
        if self.round == 1 and self.steps % self.batches == 0:
            self.first.append(float(value.detach()))
        self.steps += 1
        return value


class Rounds(TrainingProcessCallback):
    """Writes when each round is over."""

    def __init__(self, counted: Counted) -> None:
        self.counted = counted

    def after_central_iteration(self, aggregate_metrics: Any, model: Any, *, central_iteration: int) -> Any:
        """A round is over. The steps follow from the clients; ``main`` compares them with those that were made."""
        figures = aggregate_metrics.to_simple_dict()
        clients = next(int(value) for name, value in figures.items() if "number of devices" in name)
        if get_framework_module().distributed.global_rank == 0:
            write_round(central_iteration + 1, clients=clients, steps=clients * self.counted.batches)
        self.counted.round += 1
        return False, Metrics()


def user(number: int) -> Dataset:
    return Dataset(raw_data=list(SETTINGS.shard(number)))


def main() -> None:
    data = FederatedDataset(user, get_user_sampler("minimize_reuse", list(range(SETTINGS.devices))))
    network = SETTINGS.model()
    counted = Counted(network)
    network.loss = counted.loss
    network.metrics = lambda *batch: {}
    model = PyTorchModel(
        network,
        sgd,
        torch.optim.SGD(network.parameters(), 1.0),
        amp_dtype=torch.bfloat16 if SETTINGS.bf16 else None,
    )
    np.random.seed(0)
    FederatedAveraging().run(
        NNAlgorithmParams(
            central_num_iterations=SETTINGS.rounds,
            evaluation_frequency=10**9,
            train_cohort_size=SETTINGS.cohort,
            val_cohort_size=None,
        ),
        SimulatedBackend(training_data=data, val_data=data),
        model,
        NNTrainHyperParams(local_batch_size=SETTINGS.batch, local_num_epochs=1, local_learning_rate=LEARNING_RATE),
        NNEvalHyperParams(local_batch_size=256),
        callbacks=[Rounds(counted)],
    )
    ranks: list[Any] = [(counted.steps, counted.first)]
    if (distributed := get_framework_module().distributed).world_size > 1:
        ranks = [None] * distributed.world_size
        torch.distributed.all_gather_object(ranks, (counted.steps, counted.first))
    if distributed.global_rank == 0:
        made, expected = sum(steps for steps, _ in ranks), SETTINGS.rounds * SETTINGS.cohort * counted.batches
        assert made == expected, f"{made} steps, not {expected}"
        write_end([loss for _, first in ranks for loss in first], network)
    if distributed.world_size > 1:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
