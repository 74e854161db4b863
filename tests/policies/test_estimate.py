"""The formulas of costs, checked by hand."""

from fedbonsai.clusters.profile import DeviceProfile
from fedbonsai.policies.estimate import Estimate, charge, compute_s, transfer_s


def profile(**changes):
    values = {"name": "a", "flop_per_s": 50.0, "memory_bytes": 1, "up_bytes_per_s": 1.0, "down_bytes_per_s": 1.0}
    return DeviceProfile(**values | changes)


def test_a_transfer_is_latency_and_bytes_over_rate():
    assert transfer_s(300, bytes_per_s=100.0, latency_s=0.5) == 3.5
    assert transfer_s(0, bytes_per_s=100.0, latency_s=0.5) == 0.5


def test_a_computation_is_flops_over_speed():
    assert compute_s(200, flop_per_s=50.0) == 4.0


def test_a_charge_adds_up():
    found = charge(profile(watts=3.0), down_bytes=7, flops=200, up_bytes=8, peak_memory_bytes=9, down_s=1.0, up_s=2.5)
    assert found == Estimate(
        down_s=1.0, compute_s=4.0, up_s=2.5, seconds=7.5, energy_j=12.0,
        down_bytes=7, up_bytes=8, flops=200, peak_memory_bytes=9,
    )  # fmt: skip


def test_a_device_of_unknown_power_is_charged_no_energy():
    found = charge(profile(), down_bytes=0, flops=200, up_bytes=0, peak_memory_bytes=0, down_s=0.0, up_s=0.0)
    assert (found.energy_j, found.seconds) == (0.0, 4.0)
