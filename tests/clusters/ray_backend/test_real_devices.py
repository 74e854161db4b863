"""The assignment of nodes to real devices."""

import pytest
from fedbonsai.clusters.fleet import load_fleet
from fedbonsai.clusters.ray_backend.nodes import Node
from fedbonsai.clusters.ray_backend.real_devices import Site, locate, real_devices

FIGURES = {"flop_per_s": 1e9, "memory_bytes": 10**9, "up_bytes_per_s": 1e6, "down_bytes_per_s": 1e6}


def devices_of(*classes):
    fleet = load_fleet({"classes": [{"name": f"c{number}"} | FIGURES | kind for number, kind in enumerate(classes)]})
    return real_devices(fleet, join_timeout_s=60.0)


def node(name, *, cpus=4.0, labels=None, **resources):
    """A node of which nothing is in use; ``name`` is its id and its address."""
    return Node(name, name, {"CPU": cpus, f"node:{name}": 1.0} | resources, labels or {})


def places(found):
    return {number: site.node for number, site in found.items()}


BOARD = {"label_selector": {"board": "rpi4"}}
RPI = {"board": "rpi4"}


def test_real_devices_are_those_of_the_classes_that_are_placed():
    found = devices_of({"count": 2}, BOARD | {"count": 2, "join_timeout_s": 5.0}, {"resource": "jetson"})
    assert [(d.number, d.name, d.join_timeout_s) for d in found] == [
        (2, "device 2 (class c1)", 5.0),
        (3, "device 3 (class c1)", 5.0),
        (4, "device 4 (class c2)", 60.0),
    ]
    assert found[0].requirement() == "a node with the labels board=rpi4, not in use,"
    assert found[2].requirement(0.5) == "a node with a free unit of the resource jetson and 0.5 CPU left"


def test_a_node_is_one_device_with_all_of_its_processors():
    found = locate(
        devices_of(BOARD | {"count": 3}), [node("b", labels=RPI), node("a", cpus=1.0, labels=RPI)], cpus=None
    )
    assert found == {
        0: Site("a", "a", 1.0, {"node:a": 0.501}),
        1: Site("b", "b", 4.0, {"node:b": 0.501}),
    }


def test_a_node_without_a_free_processor_is_a_device_too():
    found = locate(devices_of(BOARD), [node("a", cpus=0.0, labels=RPI)], cpus=None)
    assert found == {0: Site("a", "a", 0.0, {"node:a": 0.501})}


def test_a_node_that_is_already_a_device_is_no_second_one():
    used = node("a", labels=RPI)
    used.take({"CPU": 4.0, "node:a": 0.501})
    assert locate(devices_of(BOARD), [used], cpus=None) == {}


def test_with_a_number_of_processors_for_each_device_a_node_may_be_several():
    found = locate(
        devices_of(BOARD | {"count": 4}), [node("a", cpus=3.0, labels=RPI), node("b", cpus=1.0, labels=RPI)], cpus=1.5
    )
    assert places(found) == {0: "a", 1: "a"}
    found = locate(devices_of(BOARD | {"count": 2}), [node("a", labels=RPI), node("b", labels=RPI)], cpus=1.0)
    assert places(found) == {0: "a", 1: "b"}  # one each before two on one
    assert found[0] == Site("a", "a", 1.0, {})


def test_a_node_is_a_device_for_each_unit_of_the_resource():
    found = locate(devices_of({"resource": "jetson", "count": 3}), [node("a", cpus=3.0, jetson=2.0)], cpus=None)
    assert found == {0: Site("a", "a", 1.5, {"jetson": 1.0}), 1: Site("a", "a", 1.5, {"jetson": 1.0})}


@pytest.mark.parametrize(
    ("selector", "expected"),
    [("rpi4", "abc"), ("!rpi4", "de"), ("in(rpi4,nano)", "abcd"), ("!in(rpi4,nano)", "e")],
)
def test_label_selectors(selector, expected):
    nodes = [node(name, labels=RPI) for name in "abc"] + [node("d", labels={"board": "nano"}), node("e")]
    devices = devices_of({"label_selector": {"board": selector}, "count": 5})
    assert "".join(sorted(places(locate(devices, nodes, cpus=None)).values())) == expected


def test_a_node_that_joins_again_is_the_same_device():
    devices = devices_of(BOARD | {"count": 3})
    nodes = [node("b", labels=RPI), node("a", labels=RPI)]
    assert places(locate(devices, nodes, cpus=None, before={2: "a", 0: "c"})) == {2: "a", 0: "b"}


def test_a_join_timeout_is_for_real_devices():
    with pytest.raises(ValueError, match=r"^fleet\.classes\[0\]\.join_timeout_s is 5, but the class is simulated"):
        devices_of({"join_timeout_s": 5.0})
