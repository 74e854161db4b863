"""Bare PyTorch: no transport and no aggregation; every device starts from the same weights.

Modes: ``processes`` (as many as workers, one thread each, which divide the devices evenly), or one process with as many threads
as OMP_NUM_THREADS says.
"""

import multiprocessing
from multiprocessing.connection import Connection

import torch
from work import Work, train_device, work, write_end, write_round

Trained = list[tuple[int, float]]  # of each device: steps, loss of the first batch


class Loop:
    """The devices one after another."""

    def __init__(self, settings: Work) -> None:
        self.settings, self.model = settings, settings.model()
        self.start = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}

    def train(self, devices: list[int], seed: int) -> Trained:
        """Train these devices."""
        found = []
        for device in devices:
            self.model.load_state_dict(self.start)
            found.append(train_device(self.model, device, work=self.settings, seed=seed + device))
        return found


def worker(pipe: Connection, settings: Work) -> None:
    """A process that trains the devices that it receives."""
    torch.set_num_threads(1)
    loop = Loop(settings)
    while (asked := pipe.recv()) is not None:
        pipe.send(loop.train(*asked))


class Processes:
    """One loop a process."""

    def __init__(self, settings: Work) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipes: list[Connection] = []
        for _ in range(settings.workers):
            ours, theirs = context.Pipe()
            context.Process(target=worker, args=(theirs, settings), daemon=True).start()
            theirs.close()  # so that a worker's death is an EOFError
            self.pipes.append(ours)

    def train(self, devices: list[int], seed: int) -> Trained:
        """Train these devices. Raises ``EOFError`` if a process has died."""
        for number, pipe in enumerate(self.pipes):
            pipe.send((devices[number :: len(self.pipes)], seed))
        return [each for pipe in self.pipes for each in pipe.recv()]


def main() -> None:
    settings = work()
    loop = Processes(settings) if settings.mode == "processes" else Loop(settings)
    losses: list[float] = []
    for number in range(settings.rounds):
        first = number * settings.cohort  # the next devices, round and round
        devices = [(first + i) % settings.devices for i in range(settings.cohort)]
        found = loop.train(devices, seed=number * settings.devices)
        losses = losses or [loss for _, loss in found]
        write_round(number + 1, clients=len(found), steps=sum(steps for steps, _ in found))
    write_end(losses, None)


if __name__ == "__main__":
    main()
