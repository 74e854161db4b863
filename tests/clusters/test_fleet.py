"""Fleets: reading them, errors of one sentence, and the built-in ones."""

from pathlib import Path

import pytest
from fedbonsai.clusters.fleet import BUILT_IN, DeviceClass, Fleet, SharedLink, describe, load_fleet, names
from fedbonsai.clusters.profile import DeviceProfile

PHONE = {
    "name": "phone",
    "flop_per_s": "2 GFLOP/s",
    "memory_bytes": "256 MB",
    "up_bytes_per_s": "8 Mbit/s",
    "down_bytes_per_s": "24 Mbit/s",
}


def fleet_of(*changes: dict[str, object], **fields: object) -> dict[str, object]:
    """A fleet with one class per change of ``PHONE``, named p0, p1, ... unless the change says otherwise."""
    return {"classes": [PHONE | {"name": f"p{i}"} | change for i, change in enumerate(changes)], **fields}


def test_devices_are_numbered_class_by_class_and_share_their_class_profile() -> None:
    fleet = load_fleet(fleet_of({"count": 2}, {"count": 1, "flop_per_s": 5.0}, {"count": 3}))
    profiles = fleet.profiles()
    assert fleet.num_devices == len(profiles) == 6
    assert [p.name for p in profiles] == ["p0", "p0", "p1", "p2", "p2", "p2"]
    assert [fleet.class_of(device).name for device in range(6)] == [p.name for p in profiles]
    assert len({id(p) for p in profiles}) == 3
    assert type(profiles[0]) is DeviceProfile
    assert profiles[2] == DeviceProfile(
        name="p1", flop_per_s=5.0, memory_bytes=256_000_000, up_bytes_per_s=1e6, down_bytes_per_s=3e6
    )


@pytest.mark.parametrize("device", [-1, 3])
def test_a_number_that_no_device_has(device: int) -> None:
    with pytest.raises(IndexError, match="of a fleet of 3"):
        load_fleet(fleet_of({"count": 3})).class_of(device)


def test_placed_classes_have_workers_of_their_own() -> None:
    fleet = load_fleet(fleet_of({}, {"resource": "jetson"}, {"label_selector": {"board": "rpi4"}}))
    assert [fleet.group_of(device) for device in range(3)] == ["", "device 1 (class p1)", "device 2 (class p2)"]


def test_links_hosts_and_server() -> None:
    fleet = load_fleet(
        fleet_of(
            {"shared_link": "wifi"},
            shared_links={"wifi": {"up_bytes_per_s": "1 MB/s", "down_bytes_per_s": "2 MB/s"}},
            hosts={"count": 2, "flop_per_s": "1 TFLOP/s"},
            server={"up_bytes_per_s": "80 Mbit/s"},
        )
    )
    assert fleet.shared_links == {"wifi": SharedLink(up_bytes_per_s=1e6, down_bytes_per_s=2e6)}
    assert (fleet.hosts.count, fleet.hosts.flop_per_s) == (2, 1e12)
    assert (fleet.server.up_bytes_per_s, fleet.server.down_bytes_per_s) == (1e7, None)


@pytest.mark.parametrize("name", names())
def test_the_resolved_fleet_loads_to_an_equal_one(name: str) -> None:
    fleet = load_fleet(name)
    plain = fleet.to_dict()
    assert load_fleet(plain) == fleet
    assert load_fleet(plain).to_dict() == plain


def test_a_path_is_read_and_names_the_fleet(tmp_path: Path) -> None:
    path = tmp_path / "my fleet.yaml"
    path.write_text(
        "classes:\n- {name: a, flop_per_s: 1 GFLOP/s, memory_bytes: 1 MB, up_bytes_per_s: 1, down_bytes_per_s: 1 kB/s}\n"
    )
    fleet = load_fleet(str(path))
    assert (fleet.name, fleet.num_devices, fleet.classes[0].down_bytes_per_s) == ("my fleet", 1, 1000.0)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"memory_bytes": 0}, "fleet.classes[0].memory_bytes is 0; it must be a whole number >= 1"),
        ({"flop_per_s": "-3 GFLOP/s"}, "fleet.classes[0].flop_per_s is '-3 GFLOP/s'; it must be a number > 0"),
        ({"availability": 2}, "fleet.classes[0].availability.share is 2; it must be a number <= 1"),
        ({"count": 0}, "fleet.classes[0].count is 0; it must be a whole number >= 1"),
        ({"codecs": "lz4"}, "fleet.classes[0].codecs is 'lz4'; it must be a list or nothing"),
        (
            {"may_send": ["weights", "photos"]},
            "fleet.classes[0].may_send[1] is 'photos'; it must be one of weights, logits, activations, labels, statistics",
        ),
        (
            {"shared_link": "wifi"},
            "fleet.classes[0].shared_link is 'wifi'; the links that fleet.shared_links declares: none",
        ),
        (
            {"resource": "jetson", "label_selector": {"board": "nano"}},
            "fleet.classes[0].resource is 'jetson' beside a label_selector; a class is placed by one of them",
        ),
        ({"label_selector": {}}, "fleet.classes[0].label_selector is empty; leave it out, or name the nodes"),
        ({"name": ""}, "fleet.classes[0].name is ''; each class needs a name of its own"),
    ],
)
def test_a_mistake_in_a_class_is_one_sentence(change: dict[str, object], sentence: str) -> None:
    with pytest.raises(ValueError) as caught:
        load_fleet(fleet_of(change))
    assert str(caught.value) == sentence


