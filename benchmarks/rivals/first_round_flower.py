"""Flower: FedAvg of ``small`` over 100 clients with 100 samples each, ten a round, on its Ray simulation engine.

One core a client, as its documentation recommends for processors. Prints a line of JSON: seconds from the start of the
process to the end of the first round, and of each later one.
"""

import json
import os
import time
from itertools import pairwise

import torch
from flwr.client import ClientApp, NumPyClient
from flwr.common import ndarrays_to_parameters
from flwr.server import ServerApp, ServerAppComponents, ServerConfig
from flwr.server.strategy import FedAvg
from flwr.simulation import run_simulation

STARTED = float(os.environ["STARTED"])  # on time.time()'s clock
ROUNDS = int(os.environ.get("ROUNDS", "4"))
ENDS: list[float] = []


def network() -> torch.nn.Module:
    return torch.nn.Sequential(
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


class Client(NumPyClient):
    """One of the hundred."""

    def __init__(self, number: int) -> None:
        generator = torch.Generator().manual_seed(number)
        self.images = torch.randn(100, 3, 32, 32, generator=generator)
        self.labels = torch.randint(0, 10, (100,), generator=generator)

    def fit(self, parameters, config):
        """One local epoch."""
        torch.set_num_threads(1)
        model = network()
        state = dict(zip(model.state_dict(), map(torch.as_tensor, parameters), strict=True))
        model.load_state_dict(state)
        optimiser = torch.optim.SGD(model.parameters(), 0.01)
        for start in range(0, 100, 32):
            optimiser.zero_grad()
            loss = torch.nn.functional.cross_entropy(
                model(self.images[start : start + 32]), self.labels[start : start + 32]
            )
            loss.backward()
            optimiser.step()
        return [tensor.numpy() for tensor in model.state_dict().values()], 100, {}


class Timed(FedAvg):
    """Notes when each round is over."""

    def aggregate_fit(self, server_round, results, failures):
        """Another round is over."""
        assert not failures, failures
        found = super().aggregate_fit(server_round, results, failures)
        ENDS.append(time.time() - STARTED)
        return found


def client_fn(context):
    return Client(int(context.node_config["partition-id"])).to_client()


def server_fn(context):
    initial = ndarrays_to_parameters([tensor.numpy() for tensor in network().state_dict().values()])
    strategy = Timed(fraction_fit=0.1, fraction_evaluate=0.0, min_available_clients=100, initial_parameters=initial)
    return ServerAppComponents(strategy=strategy, config=ServerConfig(num_rounds=ROUNDS))


def main() -> None:
    run_simulation(
        server_app=ServerApp(server_fn=server_fn),
        client_app=ClientApp(client_fn=client_fn),
        num_supernodes=100,
        backend_config={"client_resources": {"num_cpus": 1, "num_gpus": 0.0}},
    )
    print(json.dumps({"first_s": ENDS[0], "round_s": [b - a for a, b in pairwise(ENDS)]}))


if __name__ == "__main__":
    main()
