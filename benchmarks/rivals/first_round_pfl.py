"""pfl: FedAvg of ``small`` over 100 users with 100 samples each, ten a round, in one process with torch's own threads.

Prints a line of JSON: seconds from the start of the process to the end of the first round, and of each later one.
"""

import json
import os
import time
from itertools import pairwise

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
from pfl.metrics import Metrics
from pfl.model.pytorch import PyTorchModel

STARTED = float(os.environ["STARTED"])  # on time.time()'s clock
ROUNDS = int(os.environ.get("ROUNDS", "4"))
ENDS: list[float] = []


class Small(torch.nn.Sequential):
    """The network, with what pfl asks for."""

    def __init__(self) -> None:
        super().__init__(
            torch.nn.Conv2d(3, 32, 5, padding=2),
            torch.nn.ReLU(),
            torch.nn.MaxPool2d(2),
            torch.nn.Conv2d(32, 64, 5, padding=2),
            torch.nn.ReLU(),
            torch.nn.MaxPool2d(2),
            torch.nn.Flatten(),
            torch.nn.Linear(4096, 512),
            torch.nn.ReLU(),
            torch.nn.Linear(512, 10),
        )

    def loss(self, inputs, targets, eval=False):
        """pfl's name for the training loss."""
        self.eval() if eval else self.train()
        return torch.nn.functional.cross_entropy(self(torch.as_tensor(inputs)), torch.as_tensor(targets))

    def metrics(self, inputs, targets, eval=True):
        """None: nothing is evaluated here, nor in the other two."""
        return {}


class Seconds(TrainingProcessCallback):
    """When each round was over."""

    def after_central_iteration(self, aggregate_metrics, model, *, central_iteration):
        """Another round is over."""
        ENDS.append(time.time() - STARTED)
        return False, Metrics()


def user(number: int) -> Dataset:
    generator = torch.Generator().manual_seed(number)
    images = torch.randn(100, 3, 32, 32, generator=generator)
    return Dataset(raw_data=[images, torch.randint(0, 10, (100,), generator=generator)])


def main() -> None:
    sampler = get_user_sampler("minimize_reuse", list(range(100)))
    data = FederatedDataset(user, sampler)
    network = Small()
    model = PyTorchModel(network, torch.optim.SGD, torch.optim.SGD(network.parameters(), 1.0))
    np.random.seed(0)
    FederatedAveraging().run(
        NNAlgorithmParams(ROUNDS, 10**9, 10, None),
        SimulatedBackend(training_data=data, val_data=data),
        model,
        NNTrainHyperParams(local_batch_size=32, local_num_epochs=1, local_learning_rate=0.01),
        NNEvalHyperParams(local_batch_size=256),
        callbacks=[Seconds()],
    )
    print(json.dumps({"first_s": ENDS[0], "round_s": [b - a for a, b in pairwise(ENDS)]}))


if __name__ == "__main__":
    main()