@pytest.mark.parametrize(
    ("source", "beginning"),
    [
        ({}, "fleet.classes is missing"),
        ({"classes": []}, "fleet.classes is []; it must be a list of length >= 1"),
        ({"classes": [3]}, "fleet.classes[0] is 3; it must be a mapping"),
        (fleet_of({"name": "a"}, {"name": "a"}), "fleet.classes[1].name is 'a'; each class needs"),
        (fleet_of({"memroy_bytes": 1}), "fleet.classes[0].memroy_bytes is not a field (did you mean 'memory_bytes'?)"),
        (fleet_of({}, servers={}), "fleet.servers is not a field (did you mean 'server'?)"),
        (fleet_of({}, hosts={"memory_bytes": "2 Gb"}), "fleet.hosts.memory_bytes is '2 Gb'; it must be a number, or"),
        (
            fleet_of({}, shared_links={"wifi": {"up_bytes_per_s": 0, "down_bytes_per_s": 1}}),
            "fleet.shared_links.wifi.up_bytes_per_s is 0; it must be a number > 0",
        ),
    ],
)
def test_a_mistake_in_a_fleet_names_the_field(source: dict[str, object], beginning: str) -> None:
    with pytest.raises(ValueError) as caught:
        load_fleet(source)
    assert str(caught.value).startswith(beginning)
    assert "\n" not in str(caught.value)


def test_an_unknown_fleet_lists_the_known_ones() -> None:
    with pytest.raises(
        ValueError, match=r"^fleet is 'labtop', .*laptop, mixed-100, testbed-lte, testbed-wifi, uniform-10$"
    ):
        load_fleet("labtop")


@pytest.mark.parametrize("text", ["classes: [", "- a\n- b\n"])
def test_a_file_that_is_no_fleet(tmp_path: Path, text: str) -> None:
    path = tmp_path / "f.yaml"
    path.write_text(text)
    with pytest.raises(ValueError) as caught:
        load_fleet(str(path))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_laptop_fleet_is_eight_unequal_devices() -> None:
    fleet = load_fleet("laptop")
    speeds = [profile.flop_per_s for profile in fleet.profiles()]
    assert fleet.num_devices == 8
    assert max(speeds) / min(speeds) == 16
    assert sum(profile.shared_link == "wifi" for profile in fleet.profiles()) == 4


def test_sizes_of_the_built_in_fleets() -> None:
    assert {name: load_fleet(name).num_devices for name in names()} == {
        "laptop": 8,
        "mixed-100": 100,
        "testbed-lte": 10,
        "testbed-wifi": 10,
        "uniform-10": 10,
    }
    assert len(load_fleet("mixed-100").classes) == 5


def test_testbed_figures_follow_from_the_sources_they_cite() -> None:
    speeds = {kind.name: kind.flop_per_s for kind in load_fleet("testbed-wifi").classes}
    # Training is three forward passes, a multiply-accumulate two operations; 20 batches of 16; a Pi 5 is two Pi 4.
    published = [2 * 3 * gmac * 1e9 * 20 * 16 / seconds / 2 for gmac, seconds in [(1.80, 116.85), (4.10, 322.26)]]
    assert min(published) < speeds["rpi4"] < max(published)
    for name, cores, mhz in [
        ("jetson-nano", 128, 921),
        ("jetson-tx2", 256, 1465),
        ("jetson-xavier-nx", 384, 1100),
        ("jetson-orin-nano", 1024, 625),
    ]:
        assert speeds[name] == pytest.approx(0.25 * 2 * cores * mhz * 1e6, rel=0.01)


