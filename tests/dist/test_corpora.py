"""Training on an indexed corpus, and corpora that change under a run."""

import json
import os
import re
import shutil
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import yaml
from rich.console import Console

from moe_dist.cli import main
from moe_dist.config.parse import parse_dict
from moe_dist.train.loop import Trainer
from moe_dist.train.record.metrics import MetricsWriter
from moe_dist.train.record.status import read_status
from tests.dist.helpers import TINY, forget_process_group, raised, run_checks
from tests.unit.data.test_indexed import write as write_indexed


def train(folder: Path, name: str, data: dict[str, Any], *flags: str, vocab_size: int = 256) -> int:
    values = {
        "model": TINY["model"] | {"vocab_size": vocab_size},
        "data": data,
        "optim": {"warmup_steps": 0},
        "train": TINY["train"] | {"steps": 4, "threads": 1},
        "run": {"root": str(folder / "runs"), "name": name, "save_every": 2, "eval_sequences": 4, "tensorboard": False},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(values))
    forget_process_group()
    return main(["train", str(folder / "run.yaml"), "--device", "cpu", *flags])


def numbers(folder: Path, name: str) -> list[tuple[float, float | None]]:
    lines = (folder / "runs" / name / "metrics.jsonl").read_text().splitlines()
    return [(record["loss"], record.get("validation_bits_per_token")) for record in map(json.loads, lines)]


