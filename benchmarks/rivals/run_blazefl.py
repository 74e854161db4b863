"""BlazeFL: its FedAvg server with its pool of processes, through shared memory (a new pool each round), or of threads."""

import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from blazefl.contrib.fedavg import (
    FedAvgBaseServerHandler,
    FedAvgDownlinkPackage,
    FedAvgProcessPoolClientTrainer,
    FedAvgProcessPoolUplinkPackage,
    FedAvgThreadPoolClientTrainer,
    FedAvgUplinkPackage,
)
from blazefl.core import IPCMode, SHMHandle, deserialize_model, serialize_model
from work import train_device, work, write_end, write_round

SETTINGS = work()
LOCAL = threading.local()


@dataclass
class Config:
    """What the process of a client gets."""

    cid: int
    seed: int


class Selector:
    """BlazeFL's way to make a network."""

    def select_model(self, model_name: str) -> torch.nn.Module:
        """The network with the sealed weights."""
        return SETTINGS.model()


def train(cid: int, parameters: torch.Tensor, seed: int) -> tuple[torch.Tensor, int, dict[str, float]]:
    """One client's epoch, on the network of this thread."""
    if not hasattr(LOCAL, "model"):
        torch.set_num_threads(1)
        LOCAL.model = SETTINGS.model()
    deserialize_model(LOCAL.model, parameters)
    steps, loss = train_device(LOCAL.model, cid, work=SETTINGS, seed=seed)
    samples = len(SETTINGS.shard(cid)[1])
    return serialize_model(LOCAL.model), samples, {"steps": steps, "loss": loss}


class Processes(FedAvgProcessPoolClientTrainer):
    """A pool of processes; the part of its contributed trainer that trains is replaced, as momentum asks."""

    round = 0

    def progress_fn(self, it: list[Any]) -> list[Any]:
        """No bar."""
        return it

    def prepare_uplink_package_buffer(self) -> FedAvgProcessPoolUplinkPackage:
        """Where a process puts its parameters; figures come back beside it, under the same keys."""
        parameters = self.model_parameters_buffer.clone()
        return FedAvgProcessPoolUplinkPackage(-1, parameters, 0, {"steps": 0, "loss": 0.0})

    def get_client_config(self, cid: int) -> Any:
        """All that differs between clients."""
        return Config(cid, self.round * SETTINGS.devices + cid)

    @staticmethod
    def worker(config: Any, payload: Any, device: str, stop_event: Any, *, shm_buffer: Any = None) -> Any:
        """One client, in a process of the pool."""
        parameters, samples, figures = train(config.cid, payload.model_parameters, config.seed)
        shm_buffer.model_parameters.copy_(parameters)
        return FedAvgProcessPoolUplinkPackage(config.cid, SHMHandle(), samples, figures)


class Threads(FedAvgThreadPoolClientTrainer):
    """A pool of threads."""

    round = 0

    def progress_fn(self, it: list[Any]) -> list[Any]:
        """No bar."""
        return it

    def worker(self, cid: int, device: str, payload: FedAvgDownlinkPackage, stop_event: Any) -> FedAvgUplinkPackage:
        """One client, in a thread of the pool."""
        parameters, samples, figures = train(cid, payload.model_parameters, self.round * SETTINGS.devices + cid)
        return FedAvgUplinkPackage(cid, parameters, samples, figures)


def trainer() -> Processes | Threads:
    """Of the mode."""
    shared: dict[str, Any] = {
        "model_selector": Selector(), "model_name": SETTINGS.net, "dataset": None, "device": "cpu", "epochs": 1,
        "num_clients": SETTINGS.devices, "batch_size": SETTINGS.batch, "lr": 0.0, "seed": 0,
        "num_parallels": SETTINGS.workers,
    }  # fmt: skip
    if SETTINGS.mode == "threads":
        return Threads(**shared)
    folder = Path(SETTINGS.folder) / "blazefl"
    return Processes(**shared, share_dir=folder, state_dir=folder, ipc_mode=IPCMode.SHARED_MEMORY)


def main() -> None:
    torch.set_num_threads(1)  # before processes are forked
    server = FedAvgBaseServerHandler(
        Selector(), SETTINGS.net, None, SETTINGS.rounds, SETTINGS.devices, SETTINGS.cohort / SETTINGS.devices,
        "cpu", SETTINGS.batch, 0,
    )  # fmt: skip
    clients, losses = trainer(), list[float]()
    if SETTINGS.mode != "threads":
        LOCAL.model = SETTINGS.model()  # processes of the pool, forked each round, have it from the start
    while not server.if_stop():
        clients.round = server.round
        clients.local_process(server.downlink_package(), server.sample_clients())
        packages = clients.uplink_package()
        for package in packages:
            server.load(package)
        losses = losses or [package.metadata["loss"] for package in packages]
        steps = sum(int(package.metadata["steps"]) for package in packages)
        write_round(server.round, clients=len(packages), steps=steps)
    write_end(losses, server.model)


if __name__ == "__main__":
    main()
