"""A run on one machine listens on loopback only, and leaves no secret of its environment on disk."""

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
import yaml

from moe_dist.parallel.launch import Rank, rank_from_environment, spawn, start
from moe_dist.parallel.objects import broadcast_json, gather_json, require_same
from tests.dist.helpers import TINY, forget_process_group, raised, run_checks
from tests.dist.network import descendants, is_loopback, listeners

ROOT = Path(__file__).parents[2]
SECRETS = {
    "SECRET_TOKEN_X": "planted-c0ffee-1",
    "HF_TOKEN": "hf_planted-c0ffee-2",
    "WANDB_API_KEY": "planted-c0ffee-3",
    "AWS_SECRET_ACCESS_KEY": "planted-c0ffee-4",
}


def test_an_open_port_is_seen() -> None:
    """What the tests below look for: torch's store listens everywhere, whatever address it is told."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    assert not all(is_loopback(address) for address in listeners({os.getpid()}))
    del store


def write_config(folder: Path) -> Path:
    (folder / "text.txt").write_text(" ".join(str(number * number) for number in range(2000)))
    values: dict[str, Any] = {
        "model": TINY["model"],
        "data": {"kind": "text", "paths": [str(folder / "text.txt")]},
        "optim": {"warmup_steps": 0},
        "train": TINY["train"] | {"steps": 6, "threads": 1},
        "run": {"root": str(folder / "runs"), "save_every": 3, "eval_sequences": 4},
    }
    (folder / "tiny.yaml").write_text(yaml.safe_dump(values))
    return folder / "tiny.yaml"


def run_and_listen(command: list[str], folder: Path) -> tuple[set[str], str]:
    """(all addresses that the command or its children listened on, what it printed); it must end well."""
    environment = os.environ | SECRETS | {"PYTHONPATH": str(ROOT), "MOE_DIST_PYTHON": sys.executable}
    environment = {k: v for k, v in environment.items() if k not in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")}
    seen: set[str] = set()
    log = folder / "printed"
    with log.open("wb") as output:
        running = subprocess.Popen(command, cwd=folder, env=environment, stdout=output, stderr=subprocess.STDOUT)
        deadline = time.monotonic() + 250
        while running.poll() is None and time.monotonic() < deadline:
            seen |= listeners(descendants(running.pid))
            time.sleep(0.1)
        running.kill()
    assert running.wait() == 0, log.read_text()
    return seen, log.read_text()


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_is_quiet_and_keeps_secrets(ranks: int, tmp_path: Path) -> None:
    config = write_config(tmp_path)
    if ranks == 1:
        command = [sys.executable, "-m", "moe_dist.cli", "train", str(config), "--device", "cpu"]
    else:
        command = ["bash", str(ROOT / "launch/torchrun.sh"), str(ranks), str(config), "--parallel.ep", str(ranks)]
    old_mask = os.umask(0o022)
    try:
        seen, printed = run_and_listen(command, tmp_path)
    finally:
        os.umask(old_mask)
    assert seen and all(is_loopback(address) for address in seen), seen
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"environment.json", "config.yaml", "manifest.json", "rank-00000.log"} <= {path.name for path in files}
    for path in files:
        data = path.read_bytes()
        assert not [name for name, secret in SECRETS.items() if secret.encode() in data], path
        assert path.stat().st_mode & 0o777 in (0o644, 0o600), path
    for folder in (path for path in tmp_path.rglob("*") if path.is_dir()):
        assert folder.stat().st_mode & 0o022 == 0, folder
    assert "c0ffee" not in printed


def check_spawned_ranks() -> None:
    seen = listeners({os.getpid()})
    assert seen and all(is_loopback(address) for address in seen), seen


def check_gathered_objects() -> None:
    rank = dist.get_rank()
    value = {"rank": rank, "text": "\udcff ü" * rank, "list": list(range(300 * rank))}
    replies = gather_json(value)
    assert [reply["rank"] for reply in replies] == list(range(dist.get_world_size()))
    assert replies[rank] == value and len(replies[1]["list"]) == 300
    assert broadcast_json(f"from {rank}") == "from 0"
    require_same("what is equal", [1, None, "x"])
    said = raised(ValueError, require_same, "the corpus", "a" if rank == 0 else "b")
    assert "the corpus is not the same on all ranks: rank 1 has b, rank 0 a" in said
    groups = [dist.new_group([alone], backend="gloo") for alone in range(2)]
    assert gather_json(["of", rank], groups[rank]) == [["of", rank]]


def test_spawned_ranks() -> None:
    spawn(check_spawned_ranks, 2)


def test_objects_between_ranks() -> None:
    run_checks(2, [check_gathered_objects])


def test_a_taken_port_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "0")  # to be put back: a rank sets them
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        rank = Rank(0, 2, 0, 2, ("127.0.0.1", taken.getsockname()[1]))
        with pytest.raises(ValueError, match=r"port \d+ of 127.0.0.1, where ranks meet: Address already in use"):
            start(rank, "cpu", 1)
    forget_process_group()


def test_whose_store_it_is() -> None:
    torchrun = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
    torchrun |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "1", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    rank = rank_from_environment(torchrun)
    assert rank.served and rank.on_one_machine
    assert not rank_from_environment(torchrun | {"TORCHELASTIC_USE_AGENT_STORE": "False"}).served
    assert not rank_from_environment(torchrun | {"WORLD_SIZE": "4"}).on_one_machine
