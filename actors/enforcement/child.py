"""The child process of a worker: a ``Device`` without Ray, which carries out each plan under a limit of its data segment.

    start ──► load data, warm up torch ──► idle ──► plan: model built, limit = idle + budget, Device.run, limit lifted ──► idle

The limit is set when plan, packets and link state have been received and the plan's model is built, and covers what comes then:
opening, training (with the model's weights, built already, counted against the budget) and sealing. Freed memory is returned
before. The process has as many torch threads as a worker, and draws every random number from the plan, so it computes the same
bits. Trials are made in forks, in which torch can have one thread alone.

Standard output is for messages; what user code prints goes to standard error. The process and its forks end when the parent
does.
"""

import ctypes
import gc
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
import numpy as np

from ...clusters.allocator import importing
from ...clusters.user_modules import find_beside
from ...comms.codec import Array
from ...learning.workload_settings import WorkloadSettings
from ...policies.plan import Plan
from ..messages.host_messages import StreamFault
from ..messages.plan_message import read_plan
from .data_segment import data_bytes, limited, trim
from .frames import read_frame, write_frame

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def main() -> None:
    """Carry out requests until the parent is gone. The first argument is the descriptor of the lifeline."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends this process
    requests, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    with Path(os.devnull).open("rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    os.dup2(2, 1)
    threading.Thread(target=_end_with_parent, args=(int(sys.argv[1]),), daemon=True).start()
    header, _ = read_frame(requests)
    try:
        child = Child(header, requests, answers)
    except Exception as error:  # of the user's data or model: the parent raises it again
        write_frame(answers, _described(error))
        return
    write_frame(answers, {"kind": "ready", "idle": data_bytes()})
    child.serve()


def _end_with_parent(lifeline: int) -> None:
    """End this process when the parent, which alone has the pipe's other end, has ended."""
    os.read(lifeline, 1)
    os._exit(1)


def _end_fork_with(parent: int) -> None:
    """Have the kernel kill this fork when ``parent`` has ended. (A fork has no thread that could watch a pipe.)"""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it had ended before
        os._exit(1)


def _described(error: Exception) -> dict[str, Any]:
    return {"kind": "error", "value": isinstance(error, ValueError), "text": f"{error}" or type(error).__name__}


