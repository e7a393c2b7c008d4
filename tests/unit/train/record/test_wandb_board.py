"""wandb is given what TensorBoard is given, goes on in the same run after a resume, and never ends a run. Against one
that is pretended, and against the real one without a network."""

import json
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from moe_dist.config import Config
from moe_dist.config.schema import RunConfig
from moe_dist.train.record.board import board_scalars
from moe_dist.train.record.metrics import MetricsWriter, open_metrics
from moe_dist.train.record.wandb_board import check_wandb
from tests.unit.kernels.pretended_packages import module, pretended

LAYER = dict(
    layer=1, kind="feed_forward", drop_rate=0.25, load_max_over_mean=2.0, entropy=0.5, over_budget_by_pool=[1, 2]
)


def record(step: int) -> dict[str, Any]:
    timing = {"timing": {"step": step - 1, "forward": 0.25}} if step > 1 else {}
    return {"step": step, "loss": 3.0 / step, "tokens_per_second": 10.0, "layers": [LAYER], **timing}


class Pretended:
    """The server's runs by id, and what each was sent."""

    def __init__(self, logged_in: bool = True, breaks: str = "") -> None:
        self.runs: dict[str, list[tuple[int, dict[str, float]]]] = {}
        self.begun: list[dict[str, Any]] = []
        self.finished = 0
        self.breaks = breaks
        self.module = module(
            "wandb",
            Settings=lambda **settings: SimpleNamespace(mode="online", **settings),
            setup=lambda settings: SimpleNamespace(settings=settings),
            login=lambda prompt, verify: logged_in,
            init=self.init,
        )

    def init(self, *, id: str, settings: SimpleNamespace, **options: Any) -> "PretendedRun":
        assert settings.silent and settings.console == "off" and options["resume"] == "allow"
        if self.breaks == "init":
            raise OSError("no route\nto host")
        self.begun.append({"id": id, **options})
        return PretendedRun(self, self.runs.setdefault(id, []))


class PretendedRun:
    url = "https://wandb.example/run"

    def __init__(self, server: Pretended, sent: list[tuple[int, dict[str, float]]]) -> None:
        self.server, self.sent = server, sent

    @property
    def step(self) -> int:
        return self.sent[-1][0] + 1 if self.sent else 0

    def define_metric(self, name: str, *, step_metric: str) -> None:
        assert (name, step_metric) == ("time/*", "time/step")

    def log(self, scalars: dict[str, float], *, step: int, commit: bool) -> None:
        assert commit and step >= self.step  # the real one drops what is older, and says so each time
        if self.server.breaks == "log" and step == 2:
            raise RuntimeError("service has gone")
        self.sent.append((step, scalars))

    def finish(self) -> None:
        if self.server.breaks == "finish":
            raise TimeoutError("not all was sent")
        self.server.finished += 1


def writer_of(folder: Path, said: list[str]) -> MetricsWriter:
    config = Config(run=RunConfig(name="mine", wandb="project", tensorboard=False))
    return open_metrics(config, folder, said.append)


def test_the_scalars_of_tensorboard_and_a_run_that_is_resumed_goes_on(tmp_path: Path) -> None:
    server, said = Pretended(), list[str]()
    with pretended(server.module):
        writer = writer_of(tmp_path, said)
        for step in (1, 2, 3, 4):
            writer.log(record(step))
        writer.rewind(2)  # back to a checkpoint, in the same start
        for step in (3, 4, 5):
            writer.log(record(step))
        writer.close()
        assert len(server.begun) == server.finished == 1
        resumed = writer_of(tmp_path, said)
        resumed.rewind(4)
        for step in (5, 6):
            resumed.log(record(step))
        resumed.close()
    first, second = server.begun
    assert first == second and (first["project"], first["name"], first["dir"]) == ("project", "mine", tmp_path)
    assert first["config"]["run"]["name"] == "mine"
    (sent,) = server.runs.values()
    assert [step for step, _ in sent] == [1, 2, 3, 4, 5, 6]
    for step, scalars in sent:
        expected = dict(board_scalars(record(step)))
        assert {"train/loss", "system/tokens_per_second", "moe/layer_1/drop_rate"} <= expected.keys()
        assert scalars == expected | ({"time/forward": 0.25, "time/step": step - 1} if step > 1 else {})
    assert said == ["wandb     https://wandb.example/run"] * 2
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    ("breaks", "reason", "sent"),
    [("init", "no route to host", []), ("log", "service has gone", [1]), ("finish", "not all was sent", [1, 2, 3])],
)
def test_a_failing_wandb_is_one_line(breaks: str, reason: str, sent: list[int], tmp_path: Path) -> None:
    server, said = Pretended(breaks=breaks), list[str]()
    with pretended(server.module):
        writer = writer_of(tmp_path, said)
        for step in (1, 2, 3):
            writer.log(record(step))
        writer.close()
    warnings = [line for line in said if line.startswith("warning")]
    assert warnings == [f"warning: wandb is no longer written ({reason}); metrics.jsonl has everything"]
    assert [step for run in server.runs.values() for step, _ in run] == sent
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3


def test_nobody_is_asked_for_a_password_in_the_middle_of_a_run(tmp_path: Path) -> None:
    server, said = Pretended(logged_in=False), list[str]()
    with pretended(server.module):
        writer_of(tmp_path, said).close()
    (line,) = said
    assert "nobody is logged in: call `wandb login`, or set WANDB_MODE=offline" in line and not server.begun


def test_a_package_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moe_dist.train.record.wandb_board.is_there", lambda name: False)
    with pytest.raises(
        ValueError, match=r"^run\.wandb=x, but wandb is not installed: .* pip install 'moe_dist\[wandb\]'"
    ):
        check_wandb("x")
    check_wandb(None)


OFFLINE = """
import sys
from pathlib import Path
from tests.unit.train.record.test_wandb_board import record, writer_of
said, folder = [], Path(sys.argv[1])
for first in (1, 3):
    writer = writer_of(folder, said)
    writer.rewind(first - 1)
    for step in range(first, first + 3):
        writer.log(record(step))
    writer.close()
print(said)
"""


def records(file: Path) -> Iterator[bytes]:
    """wandb's file is a log of LevelDB behind seven bytes: blocks of 32 KiB, in them pieces of a checksum (4 bytes), a
    length (2), a kind (1: a whole record, 2 to 4: its first, a middle and its last piece) and so many bytes."""
    data, at, begun = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        begun += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield begun
            begun = b""


def offline_steps(file: Path) -> list[tuple[int, float]]:
    from wandb.proto.wandb_internal_pb2 import Record

    found = []
    for data in records(file):
        held = Record()
        held.ParseFromString(data)
        if held.WhichOneof("record_type") == "history":
            values = {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in held.history.item}
            found.append((held.history.step.num, values["train/loss"]))
    return found


@pytest.mark.slow  # starting it twice
def test_the_real_one_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    done = subprocess.run([sys.executable, "-c", OFFLINE, tmp_path], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [str([f"wandb     offline, in {tmp_path}/wandb"] * 2)]
    name = (tmp_path / "wandb-id").read_text()
    files = sorted(tmp_path.glob(f"wandb/offline-run-*-{name}/*.wandb"), key=lambda path: path.stat().st_mtime_ns)
    sent = [step for file in files for step in offline_steps(file)]
    assert sent == [(step, 3.0 / step) for step in (1, 2, 3, 3, 4, 5)]  # wandb merges them by id and step
