"""Flower: its FedAvg on its Ray simulation engine, a worker a core; nothing is evaluated or logged."""

import logging
from functools import lru_cache
from typing import Any

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from work import train_device, work, write_end, write_round

client, server = ClientApp(), ServerApp()


@lru_cache(maxsize=1)
def network() -> torch.nn.Module:
    """Of this worker process, which trains one client after another."""
    torch.set_num_threads(1)
    return work().model()


@client.train()
def train(message: Message, context: Context) -> Message:
    """One client's epoch."""
    device = int(context.node_config["partition-id"])
    model = network()
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    seed = int(message.content["config"]["server-round"]) * work().devices + device
    steps, loss = train_device(model, device, work=work(), seed=seed)
    samples = len(work().shard(device)[1])
    content = RecordDict(
        {
            "arrays": ArrayRecord(model.state_dict()),
            "metrics": MetricRecord({"num-examples": samples, "steps": steps, "first-loss": loss}),
        }
    )
    return Message(content=content, reply_to=message)


class Rounds(FedAvg):
    """Writes when each round is over."""

    losses: list[float]

    def aggregate_train(self, server_round: int, replies: Any) -> Any:
        """Another round is over."""
        replies = list(replies)
        good = [reply.content["metrics"] for reply in replies if not reply.has_error()]
        found = super().aggregate_train(server_round, replies)
        if server_round == 1:
            self.losses = [float(metrics["first-loss"]) for metrics in good]
        write_round(server_round, clients=len(good), steps=sum(int(metrics["steps"]) for metrics in good))
        return found


@server.main()
def serve(grid: Grid, context: Context) -> None:
    """All rounds."""
    settings = work()
    strategy = Rounds(
        fraction_train=settings.cohort / settings.devices,
        fraction_evaluate=0.0,
        min_train_nodes=settings.cohort,
        min_available_nodes=settings.devices,
    )
    model = settings.model()
    result = strategy.start(grid, initial_arrays=ArrayRecord(model.state_dict()), num_rounds=settings.rounds)
    model.load_state_dict(result.arrays.to_torch_state_dict())
    write_end(strategy.losses, model)


def main() -> None:
    logging.getLogger("flwr").setLevel(logging.ERROR)
    settings = work()
    run_simulation(
        server_app=server,
        client_app=client,
        num_supernodes=settings.devices,
        backend_config={
            "init_args": {"num_cpus": settings.workers, "include_dashboard": False, "log_to_driver": False},
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
        },
    )


if __name__ == "__main__":
    # By a name that Ray's workers can import, so that they keep their network from client to client.
    from run_flower import main as importable

    importable()
