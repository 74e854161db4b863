"""Availability in fleets: plain numbers, sections, traces, and errors of one sentence."""

import re

import msgspec
import pytest
from fedbonsai.clusters.availability import ALWAYS, Availability, Dropout, Jitter
from fedbonsai.clusters.fleet import load_fleet

LINK = {"flop_per_s": 1, "memory_bytes": 1, "up_bytes_per_s": 1, "down_bytes_per_s": 1}


def fleet_of(*changes):
    return {"classes": [{"name": f"p{i}"} | LINK | change for i, change in enumerate(changes)]}


def test_plain_numbers_and_sections():
    fleet = load_fleet(
        fleet_of(
            {"availability": 0.9, "dropout": 0.3, "jitter": 0.2},
            {
                "availability": {"on_s": "8 h", "every_s": "24 h", "joins_s": "1 min"},
                "dropout": {"before": 0.1, "after": 0.2, "somewhere": 0.3},
                "jitter": {"compute": 0.5},
            },
            {},
        )
    )
    first, second, third = fleet.classes
    assert first.availability == Availability(share=0.9)
    assert first.dropout.chances == pytest.approx((0.1, 0.1, 0.1))
    assert first.jitter == Jitter(compute=0.2, links=0.2)
    assert second.availability == Availability(on_s=28800.0, every_s=86400.0, joins_s=60.0)
    assert second.dropout.chances == pytest.approx((0.2, 0.1, 0.3))
    assert second.jitter == Jitter(compute=0.5)
    assert (third.availability, third.dropout, third.jitter) == (ALWAYS, Dropout(), Jitter())
    assert fleet.simulates_faults
    assert not load_fleet("laptop").simulates_faults
    assert load_fleet("testbed-lte").simulates_faults
    assert load_fleet(fleet.to_dict()) == fleet


def test_a_trace_is_read_beside_its_fleet_and_written_out(tmp_path):
    (tmp_path / "week.csv").write_text("device, start_s, end_s\n2,0,10\n0,5,7.5\n\n1,1,2\n0,1,2\n")
    kinds = [{"name": "a", "count": 2}, {"name": "b"}]
    classes = [kind | LINK | {"availability": {"trace": "week.csv"}} for kind in kinds]
    path = tmp_path / "f.yaml"
    path.write_text(msgspec.yaml.encode({"classes": classes}).decode())
    fleet = load_fleet(str(path))
    assert fleet.classes[0].availability.trace == ((0, 1.0, 2.0), (0, 5.0, 7.5), (1, 1.0, 2.0))
    assert fleet.classes[1].availability.trace == ((2, 0.0, 10.0),)
    assert load_fleet(fleet.to_dict()) == fleet


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("device,start,end\n0,1,2\n", "whose first line must be device,start_s,end_s"),
        ("device,start_s,end_s\n0,1\n", "line 2 of .* is '0,1'; it must be a device's number and 2 numbers"),
        ("device,start_s,end_s\n0,one,2\n", "line 2 of .* is '0,one,2'; it must be"),
        ("device,start_s,end_s\n7,1,2\n", "has a line of device 7; devices are 0 to 0"),
        (
            "device,start_s,end_s\n0,2,1\n",
            "has device 0 from 2 s to 1 s; a window begins at 0 or later, and ends later",
        ),
        ("device,start_s,end_s\n0,nan,1\n", "has device 0 from nan s to 1 s"),
        ("device,start_s,end_s\n", "has no line of devices 0 to 0, those of its class"),
        (None, "which cannot be read: "),
    ],
)
def test_a_mistake_in_a_trace_is_one_sentence(tmp_path, text, words):
    path = tmp_path / "t.csv"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=words) as caught:
        load_fleet(fleet_of({"availability": {"trace": str(path)}}))
    assert str(caught.value).startswith("fleet.classes[0].availability.trace")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"availability": -1}, "availability.share is -1; it must be a number >= 0"),
        ({"availability": "often"}, "availability is 'often'; it must be a mapping"),
        ({"availability": True}, "availability is True; it must be a mapping"),
        ({"availability": {"shares": 1}}, "availability.shares is not a field (did you mean 'share'?)"),
        ({"availability": {"on_s": 5}}, "availability.on_s is 5 without every_s; a schedule needs both"),
        ({"availability": {"every_s": 5}}, "availability.every_s is 5 without on_s; a schedule needs both"),
        ({"availability": {"on_s": 5, "every_s": 4}}, "availability.on_s is 5; it must be at most every_s, 4"),
        (
            {"availability": {"phase_s": 5}},
            "availability.phase_s is 5 without every_s; a schedule needs on_s and every_s",
        ),
        (
            {"availability": {"joins_s": 9, "leaves_s": 9}},
            "availability.leaves_s is 9; it must be more than joins_s, 9",
        ),
        ({"availability": {"mean_on_s": "0 s"}}, "availability.mean_on_s is '0 s'; it must be a number > 0"),
        ({"dropout": 1.5}, "dropout.somewhere is 1.5; it must be a number <= 1"),
        ({"dropout": {"before": 0.6, "after": 0.6}}, "dropout adds up to 1.2; all chances together must be at most 1"),
        ({"jitter": 4}, "jitter.compute is 4; it must be a number <= 3"),
        ({"jitter": {"links": -0.1}}, "jitter.links is -0.1; it must be a number >= 0"),
    ],
)
def test_a_mistake_is_one_sentence(change, sentence):
    with pytest.raises(ValueError) as caught:
        load_fleet(fleet_of(change))
    assert str(caught.value).startswith(f"fleet.classes[0].{sentence}")
    assert "\n" not in str(caught.value)


def test_rates_of_links_are_a_trace_too(tmp_path):
    path = tmp_path / "lte.csv"
    path.write_text("device,at_s,up_bytes_per_s,down_bytes_per_s\n0,60,1000,2000\n0,0,5,6\n")
    fleet = load_fleet(fleet_of({"rates": str(path)}))
    assert fleet.classes[0].rates == ((0, 0.0, 5.0, 6.0), (0, 60.0, 1000.0, 2000.0))
    assert fleet.simulates_faults
    assert load_fleet(fleet.to_dict()) == fleet


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (
            [0, 1, 0, 5],
            "has device 0 at 1 s with 0 bytes/s up and 5 down; times are 0 or later, rates between 0.001 and 1e+18",
        ),
        ([0, -1, 5, 5], "has device 0 at -1 s"),
        ([3, 1, 5, 5], "has a line of device 3; devices are 0 to 0"),
    ],
)
def test_a_mistake_in_rates_is_one_sentence(row, words):
    with pytest.raises(ValueError, match="^" + re.escape(f"fleet.classes[0].rates {words}")):
        load_fleet(fleet_of({"rates": [row]}))
