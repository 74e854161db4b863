"""These tests start, join and end Rays themselves."""

import pytest


@pytest.fixture(scope="module", autouse=True)
def alone(shared_ray):
    shared_ray.close()