class Child:
    """The device of this process, and the pipes to the parent."""

    enforces = True

    def __init__(self, header: dict[str, Any], requests: BinaryIO, answers: BinaryIO) -> None:
        """Load what an idle trainer has: code, data and, if asked for, the model."""
        sys.path[:] = header["path"]
        for folder, names in header["beside"]:
            find_beside(Path(folder), names)
        with importing():
            import torch

            from ...learning.workload import Workload
            from ..device.device import Device

        settings = msgspec.convert(header["settings"], WorkloadSettings)
        torch.set_num_threads(settings.threads)
        self._requests, self._answers = requests, answers
        self._device = Device(Workload(settings), self, whole_states=header["whole_states"])
        self._device.warm_up(model=header["model"])
        _warm_up_torch()
        trim()
        gc.freeze()  # what an idle trainer has is not looked through before each plan

    def serve(self) -> None:
        """Carry out requests until the parent closes the pipe."""
        kinds: dict[str, Callable[[dict[str, Any], list[Array]], None]] = {
            "run": self._run,
            "try": self._try,
            "time": self._time,
        }
        while True:
            try:
                header, arrays = read_frame(self._requests)
            except EOFError:
                return
            kinds[header["kind"]](header, arrays)
            del arrays

    def entered(self, stage: str) -> None:
        """Tell the parent, which reports the stage if this process dies."""
        self._tell({"kind": "stage", "stage": stage})

    @contextmanager
    def limited(self, plan: Plan, held_bytes: int) -> Iterator[None]:
        """Limit the data segment to that of the idle trainer plus the plan's budget."""
        if plan.memory_bytes is None:
            yield
            return
        trim()
        with limited(data_bytes() - held_bytes + plan.memory_bytes):
            yield

    def _run(self, header: dict[str, Any], arrays: list[Array]) -> None:
        """Carry out a plan, and answer with report, update and state."""
        names, count = header["state"], header["packets"]
        state = None if names is None else dict(zip(names, arrays[count:], strict=True))
        host = _ParentLink(self._ask) if header["host"] else None
        report, update, new_state = self._device.run(bytes(header["plan"]), arrays[:count], state, host)
        found = [*([] if update is None else [update]), *(new_state or {}).values()]
        new_names = None if new_state is None else list(new_state)
        self._tell({"kind": "done", "report": report, "update": update is not None, "state": new_names}, found)
        del state, arrays, update, new_state, found
        trim()

    def _try(self, header: dict[str, Any], arrays: list[Array]) -> None:
        """Whether training steps of a plan fit limits above the idle trainer: each is tried in a fork of this process.

        The fork ends with its attempt, so that all attempts start from the same state.
        """
        plan = read_plan(bytes(header["plan"]))
        try:
            trial = self._device.trial(plan)
        except Exception as error:
            self._tell(_described(error))
            return
        trim()
        idle = data_bytes() - trial.held_bytes
        reader, writer = os.pipe()
        parent, process = os.getpid(), os.fork()
        if process == 0:
            _end_fork_with(parent)
            self._attempt(trial.run, idle + header["limit"], writer)
        os.close(writer)
        with os.fdopen(reader, "rb") as stream:
            text = stream.read().decode(errors="replace")
        _, status = os.waitpid(process, 0)
        if text:
            self._tell({"kind": "error", "text": f"a trial step failed for another reason than memory: {text}"})
        else:
            self._tell({"kind": "tried", "fits": os.waitstatus_to_exitcode(status) == 0})

    def _time(self, header: dict[str, Any], arrays: list[Array]) -> None:
        """Time training steps of plans, without a limit."""
        self._tell({"kind": "timed", "seconds": self._device.time_steps([bytes(plan) for plan in header["plans"]])})
        trim()

    def _attempt(self, run: Callable[[], object], limit: int, writer: int) -> None:
        """Run in the fork, which exits with code 0 if that went well, and writes any error but a lack of memory."""
        from ..device.device import is_out_of_memory

        self.entered = lambda stage: None  # type: ignore[method-assign]  # the pipe is the parent's
        code = 1
        try:
            with limited(limit):
                run()
            code = 0
        except BaseException as error:
            if not is_out_of_memory(error):
                os.write(writer, f"{type(error).__name__}: {error}".encode()[:2000])
        finally:
            os._exit(code)

    def _ask(self, header: dict[str, Any], arrays: list[Array]) -> list[Array]:
        """Have the parent do something for the plan, and return its answer. Raises ``StreamFault``."""
        self._tell(header, arrays)
        answer, found = read_frame(self._requests)
        if answer["kind"] == "fault":
            raise StreamFault(answer["text"])
        return found

    def _tell(self, header: dict[str, Any], arrays: list[Array] | None = None) -> None:
        try:
            write_frame(self._answers, header, arrays or [])
        except OSError:  # the parent is gone
            os._exit(1)


class _ParentLink:
    """The connection to the host's leg of a plan, by way of the parent."""

    def __init__(self, ask: Callable[[dict[str, Any], list[Array]], list[Array]]) -> None:
        self._ask = ask

    def send(self, packet: Array, *, window: int) -> None:
        """Send activations."""
        self._ask({"kind": "host", "call": "send", "window": window}, [packet])

    def answer(self) -> Array:
        """Wait for the answer to the oldest unanswered packet."""
        (packet,) = self._ask({"kind": "host", "call": "answer"}, [])
        return packet

    def flush(self) -> None:
        """Wait until the host has taken all packets."""
        self._ask({"kind": "host", "call": "flush"}, [])


def _warm_up_torch() -> None:
    """Make torch load and allocate now what it needs once: its libraries, oneDNN's engine, the optimiser's code."""
    import torch
    from torch import nn

    from ...learning.data.types import Samples
    from ...learning.spec import Optimiser, Training
    from ...learning.training.losses import make_loss
    from ...learning.training.training import train

    images = torch.from_numpy(np.zeros((4, 3, 8, 8), dtype=np.float32))
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(512, 10))
    training = Training(batch_size=2, optimiser=Optimiser(momentum=0.9))
    samples = Samples(images, torch.zeros(4, dtype=torch.int64))
    train(model, samples, training=training, loss=make_loss(training.loss), transform=lambda x, _: x, seed=0)
