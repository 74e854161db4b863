from fedbonsai.runtime.simulation.bounded_cache import BoundedCache


def test_the_oldest_goes_first():
    recent = BoundedCache(2)
    recent["a"], recent["b"], recent["a"] = 1, 2, 3
    assert dict(recent) == {"a": 3, "b": 2}
    recent["c"] = 4
    assert dict(recent) == {"b": 2, "c": 4}