def test_an_indexed_corpus(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(0)
    documents = [[(rng.integers(0, 50) + np.arange(30) % 7).tolist()] for _ in range(30)]
    prefix = write_indexed(tmp_path / "corpus", documents)
    data = {"kind": "indexed", "paths": [str(prefix)]}
    assert train(tmp_path, "a", data, vocab_size=64) == 0
    printed = capsys.readouterr().out
    assert re.search(r"validation tokens \(\d+\.\d%\) of 1 files", printed)
    assert "bits/token" in printed and "bits/byte" not in printed
    whole = numbers(tmp_path, "a")
    assert len(whole) == 4 and 3 < whole[-1][1] < 7  # near 6 bits: 64 ids, and hardly trained
    shutil.rmtree(tmp_path / "runs/a/checkpoints/step-000004")
    assert train(tmp_path, "a", data, "--resume", vocab_size=64) == 0
    assert numbers(tmp_path, "a") == whole

    forget_process_group()
    assert main(["generate", str(tmp_path / "runs/a"), "--prompt", "x"]) == 2
    assert "trained on token ids" in capsys.readouterr().err
    assert train(tmp_path, "b", data, vocab_size=40) == 2
    said = capsys.readouterr().err
    assert "is not within model.vocab_size=40" in said and "corpus.bin: token id" in said

    with (tmp_path / "corpus.bin").open("r+b") as file:
        file.write(b"\x01")  # another first token
    assert train(tmp_path, "a", data, "--resume", vocab_size=64) == 2
    assert "was trained with data=" in capsys.readouterr().err
    with (tmp_path / "corpus.bin").open("ab") as file:
        file.write(b"\0\0")
    assert train(tmp_path, "a", data, "--resume", vocab_size=64) == 2
    assert "it has 901 tokens, but the sequence lengths" in capsys.readouterr().err


def test_an_indexed_corpus_that_is_cut_under_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A memory map would give zeros up to the end of a page, and end the process by SIGBUS beyond it."""
    prefix = write_indexed(tmp_path / "corpus", [[[token % 50 for token in range(3000)]] for _ in range(4)])
    data, log = {"kind": "indexed", "paths": [str(prefix)]}, MetricsWriter.log

    def log_and_cut(writer: MetricsWriter, record: dict[str, Any]) -> None:
        log(writer, record)
        if record["step"] == 3:
            os.truncate(tmp_path / "corpus.bin", 2)

    monkeypatch.setattr(MetricsWriter, "log", log_and_cut)
    assert train(tmp_path, "cut", data, "--run.eval-every", "100", vocab_size=64) == 1
    said, status = capsys.readouterr().err, read_status(tmp_path / "runs/cut")
    assert said.startswith(f"moe-dist: {prefix}.bin has become shorter since the run began") and "Traceback" not in said
    assert status["state"] == "failed" and "has become shorter" in status["reason"]
    monkeypatch.undo()
    write_indexed(tmp_path / "corpus", [[[token % 50 for token in range(3000)]] for _ in range(4)])  # as it was
    assert train(tmp_path, "cut", data, "--resume", vocab_size=64) == 0


def test_a_folder_that_changes_under_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text"
    text.mkdir()
    for number in range(40):
        (text / f"{number}.txt").write_text(" ".join(str(number + i * i) for i in range(200)))
    data = {"kind": "text", "paths": [str(text)]}
    assert train(tmp_path, "calm", data) == 0

    log = MetricsWriter.log

    def log_and_change(writer: MetricsWriter, record: dict[str, Any]) -> None:
        for path in list(text.iterdir())[:30]:
            path.unlink()
        (text / "new.txt").write_text("new " * 500)
        log(writer, record)

    monkeypatch.setattr(MetricsWriter, "log", log_and_change)
    assert train(tmp_path, "changed", data) == 0
    assert numbers(tmp_path, "changed") == numbers(tmp_path, "calm")  # the corpus was read once, at the start
    monkeypatch.undo()
    assert_refused(tmp_path, "changed", data, capsys)


def test_what_a_run_left_out_is_in_its_environment(tmp_path: Path) -> None:
    """Counted here by hand: whole files fall into a split, each followed by a separator."""
    texts = tmp_path / "texts"
    texts.mkdir()
    sizes = {f"{number}.txt": 200 + number for number in range(20)}
    for number, (name, size) in enumerate(sizes.items()):
        (texts / name).write_bytes(bytes([65 + number]) * size)
    (texts / "copy.txt").write_bytes((texts / "3.txt").read_bytes())
    (texts / "empty.txt").touch()
    (texts / "empty2.txt").touch()
    (texts / "image.png").write_bytes(b"\x89PNG\0\0")
    (texts / ".hidden").write_text("no")
    assert train(tmp_path, "run", {"kind": "text", "paths": [str(texts)], "validation_fraction": 0.3}) == 0
    said = json.loads((tmp_path / "runs/run/environment.json").read_text())["data"]
    left_out = {why: (told["count"], sorted(told["names"])) for why, told in said.pop("left_out").items()}
    assert left_out == {
        "hidden": (1, [f"{texts}/.hidden"]),
        "empty": (2, [f"{texts}/empty.txt", f"{texts}/empty2.txt"]),
        "binary": (1, [f"{texts}/image.png"]),
        "a copy": (1, [f"{texts}/copy.txt"]),
    }
    held_out = [name for name in sizes if int.from_bytes(sha256(name.encode()).digest(), "big") % 10_000 < 3000]
    validation, whole = (sum(sizes[name] + 1 for name in names) for names in (held_out, sizes))
    assert 0 < len(held_out) < 20
    assert len(said.pop("digest")) == 64
    assert sum(said.pop("frequencies")["tokens"]) == whole - validation
    assert 1 <= said.pop("documents_per_micro_step") <= 8  # files that 8 sequences of 16 touch
    assert said == {
        "name": str(texts),
        "files": 20,
        "tokens": {"train": whole - validation, "validation": validation},
        "validation_share": validation / whole,
    }


def test_what_a_classifier_left_out_is_in_its_environment(tmp_path: Path) -> None:
    lines = [{"text": f"{n} squared is {n * n}", "label": "even" if n % 2 else "odd"} for n in range(100)]
    lines += [lines[0], {"text": "0  squared is 0", "label": "odd"}]
    (tmp_path / "texts.jsonl").write_text("\n".join(map(json.dumps, lines)))
    data = {"kind": "jsonl", "paths": [str(tmp_path / "texts.jsonl")]}
    assert train(tmp_path, "run", data, "--task", "classification", vocab_size=300) == 0
    said = json.loads((tmp_path / "runs/run/environment.json").read_text())["data"]
    assert said["left_out"] == {"a copy": {"count": 2}} and sum(said["texts"].values()) == 100
    assert min(said["texts"].values()) > 0
    assert (said["validation_share"], said["test_share"]) == (
        said["texts"]["validation"] / 100,
        said["texts"]["test"] / 100,
    )


def test_data_that_changed_between_two_starts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file changed, added, or removed; bytes that are no UTF-8 are bytes like others. Put back, the run goes on."""
    text = tmp_path / "text"
    text.mkdir()
    for number in range(40):
        (text / f"{number}.txt").write_bytes(bytes((number * 7 + i * i) % 255 + 1 for i in range(500)))
    (text / "empty.txt").touch()
    data = {"kind": "text", "paths": [str(text)]}
    assert train(tmp_path, "run", data) == 0
    file = text / "7.txt"
    before = file.read_bytes()
    for change, undo in (
        (lambda: file.write_bytes(before[:-1] + b"!"), lambda: file.write_bytes(before)),
        (lambda: (text / "new.txt").write_text("another"), (text / "new.txt").unlink),
        (file.unlink, lambda: file.write_bytes(before)),
    ):
        change()
        assert_refused(tmp_path, "run", data, capsys)
        undo()
    (text / "another-empty.txt").touch()
    assert train(tmp_path, "run", data, "--resume", "--train.steps", "6") == 0
    file.unlink()
    assert train(tmp_path, "run", data, "--resume", "--train.steps", "8", "--override", "data") == 0
    assert "overridden: data=" in capsys.readouterr().out


def assert_refused(folder: Path, name: str, data: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert train(folder, name, data, "--resume") == 2
    said = capsys.readouterr().err
    assert "was trained with data=" in said and "--override data" in said and "Traceback" not in said


def check_ranks_that_read_other_data(root: str) -> None:
    """A word of rank 1's text differs; a label of its texts."""
    folder = Path(root) / str(dist.get_rank())
    folder.mkdir()
    words = [f"{number * number} and {number}" for number in range(200)]
    words[7] += f" on rank {dist.get_rank()}"
    (folder / "text.txt").write_text("\n".join(words))
    labels = ["even", "odd"]
    lines = [{"text": str(n * n), "label": labels[n % 2 if n else dist.get_rank()]} for n in range(200)]
    (folder / "texts.jsonl").write_text("\n".join(map(json.dumps, lines)))
    for task, kind, name in (("language_modelling", "text", "text.txt"), ("classification", "jsonl", "texts.jsonl")):
        data = {"kind": kind, "paths": [str(folder / name)]}
        config = parse_dict(TINY | {"task": task, "data": data}, "test")
        said = raised(ValueError, Trainer, config, torch.device("cpu"), Console(quiet=True))
        assert "what ranks read from data.paths is not the same on all ranks: rank 1 has" in said, said


def test_ranks_that_read_other_data(tmp_path: Path) -> None:
    run_checks(2, [check_ranks_that_read_other_data], str(tmp_path))
