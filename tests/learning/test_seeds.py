import numpy as np
from fedbonsai.learning.seeds import derive


def test_a_seed_follows_from_its_path_alone() -> None:
    assert derive(0, "plan", 3, 5) == derive(0, "plan", 3, 5)
    assert derive(1, "data") == 3291769337249800045  # fixed, since runs must be repeatable across releases


def test_every_step_of_the_path_matters() -> None:
    paths = [(), ("plan",), ("plan", 1), ("plan", "1"), ("plan", 1, 2), ("plan", 2, 1), ("plan", 12), ("model",)]
    seeds = {derive(seed, *path) for seed in (0, 1, -1) for path in paths}
    assert len(seeds) == 3 * len(paths)


def test_numbers_count_by_value() -> None:
    assert derive(np.int32(5), "plan", np.int64(3)) == derive(5, "plan", 3)


def test_seeds_fit_every_generator_and_look_random() -> None:
    seeds = [derive(7, "device", number) for number in range(1000)]
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert len(set(seeds)) == 1000
    ones = np.mean([seed.bit_count() / 63 for seed in seeds])
    assert 0.49 < ones < 0.51
