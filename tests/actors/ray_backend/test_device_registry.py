"""Real devices that join, leave and join again, on a list of nodes that the test sets."""

from fedbonsai.actors.ray_backend.device_registry import DeviceRegistry
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
        self.alive, self.in_use, self.now_s = {}, set(), 100.0

    def join(self, node, address):
        self.alive[node] = address

    def leave(self, node):
        del self.alive[node]

    def poll(self, devices):
        """A second later: which devices have joined, and which are gone, by name."""
        self.now_s += 1.0
        joined, gone = devices.poll()
        self.in_use = {site.node for site in devices.sites.values()}
        return [placement.group for placement in joined], [(placement.group, reason) for placement, reason in gone]

    def nodes(self):
        return [
            Node(id_, address, {"CPU": 4.0, f"node:{address}": float(id_ not in self.in_use)}, {"board": "rpi4"})
            for id_, address in self.alive.items()
        ]


def real(nodes):
    declared = real_devices(load_fleet(FLEET), join_timeout_s=60.0)
    return DeviceRegistry(declared, nodes=nodes.nodes, now=lambda: nodes.now_s), declared


def test_a_device_is_there_while_its_node_is():
    nodes = Nodes()
    devices, declared = real(nodes)
    assert devices.numbers == {1, 2}
    assert devices.take_lost() == [1, 2]  # workers of a resumed run hold nothing
    nodes.join("aaaaaaaaa1", "10.0.0.1")
    assert nodes.poll(devices) == ([FIRST], [])
    assert nodes.poll(devices) == ([], [])
    assert (devices.absence(FIRST), devices.absence("")) == ("", "")
    assert devices.absence(SECOND) == "a node with the labels board=rpi4, not in use, has not joined"
    nodes.leave("aaaaaaaaa1")
    assert nodes.poll(devices) == ([], [(FIRST, "node 10.0.0.1 (aaaaaaaa) is gone")])
    devices.remove(declared[0], "node 10.0.0.1 is gone")
    assert devices.absence(FIRST) == "node 10.0.0.1 is gone"
    assert (devices.take_lost(), devices.take_lost()) == ([1], [])
    assert nodes.poll(devices) == ([], [])


def test_a_new_worker_on_its_node_holds_nothing():
    nodes = Nodes()
    devices, declared = real(nodes)
    nodes.join("aaaaaaaaa1", "10.0.0.1")
    assert nodes.poll(devices) == ([FIRST], [])
    devices.take_lost()
    devices.restarted(declared[0])
    assert (devices.take_lost(), devices.take_lost()) == ([1], [])
    assert devices.absence(FIRST) == ""
    assert nodes.poll(devices) == ([], [])


def test_a_node_that_joins_again_is_the_device_that_it_was():
    nodes = Nodes()
    devices, declared = real(nodes)
    nodes.join("a1", "10.0.0.1")
    nodes.join("b1", "10.0.0.2")
    nodes.poll(devices)
    for node in ("a1", "b1"):
        nodes.leave(node)
    nodes.poll(devices)
    for device in declared:
        devices.remove(device, "gone")
    nodes.join("b2", "10.0.0.2")
    assert nodes.poll(devices) == ([SECOND], [])


def test_a_node_on_which_no_worker_starts_is_not_tried_again():
    nodes = Nodes()
    devices, declared = real(nodes)
    nodes.join("a1", "10.0.0.1")
    nodes.poll(devices)
    devices.remove(declared[0], "its worker could not be started")
    assert nodes.poll(devices) == ([], [])
    nodes.leave("a1")
    nodes.join("a2", "10.0.0.1")
    assert nodes.poll(devices) == ([FIRST], [])


def test_the_nodes_are_listed_once_a_second():
    nodes = Nodes()
    devices, _ = real(nodes)
    assert devices.left_s() == 0.0
    nodes.poll(devices)
    nodes.join("a1", "10.0.0.1")
    assert devices.left_s() == 1.0
    assert devices.poll() == ([], [])
    assert DeviceRegistry(()).left_s() is None


def test_devices_are_awaited_for_the_time_of_their_class():
    nodes = Nodes()
    devices, declared = real(nodes)
    nodes.join("a1", "10.0.0.1")
    nodes.poll(devices)
    nodes.now_s += 28.0
    assert (devices.awaited, devices.no_device_reset()) == ({2}, "")
    nodes.now_s += 2.0
    assert (devices.awaited, devices.no_device_reset()) == (frozenset(), "")  # one is there
    nodes.leave("a1")
    devices.remove(declared[0], "node 10.0.0.1 is gone")
    assert (devices.awaited, devices.no_device_reset()) == ({1}, "")
    nodes.now_s += 30.0
    missing = "a node with the labels board=rpi4, not in use, has not joined"
    assert devices.no_device_reset() == f"{FIRST}: node 10.0.0.1 is gone; {SECOND}: {missing}"
