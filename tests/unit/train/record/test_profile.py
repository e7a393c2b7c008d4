"""Peak rates and memory."""

import time

import pytest
import torch

from moe_dist.train.record.profile import datasheet_peak, matmul_peak, memory_bytes


@pytest.mark.parametrize(
    ("name", "bf16", "tf32", "fp32"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4, 494.7, 66.9),
        ("NVIDIA H200", 989.4, 494.7, 66.9),
        ("NVIDIA GH200 480GB", 989.4, 494.7, 66.9),
        ("NVIDIA H100 NVL", 835.5, 417.5, 60.0),
        ("NVIDIA H100 PCIe", 756.0, 378.0, 51.0),
        ("NVIDIA A100-SXM4-80GB", 312.0, 156.0, 19.5),
        ("NVIDIA A100 80GB PCIe", 312.0, 156.0, 19.5),
        ("A100-PCIE-40GB", 312.0, 156.0, 19.5),
        ("NVIDIA L40S", 362.05, 183.0, 91.6),
        ("NVIDIA L4", 121.0, 60.0, 30.3),
        ("NVIDIA A10", 125.0, 62.5, 31.2),
    ],
)
def test_datasheet(name: str, bf16: float, tf32: float, fp32: float) -> None:
    expected = {(torch.bfloat16, False): bf16, (torch.float32, True): tf32, (torch.float32, False): fp32}
    for (dtype, use_tf32), teraflops in expected.items():
        peak = datasheet_peak(name, dtype, tf32=use_tf32)
        assert peak is not None
        assert peak.flops_per_second == teraflops * 1e12
        assert peak.source.startswith(f"datasheet: {name}, ")


@pytest.mark.parametrize("name", ["NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA A100X", "NVIDIA L40", "Tesla V100"])
def test_a_name_that_only_looks_known_is_unknown(name: str) -> None:
    assert datasheet_peak(name, torch.bfloat16, tf32=False) is None


def test_a_dtype_without_a_column_is_unknown() -> None:
    assert datasheet_peak("NVIDIA H200", torch.float64, tf32=False) is None


def test_cpu_peak_is_measured_quickly_and_leaves_random_numbers_alone() -> None:
    state = torch.get_rng_state()
    start = time.perf_counter()
    peak = matmul_peak(torch.device("cpu"), torch.float32)
    assert time.perf_counter() - start < 2.0
    assert 1e8 < peak.flops_per_second < 1e14
    assert peak.source == f"measured: CPU, {torch.get_num_threads()} threads, float32"
    assert torch.equal(torch.get_rng_state(), state)


def test_an_unknown_gpu_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: "NVIDIA Imaginary")
    monkeypatch.setattr("moe_dist.train.record.profile._measure", lambda device, dtype: 5e12)
    peak = matmul_peak(torch.device("cuda", 0), torch.bfloat16)
    assert peak.flops_per_second == 5e12
    assert peak.source == "measured: NVIDIA Imaginary, bfloat16"


def test_other_devices_are_refused() -> None:
    with pytest.raises(ValueError, match="meta"):
        matmul_peak(torch.device("meta"), torch.float32)


def test_memory_sees_an_allocation() -> None:
    cpu = torch.device("cpu")
    before = memory_bytes(cpu)
    ballast = torch.ones(2**24)  # 64 MiB, touched
    after = memory_bytes(cpu)
    assert after["peak"] >= before["peak"]
    assert after["peak"] >= ballast.nbytes
    if "current" in after:
        assert after["current"] - before["current"] > 2**25
        assert after["current"] <= after["peak"]
