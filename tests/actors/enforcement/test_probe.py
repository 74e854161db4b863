import pytest
from fedbonsai.actors.enforcement.probe import smallest_limit


@pytest.mark.parametrize(
    "needed", [1, 300_000, 7_000_000, 97_000_000, 100_000_000, 104_000_000, 240_000_000, 3_000_000_000]
)
def test_the_result_fits_is_near_the_smallest_limit_and_takes_few_trials(needed: int) -> None:
    tried = []

    def fits(limit: int) -> bool:
        tried.append(limit)
        return limit >= needed

    found = smallest_limit(fits, guess=100_000_000)
    assert found in tried
    assert needed <= found <= needed + max(0.02 * found, 256 << 10)
    near = 0.75 * 100_000_000 < needed < 1.15 * 100_000_000
    assert len(tried) <= (6 if near else 14)


def test_a_step_that_no_limit_fits_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"a step does not fit .* and is predicted to need 100 MB"):
        smallest_limit(lambda limit: False, guess=100_000_000)