def test_every_built_in_fleet_says_where_its_figures_come_from() -> None:
    for name in names():
        text = (BUILT_IN / f"{name}.yaml").read_text()
        assert "ASSUMPTION" in text
        assert load_fleet(name).description


def test_ten_thousand_devices_are_few_objects() -> None:
    fleet = load_fleet(fleet_of({"count": 9_999}, {"count": 1}))
    assert len({id(profile) for profile in fleet.profiles()}) == 2
    assert fleet.class_of(9_998).name == "p0"
    assert fleet.class_of(9_999).name == "p1"


def test_a_class_for_people() -> None:
    fleet = Fleet(
        classes=(
            DeviceClass(
                name="a",
                flop_per_s=2e9,
                memory_bytes=10**9,
                up_bytes_per_s=1e6,
                down_bytes_per_s=2e6,
                latency_s=0.01,
                count=3,
            ),
        )
    )
    assert describe(fleet) == [
        {
            "class": "a",
            "devices": "3",
            "speed": "2 GFLOP/s",
            "memory": "1 GB",
            "up": "8 Mbit/s",
            "down": "16 Mbit/s",
            "latency": "10 ms",
            "shared link": "",
        }
    ]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            {"up_bytes_per_s": 1e-320},
            "fleet.classes[0].up_bytes_per_s is 1e-320; it must be between 0.001 and 1e+18 B/s",
        ),
        (
            {"down_bytes_per_s": "1e30 MB/s"},
            "fleet.classes[0].down_bytes_per_s is '1e30 MB/s'; it must be between 0.001 and 1e+18 B/s",
        ),
        ({"flop_per_s": 0.5}, "fleet.classes[0].flop_per_s is 0.5; it must be between 1 and 1e+24 FLOP/s"),
        ({"latency_s": 1e300}, "fleet.classes[0].latency_s is 1e+300; it must be between 1e-12 and 1e+12 s"),
        (
            {"memory_bytes": 10**30},
            "fleet.classes[0].memory_bytes is 1000000000000000000000000000000; it must be between 0 and",
        ),
        (
            {"memory_bytes": 10**5000},
            "fleet.classes[0].memory_bytes is a int too long to show; it must be between 0 and ",
        ),
        (
            {"latency_s": "1e999999999 s"},
            "fleet.classes[0].latency_s is '1e999999999 s'; it must be a number, or a number with a unit",
        ),
        (
            {"name": "\ud800"},
            r"fleet.classes[0].name is '\ud800', which holds half of a surrogate pair; it must be text",
        ),
        ({"count": 10**12}, "fleet.classes count 1000000000000 devices; it must be at most 10,000,000 in all"),
        (
            {"availability": {"on_s": 1e-6, "every_s": 1}},
            "fleet.classes[0].availability.on_s is 1e-06; it must be at least 0.001",
        ),
        (
            {"rates": "a\0b"},
            r"fleet.classes[0].rates is 'a\x00b', which holds a NUL character; allowed: a path without one",
        ),
        (
            {"availability": {"trace": "a\0b"}},
            r"fleet.classes[0].availability.trace is 'a\x00b', which holds a NUL character; allowed: a path without one",
        ),
    ],
    ids=range(12),
)
def test_figures_that_no_device_has_are_refused_in_one_sentence(change: dict[str, object], sentence: str) -> None:
    with pytest.raises(ValueError) as caught:
        load_fleet(fleet_of(change))
    assert str(caught.value).startswith(sentence)


def test_links_of_all_kinds_have_bounds() -> None:
    for where in ({"shared_links": {"air": {"up_bytes_per_s": 1e-320, "down_bytes_per_s": 1}}},
                  {"server": {"up_bytes_per_s": 1e-320}}, {"hosts": {"down_bytes_per_s": 1e300}}):  # fmt: skip
        with pytest.raises(ValueError, match=r"it must be between 0\.001 and 1e\+18 B/s$"):
            load_fleet(fleet_of({}, **where))


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("classes: []\nclasses: []\n", "key 'classes' occurs twice (line 2, column 1)"),
        ("classes: [{name: a, name: b}]\n", "key 'name' occurs twice (line 1, column 21)"),
        ("classes: &a [*a]\n", "an alias stands inside the value that it names (line 1, column 14)"),
    ],
)
def test_a_fleet_s_yaml_is_read_as_a_configuration_s(tmp_path: Path, text: str, problem: str) -> None:
    path = tmp_path / "fleet.yaml"
    path.write_text(text)
    with pytest.raises(ValueError) as caught:
        load_fleet(str(path))
    assert str(caught.value) == f"fleet {str(path)!r} cannot be read as YAML: {problem}"
