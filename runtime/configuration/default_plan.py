"""The experiment's own plan for a device, as its settings say."""

import msgspec

from ...learning.parts.part import Part
from ...learning.seeds import derive
from ...policies.plan import Plan, Upload
from .config import Config


class DefaultPlan:
    """The experiment's own plan for a device: whole model, configured codecs, training at the round's learning rate."""

    def __init__(self, config: Config, part: Part) -> None:
        """``part``: of every plan."""
        self._config = config
        self._part = part
        self._version = -1
        self._training = config.training
        self._upload = Upload(statistics=config.server.statistics == "average")

    def __call__(self, device: int, version: int, earlier: int) -> Plan:
        """``earlier``: plans of this version that the device was sent before; equal seeds would make equal updates."""
        config = self._config
        if version != self._version:
            factor = config.schedule.factor(version, rounds=config.stop.rounds)
            rate = config.training.optimiser.learning_rate * factor
            optimiser = msgspec.structs.replace(config.training.optimiser, learning_rate=rate)
            self._training = msgspec.structs.replace(config.training, optimiser=optimiser)
            self._version = version
        return Plan(
            id=0,
            device=device,
            version=version,
            part=self._part,
            training=self._training,
            seed=derive(config.seed, "plan", device, version, *([earlier] if earlier else [])),
            upload=self._upload,
            codec_down=config.codecs.down,
            codec_up=config.codecs.up,
        )
