"""What is read of Ray's nodes, and a measurement on one."""

from __future__ import annotations

import pytest

from adversa.distributed import nodes
from adversa.engine.resources import Node
from adversa.estimate import measure


def listed(key, name, resources, alive=True):
    return {"NodeID": key, "NodeManagerHostname": name, "Alive": alive, "Resources": resources}


def test_nodes_are_those_that_are_up_with_names_of_their_own(monkeypatch):
    table = [
        listed("aaaa1", "head", {"CPU": 2.0, "memory": 1000.0}),
        listed("bbbb1", "box", {"CPU": 8.0, "GPU": 2.0, "accelerator_type:T4": 1.0}),
        listed("cccc1", "box", {"CPU": 8.0}),
        listed("dddd1", "gone", {"CPU": 64.0}, alive=False),
    ]
    monkeypatch.setattr(nodes.ray, "nodes", lambda: table)
    assert nodes.there() == [
        Node("head", 2, 0, 1000, id="aaaa1"),
        Node("box-bbbb", 8, 2, gpu_type="T4", id="bbbb1"),
        Node("box-cccc", 8, id="cccc1"),
    ]


def test_a_gpus_memory_is_that_of_its_kind(monkeypatch):
    node = Node("a", 8, 2, gpu_type="T4")
    found = {node.kind: measure.Measured({}, {}, 16, 0.0, 0.0)}
    assert [n.gpu_memory for n in nodes.with_memory([node, Node("b", 8)], found)] == [16, None]


@pytest.mark.ray
def test_a_measurement_on_each_kind_of_node(ray_engine, tiny):
    config = tiny(mix={"arms": ["real"]})
    there = nodes.there()
    found = nodes.measured(config, there, 0.1)
    assert set(found) == {n.kind for n in there} and set(found[there[0].kind].seconds) == {
        "read",
        "classifier",
        "score",
    }
