import pytest
from fedbonsai.comms.ledger import Ledger


@pytest.fixture
def ledger() -> Ledger:
    ledger = Ledger()
    ledger.record("down", kind="weights", device=0, num_bytes=100)
    ledger.record("down", kind="control", device=0, num_bytes=7)
    ledger.record("down", kind="weights", device=1, num_bytes=100)
    ledger.record("up", kind="weights", device=0, num_bytes=30)
    ledger.record("up", kind="weights", device=0, num_bytes=40)
    return ledger


def test_totals_add_up(ledger: Ledger) -> None:
    assert ledger.total() == 277
    assert ledger.total("down") == 207
    assert ledger.total("up") == 70
    assert ledger.total("down", kind="weights") == 200
    assert ledger.total(kind="weights") == 270
    assert ledger.total(device=0) == 177
    assert ledger.total("down", kind="control", device=0) == 7


def test_kinds_and_devices_without_messages_have_no_bytes(ledger: Ledger) -> None:
    assert ledger.total("up", kind="logits") == 0
    assert ledger.total(device=9) == 0
    assert Ledger().total() == 0
    assert Ledger().by_kind("up") == {}


def test_queries_change_nothing(ledger: Ledger) -> None:
    ledger.total("up", kind="logits", device=5)
    assert ledger.by_kind("up") == {"weights": 70}


def test_kinds_in_order_of_name(ledger: Ledger) -> None:
    assert list(ledger.by_kind("down").items()) == [("control", 7), ("weights", 200)]
    assert sum(ledger.by_kind("down").values()) == ledger.total("down")


def test_empty_messages_are_counted(ledger: Ledger) -> None:
    ledger.record("up", kind="control", device=2, num_bytes=0)
    assert (ledger.messages(), ledger.messages("down"), ledger.messages("up")) == (6, 3, 3)


def test_totals_are_the_sum_over_devices(ledger: Ledger) -> None:
    for direction in ("up", "down", None):
        for kind in ("weights", "control", None):
            assert ledger.total(direction, kind=kind) == sum(
                ledger.total(direction, kind=kind, device=device) for device in (0, 1)
            )
