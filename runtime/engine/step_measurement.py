"""Measures before the first round what precision and layout the run trains in, where ``training`` leaves them to "auto".

One worker makes a few training steps of the whole global model in each alternative, at the configured batch size; the choice
holds for all workers. Simulated seconds do not depend on it: they follow from FLOPs.
"""

from collections.abc import Sequence

from msgspec.structs import replace

from ...actors.pool import Pool
from ...clusters.processor import emulates_bf16, numerics_here
from ...learning.parts.part import whole
from ...learning.spec import MeasuredForm, Training
from ...learning.training.precision import has_layouts
from ...learning.training.step_times import alternatives, measured_form
from ...learning.workload import Workload
from ..configuration.config import Config
from ..configuration.resolution import DefaultPlan, is_open


def measure_form(
    config: Config, pool: Pool, workload: Workload, *, emulating: Sequence[str]
) -> tuple[MeasuredForm | None, list[str]]:
    """The precision and layout of a run, and notices; None where both are set, which measures nothing.

    ``emulating``: nodes whose processors lack bf16 instructions. One is enough to rule bf16 out, since all workers train in the
    same precision.
    """
    training = config.training
    if not is_open(training):
        return None, _emulation(training, emulating)
    has_bf16 = training.precision != "auto" or not emulating
    options = alternatives(training, layouts=has_layouts(workload.blocks.model), bf16=has_bf16)
    notices = (
        [] if has_bf16 else [f"training.precision is 'auto', which is float32: {_lack(emulating)} bf16 instructions"]
    )
    if len(options) == 1:
        return measured_form(options, []), notices
    pool.ready()
    num_devices = workload.settings.num_devices
    device = max(range(num_devices), key=workload.data.num_samples)
    plan = DefaultPlan(config, {"": whole(workload.spec)}, [""] * num_devices)(device, 0, 0)
    form = measured_form(options, pool.time_steps([replace(plan, training=each) for each in options]))
    return form, [*notices, _announcement(form)]


def emulating_here() -> list[str]:
    """This processor, if it lacks bf16 instructions."""
    return ["this processor"] if emulates_bf16(numerics_here()) else []


def _lack(nodes: Sequence[str]) -> str:
    return f"{', '.join(nodes)} {'lacks' if len(nodes) == 1 else 'lack'}"


def _emulation(training: Training, emulating: Sequence[str]) -> list[str]:
    """A warning where bf16 is configured, and emulated."""
    if training.precision != "bf16" or not emulating:
        return []
    return [
        f"training.precision is 'bf16', and {_lack(emulating)} its instructions: it is emulated, which may take many times as "
        "long as float32; allowed: float32, or auto, which takes bf16 only where it is measured to be faster"
    ]


def _announcement(form: MeasuredForm) -> str:
    """What was chosen, and by what times."""
    chosen = f"{form.precision}, {form.layout}"
    if not form.step_s:
        return f"training in {chosen}: its steps failed when they were to be measured"
    times = "; ".join(f"{name} {1e3 * seconds:.3g} ms" for name, seconds in form.step_s.items())
    return f"training in {chosen}, by measured steps: {times}"
