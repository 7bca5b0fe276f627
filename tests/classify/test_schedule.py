from __future__ import annotations

from itertools import pairwise

import pytest
import timm
import torch

from adversa.classify.model import build
from adversa.classify.schedule import (
    learning_rate,
    parameter_groups,
    set_rates,
    thaw,
    training_side,
)
from adversa.config import Classifier


def scales(
    model: str, decay: float, size: int = 64
) -> tuple[torch.nn.Module, dict[str, tuple[float, float]]]:
    """(network, parameter name -> (its part of the rate, its weight decay))."""
    config = Classifier(model=model, layer_decay=decay, weight_decay=0.1)
    network = build(config, 3, size)
    groups = parameter_groups(network, config)
    found = {id(p): (g["lr_scale"], g["weight_decay"]) for g in groups for p in g["params"]}
    assert sum(len(g["params"]) for g in groups) == len(found)
    return network, {name: found[id(p)] for name, p in network.named_parameters()}


def test_schedule() -> None:
    config = Classifier(steps=100, warmup=0.1, lr=1.0)
    rates = [learning_rate(s, config) for s in range(1, 101)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == 1.0 and rates[-1] == pytest.approx(0.01)
    assert all(a > b for a, b in pairwise(rates[9:]))
    assert rates[54] == pytest.approx((1 + 0.01) / 2)
    assert learning_rate(1, config.model_copy(update={"warmup": 0.0})) == pytest.approx(
        1.0, abs=1e-3
    )


def test_a_thawed_trunk_warms_up_anew() -> None:
    config = Classifier(steps=100, warmup=0.1, head_steps=20)
    assert [thaw(s, config) for s in (1, 20, 21, 25, 30, 31)] == pytest.approx(
        [0, 0, 0.1, 0.5, 1, 1]
    )
    assert thaw(1, config.model_copy(update={"head_steps": 0})) == 1


def test_layers_learn_slower_the_farther_from_the_head() -> None:
    _, found = scales("tf_efficientnet_lite0", 0.8)
    # timm's own groups: the stem, 15 blocks, the last block with conv_head
    groups = len({s for n, (s, _) in found.items() if n.startswith("trunk.")})
    assert groups == 17
    assert found["head.weight"] == (1.0, 0.1) and found["head.bias"] == (1.0, 0.0)
    assert found["trunk.conv_head.weight"][0] == pytest.approx(0.8)
    assert found["trunk.blocks.0.0.conv_dw.weight"][0] == pytest.approx(0.8**16)
    assert found["trunk.conv_stem.weight"] == pytest.approx((0.8**17, 0.1))


def test_without_layer_decay_all_learn_alike_and_only_matrices_decay() -> None:
    for model in ("test_resnet", "test_vit"):
        network, found = scales(model, 1.0, 160)
        assert {s for s, _ in found.values()} == {1.0}
        exempt = {f"trunk.{n}" for n in getattr(network.trunk, "no_weight_decay", set)()}
        for name, p in network.named_parameters():
            assert found[name][1] == (0.1 if p.ndim > 1 and name not in exempt else 0.0), name
    config = Classifier(model="test_resnet")
    assert len(parameter_groups(build(config, 3, 32), config)) == 4


def test_what_a_model_fixes_is_not_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    config = Classifier(model="test_resnet")
    network = build(config, 3, 32)
    network.trunk.conv1[0].weight.requires_grad_(False)
    trained = {id(p) for g in parameter_groups(network, config) for p in g["params"]}
    assert id(network.trunk.conv1[0].weight) not in trained
    assert len(trained) == sum(1 for _ in network.parameters()) - 1


def test_rates_are_the_schedule_times_the_groups_scale() -> None:
    config = Classifier(
        model="test_resnet", layer_decay=0.5, steps=10, warmup=0.2, lr=0.1, head_steps=4
    )
    network = build(config, 3, 32)
    optimizer = torch.optim.AdamW(parameter_groups(network, config), lr=config.lr)
    layers = (
        max(
            timm.models.group_parameters(
                network.trunk, network.trunk.group_matcher(), reverse=True
            ).values()
        )
        + 1
    )
    stem = next(
        g
        for g in optimizer.param_groups
        if any(p is network.trunk.conv1[0].weight for p in g["params"])
    )
    head = next(
        g for g in optimizer.param_groups if any(p is network.head.weight for p in g["params"])
    )
    for step, part in ((3, 0.0), (5, 0.5), (9, 1.0)):
        assert set_rates(optimizer, config, step) == head["lr"] == learning_rate(step, config)
        assert stem["lr"] == pytest.approx(learning_rate(step, config) * 0.5**layers * part)


def test_training_images_grow_to_the_full_side() -> None:
    config = Classifier(steps=100, first_size=64)
    sides = [training_side(step, config, 128) for step in range(1, 101)]
    assert (
        sides[0] == 64
        and sides[70] == 128
        and set(sides) == {64, 80, 96, 112, 128}
        and sides == sorted(sides)
    )
    config = Classifier(steps=100, first_size=64, input_size=96)
    assert {training_side(step, config, 64) for step in range(1, 101)} == {64, 80, 96}
    assert {training_side(step, Classifier(steps=100), 128) for step in (1, 50, 100)} == {128}
    config = Classifier(steps=100, first_size=64)
    assert (
        max(training_side(step, config, 100) for step in range(1, 101)) == 100
    )  # not above the resolution by rounding
