"""`amp: auto`: which hardware gets bfloat16, and in which precision the products then are."""

from __future__ import annotations

import pytest
import torch

from adversa.training import precision

AVX512 = {"avx512_f": True, "avx512_vnni": True, "amx_int8": True, "avx512_bf16": False}


@pytest.mark.parametrize(
    ("capabilities", "units"),
    [
        ({}, ""),
        ({"avx2": True}, ""),
        (AVX512, ""),
        ({"avx512_f": True, "avx512_fp16": True}, ""),
        (AVX512 | {"avx512_bf16": True}, "AVX512-BF16"),
        (AVX512 | {"avx512_bf16": True, "amx_tile": True, "amx_bf16": True}, "AMX"),
        ({"architecture": "arm64", "neon": True, "fp16_arith": True}, ""),
        ({"architecture": "arm64", "neon": True, "bf16": True}, "ARM BF16"),
    ],
)
def test_a_cpu_gets_bfloat16_where_it_multiplies_it(capabilities, units):
    found = precision.of_cpu(capabilities)
    assert (found.units, found.amp) == (units, bool(units))


@pytest.mark.parametrize(
    ("compute_capability", "amp"),
    [((7, 0), False), ((7, 5), False), ((8, 0), True), ((8, 9), True), ((9, 0), True)],
)
def test_a_gpu_gets_bfloat16_from_compute_capability_8(compute_capability, amp):
    assert precision.of_gpu("a GPU", compute_capability).amp is amp


def product(amp: precision.Amp) -> torch.dtype:
    a = torch.eye(4)
    with precision.autocast("cpu", amp):
        return (a @ a).dtype


@pytest.mark.parametrize("units", ["", "AMX"])
def test_the_products_have_the_precision_that_was_chosen(monkeypatch, units):
    monkeypatch.setattr(
        precision, "hardware", lambda device: precision.Hardware(device, "made up", units)
    )
    assert product(True) is torch.bfloat16
    assert product(False) is torch.float32
    assert product("auto") is (torch.bfloat16 if units else torch.float32)


@pytest.mark.parametrize("units", ["", "AMX"])
def test_a_network_is_built_for_the_precision_that_auto_comes_to(monkeypatch, units):
    """Depthwise convolutions are replaced for bfloat16 alone."""
    from adversa import config as cfg
    from adversa.classify import model

    def kinds(amp):
        section = cfg.Classifier(model="test_efficientnet", amp=amp)
        return [type(m).__name__ for m in model.build(section, 2, 32).modules()]

    monkeypatch.setattr(
        precision, "hardware", lambda device: precision.Hardware("cpu", "made up", units)
    )
    assert kinds("auto") == kinds(bool(units)) != kinds(not units)


def test_this_machine_is_known():
    found = precision.hardware("cpu")
    assert found.device == "cpu" and found.name
    flags = torch.cpu.get_capabilities()
    assert found.amp == any(flags.get(f) for f in ("amx_bf16", "avx512_bf16", "bf16", "sve_bf16"))
