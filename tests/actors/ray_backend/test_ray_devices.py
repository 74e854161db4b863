"""Real devices that join, go away and join again, by what is known of the nodes."""

from fedbonsai.actors.ray_backend.ray_devices import RealDevices
from fedbonsai.clusters.fleet import load_fleet
from fedbonsai.clusters.ray_backend.nodes import Node
from fedbonsai.clusters.ray_backend.real_devices import real_devices

FIGURES = {"flop_per_s": 1e9, "memory_bytes": 10**9, "up_bytes_per_s": 1e6, "down_bytes_per_s": 1e6}
FLEET = {
    "classes": [
        FIGURES | {"name": "simulated"},
        FIGURES | {"name": "board", "count": 2, "label_selector": {"board": "rpi4"}, "join_timeout_s": 30.0},
    ]
}
FIRST, SECOND = "device 1 (class board)", "device 2 (class board)"


class Nodes:
    """Nodes that join and leave, and a clock."""

    def __init__(self):
        self.there, self.in_use, self.now_s = {}, set(), 100.0

    def join(self, node, address):
        self.there[node] = address

    def leave(self, node):
        del self.there[node]

    def look(self, devices):
        """A second later: who has joined, and who is gone, by name."""
        self.now_s += 1.0
        joined, gone = devices.look()
        self.in_use = {site.node for site in devices.sites.values()}
        return [place.name for place in joined], [(place.name, why) for place, why in gone]

    def nodes(self):
        return [
            Node(id_, address, {"CPU": 4.0, f"node:{address}": float(id_ not in self.in_use)}, {"board": "rpi4"})
            for id_, address in self.there.items()
        ]


def real(nodes):
    declared = real_devices(load_fleet(FLEET), join_timeout_s=60.0)
    return RealDevices(declared, nodes=nodes.nodes, now=lambda: nodes.now_s), declared


def test_a_device_is_there_while_its_node_is():
    nodes = Nodes()
    devices, declared = real(nodes)
    assert devices.numbers == {1, 2}
    nodes.join("aaaaaaaaa1", "10.0.0.1")
    assert nodes.look(devices) == ([FIRST], [])
    assert nodes.look(devices) == ([], [])
    assert (devices.why_away(FIRST), devices.why_away("")) == ("", "")
    assert devices.why_away(SECOND) == "a node with the labels board=rpi4, not in use, has not joined"
    nodes.leave("aaaaaaaaa1")
    assert nodes.look(devices) == ([], [(FIRST, "node 10.0.0.1 (aaaaaaaa) is gone")])
    devices.forget(declared[0], "node 10.0.0.1 is gone")
    assert devices.why_away(FIRST) == "node 10.0.0.1 is gone"
    assert devices.lost == [1]
    assert nodes.look(devices) == ([], [])


def test_a_node_that_joins_again_is_the_device_that_it_was():
    nodes = Nodes()
    devices, declared = real(nodes)
    nodes.join("a1", "10.0.0.1")
    nodes.join("b1", "10.0.0.2")
    nodes.look(devices)
    for node in ("a1", "b1"):
        nodes.leave(node)
    nodes.look(devices)
    for device in declared:
        devices.forget(device, "gone")
    nodes.join("b2", "10.0.0.2")
    assert nodes.look(devices) == ([SECOND], [])


def test_a_node_on_which_no_worker_starts_is_not_tried_again():
    nodes = Nodes()
    devices, declared = real(nodes)
    nodes.join("a1", "10.0.0.1")
    nodes.look(devices)
    devices.forget(declared[0], "its worker could not be started")
    assert nodes.look(devices) == ([], [])
    nodes.leave("a1")
    nodes.join("a2", "10.0.0.1")
    assert nodes.look(devices) == ([FIRST], [])


def test_the_nodes_are_looked_at_once_a_second():
    nodes = Nodes()
    devices, _ = real(nodes)
    assert devices.left_s() == 0.0
    nodes.look(devices)
    nodes.join("a1", "10.0.0.1")
    assert devices.left_s() == 1.0
    assert devices.look() == ([], [])
    assert RealDevices(()).left_s() is None


def test_devices_are_awaited_for_the_time_of_their_class():
    nodes = Nodes()
    devices, declared = real(nodes)
    nodes.join("a1", "10.0.0.1")
    nodes.look(devices)
    nodes.now_s += 28.0
    assert (devices.awaited, devices.why_none()) == ({2}, "")
    nodes.now_s += 2.0
    assert (devices.awaited, devices.why_none()) == (frozenset(), "")  # one is there
    nodes.leave("a1")
    devices.forget(declared[0], "node 10.0.0.1 is gone")
    assert (devices.awaited, devices.why_none()) == ({1}, "")
    nodes.now_s += 30.0
    missing = "a node with the labels board=rpi4, not in use, has not joined"
    assert devices.why_none() == f"{FIRST}: node 10.0.0.1 is gone; {SECOND}: {missing}"
