"""`moe-dist doctor`: what it finds on a machine that is well, and on machines that are not, which are pretended."""

import json
import os
import shutil
import sys
import time
from collections import namedtuple
from pathlib import Path

import pytest

from moe_dist.cli import main
from moe_dist.doctor import machine, network, software
from moe_dist.doctor.findings import Findings, NoAnswer, answer_of, within

Usage = namedtuple("Usage", "total used free")


def test_this_machine_can_train(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("SLURM_JWT", "hush-1")
    monkeypatch.setenv("WANDB_API_KEY", "hush-2")
    monkeypatch.setenv("HF_ENDPOINT", "https://me:hush-3@example.org/x")
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    assert main(["doctor", "--json", "--seconds", "240"]) == 0  # of a machine that others use
    printed = capsys.readouterr().out
    assert "hush" not in printed
    told = json.loads(printed)
    assert told["broken"] == [] and list(told) == ["facts", "broken", "notes"]
    facts = told["facts"]
    assert facts["software"]["torch"] == sys.modules["torch"].__version__
    assert facts["backends"]["model.moe.experts=loop"] == "loop"
    assert facts["backends"]["model.attention.backend=auto"].startswith("packed up to 1,024 tokens where at least 4 ")
    assert facts["backends"]["model.moe.experts=triton"].startswith("no: ") or "TRITON_INTERPRET" in os.environ
    assert str(len(os.sched_getaffinity(0))) in facts["cpu"]["cores"]
    assert facts["network"]["lo"].startswith("127.0.0.1")
    assert float(facts["checks"]["two processes over gloo"].split()[-2]) > 0
    assert facts["environment"]["NCCL_DEBUG"] == "INFO"
    assert facts["environment"]["HF_ENDPOINT"] == "https://(masked)@example.org/x"


def test_what_is_broken_is_said_in_a_line_and_in_time(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two processes have a hundredth of a second for what takes seconds; the interface is none."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nowhere0")
    began = time.monotonic()
    assert main(["doctor", "--seconds", "0.01"]) == 1
    assert time.monotonic() - began < 200
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "moe-dist doctor: 2 broken, see the lines below"
    assert lines[1].startswith("  broken  GLOO_SOCKET_IFNAME=nowhere0: there is no interface nowhere0 here; it has lo")
    assert "add up a number over gloo (no answer in 0.01 s): see that" in lines[2]


def test_a_machine_without_torch() -> None:
    code = "import sys; sys.modules['torch'] = None; from moe_dist.cli import main; sys.exit(main(['doctor']))"
    answer = answer_of([sys.executable, "-c", code], 200)
    assert answer.code == 1 and answer.error == ""
    assert "  broken  torch cannot be imported (" in answer.out and "\ngpus\n" in answer.out


def test_nobody_waits_for_what_gives_no_answer() -> None:
    began = time.monotonic()
    with pytest.raises(NoAnswer, match=r"no answer in 0.1 s"):
        within(0.1, lambda: time.sleep(250))
    # The shell's child keeps its output open: whoever reads that to its end would wait for minutes.
    with pytest.raises(NoAnswer):
        answer_of(["bash", "-c", "sleep 250 & wait"], 0.5)
    assert time.monotonic() - began < 200
    assert within(200, lambda: 3) == 3
    with pytest.raises(OSError, match="gone"):
        within(200, lambda: (_ for _ in ()).throw(OSError("gone")))
    answer = answer_of(["bash", "-c", "echo out; echo err >&2; exit 3"], 200)
    assert (answer.code, answer.out, answer.error) == (3, "out", "err")


@pytest.mark.parametrize(
    ("torch_says", "device", "broken"),
    [
        ('{"built": "12.8", "nccl": "2.27.3", "gpus": [["H100", 85899345920, "9.0"]]}', "cuda", ""),
        ('{"built": "12.8", "nccl": null, "gpus": [["H100", 85899345920, "9.0"]]}', "cuda", "has no NCCL"),
        ('{"built": null, "nccl": null, "gpus": []}', "cpu", "torch was built without CUDA"),
        ('{"built": "13.0", "nccl": null, "gpus": []}', "cpu", "was built for CUDA 13.0 and finds none"),
        (None, "cpu", "torch failed or said nothing about it in 7 s"),
    ],
)
def test_gpus(torch_says: str | None, device: str, broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(
        machine, "said_by", lambda command, seconds: "570.1" if command[0] == "nvidia-smi" else torch_says
    )
    found = Findings()
    assert machine.look_at_gpus(found, 7.0) == device
    assert found.facts["gpus"]["driver"] == "570.1"
    assert [line for line in found.broken if broken and broken in line] == found.broken
    assert bool(found.broken) == bool(broken)
    if not broken:
        assert found.facts["gpus"]["gpu 0"] == "H100, 80.0 GiB, capability 9.0"


def test_hidden_gpus_are_no_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    says = '{"built": "12.8", "nccl": null, "gpus": []}'
    monkeypatch.setattr(machine, "said_by", lambda command, _: "570.1" if command[0] == "nvidia-smi" else says)
    found = Findings()
    assert machine.look_at_gpus(found, 7.0) == "cpu"
    assert found.broken == [] and "hides the GPUs" in found.notes[0]


def test_little_shared_memory_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(2**26, 0, 2**26))
    found = Findings()
    machine.look_at_memory(found, tmp_path)
    assert "64.0 MiB free: too small for NCCL" in found.notes[0] and "--shm-size" in found.notes[0]
    assert found.broken == []
    machine.look_at_disks(found)
    assert "checkpoints may not fit" in found.notes[1]
    monkeypatch.undo()
    found = Findings()
    machine.look_at_memory(found, tmp_path / "absent")
    assert "cannot be used" in found.broken[0] and "--ipc=host" in found.broken[0]


def test_which_interface_is_taken() -> None:
    addresses = {"lo": "127.0.0.1", "docker0": "172.17.0.1", "eth0": "10.0.0.2", "ib0": "10.1.0.2"}
    names = list(addresses)
    assert network.gloo_interface(addresses, "10.0.0.2", {}) == "eth0, whose address the host's name has"
    assert "GLOO_SOCKET_IFNAME=docker0" in network.gloo_interface(addresses, "127.0.1.1", {})
    assert network.gloo_interface({"lo": "127.0.0.1"}, None, {}).endswith("leads to nothing")
    assert network.gloo_interface(addresses, None, {"GLOO_SOCKET_IFNAME": "ib0"}) == "ib0, by GLOO_SOCKET_IFNAME"
    assert network.nccl_interface(names, {}) == "ib0"
    assert network.nccl_interface(names[:3], {}) == "eth0"
    assert network.nccl_interface(names[:2], {}) == "docker0"
    assert network.unknown_interfaces("eth,ib0", names) == []
    assert network.unknown_interfaces("=eth,ib0", names) == ["eth"]
    assert network.unknown_interfaces("^docker,lo", names) == []


@pytest.mark.parametrize(
    ("name", "value", "shown"),
    [
        ("NCCL_DEBUG", "INFO", "INFO"),
        ("HF_TOKEN", "abc", "(masked)"),
        ("SLURM_JWT", "abc", "(masked)"),
        ("WANDB_API_KEY", "", ""),
        ("TORCH_INDEX_URL", "https://me:abc@host/a", "https://(masked)@host/a"),
        ("NCCL_IB_HCA", "x" * 200, "x" * 160 + "..."),
    ],
)
def test_secrets_are_masked(name: str, value: str, shown: str) -> None:
    found = Findings()
    network.look_at_environment(found, {name: value, "EDITOR": "vi"})
    assert found.facts["environment"] == {name: shown}


def test_packages_that_are_absent_or_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = ["torch<1", "numpy", "no-such-package>=2", "absent-too; extra == 'dev'"]
    monkeypatch.setattr(software.metadata, "requires", lambda name: wanted)
    lines = software.unmet_requirements("moe_dist")
    assert [line.split()[0] for line in lines] == ["torch", "no-such-package"]
    assert "is not <1: pip install 'torch<1'" in lines[0]
    assert lines[1] == "no-such-package is not installed: pip install 'no-such-package>=2'"


def test_mistakes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--seconds", "0"]) == 2
    assert "--seconds 0 is not above 0" in capsys.readouterr().err
