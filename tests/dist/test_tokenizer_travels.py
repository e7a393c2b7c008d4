"""A newcomer's own JSONL, in three commands: a BPE of 8,000, a few steps, and text that is decoded. Then all that a
tokenizer is asked for later: bits per byte, going on, generating, blends."""

import json
import math
import random
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from moe_dist.checkpoint.layout import Manifest
from moe_dist.cli import main
from moe_dist.config.load import load_config
from moe_dist.data.tokenizers import load_tokenizer
from moe_dist.train.tasks import make_task
from tests.dist.helpers import TINY, forget_process_group

SYLLABLES = "ka lo mi ten sur da ve po ris na qu el or am it be".split()


def own_jsonl(path: Path, records: int = 1000) -> Path:
    """Of so many words that there are 8,000 pairs and more."""
    rng = random.Random(0)
    words = ["".join(rng.choices(SYLLABLES, k=rng.randint(2, 4))) for _ in range(20000)]
    with path.open("w") as file:
        for _ in range(records):
            file.write(json.dumps({"text": " ".join(rng.choices(words, k=40)) + ".\n"}) + "\n")
    return path


def train(folder: Path, name: str, data: dict[str, Any], *flags: str, vocab_size: int = 8000) -> int:
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


def records_of(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "runs" / name / "metrics.jsonl").read_text().splitlines()]


def losses(folder: Path, name: str) -> list[tuple[float, float | None]]:
    return [(record["loss"], record.get("validation_loss")) for record in records_of(folder, name)]


@pytest.mark.slow
def test_own_texts_in_three_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = str(own_jsonl(tmp_path / "own.jsonl"))
    tok, prefix = str(tmp_path / "tok"), str(tmp_path / "corpus")
    assert main(["data", "tokenizer", "train", source, "--vocab-size", "8000", "--output", tok]) == 0
    assert "a tokenizer of 8000 ids" in capsys.readouterr().out
    command = ["data", "prepare", source, "--tokenizer", tok, "--output", prefix, "--workers", "1"]
    assert main(command) == 0
    assert train(tmp_path, "a", {"kind": "indexed", "paths": [prefix]}, "--run.sample-tokens", "5") == 0
    printed = capsys.readouterr().out
    assert "bits/byte" in printed and "bits/token" in printed and "sample after 'def '" in printed
    tokenizer, run = load_tokenizer(tok), tmp_path / "runs/a"
    assert load_tokenizer(str(run / "tokenizer")).digest == tokenizer.digest

    # bits per byte, counted again from the windows that were evaluated
    last, config = records_of(tmp_path, "a")[-1], load_config(run / "config.yaml")
    corpus = make_task(config).corpus  # type: ignore[attr-defined]
    windows = np.arange(4) * ((len(corpus.validation) - 1) // 16) // 4 * 16
    targets = [corpus.validation[np.arange(start + 1, start + 17)].tolist() for start in windows]
    # a letter may be cut by a window, so of each token by itself; an end of text is no text
    text = sum(len(bytes_of(tokenizer, token)) for row in targets for token in row if token != tokenizer.end_id)
    assert last["validation_bits_per_byte"] == pytest.approx(last["validation_loss"] * 64 / math.log(2) / text)
    assert last["validation_bits_per_token"] == pytest.approx(last["validation_loss"] / math.log(2))

    # the checkpoint knows the tokenizer, generate asks it
    manifest = Manifest.load(sorted((run / "checkpoints").iterdir())[-1])
    assert manifest.run["tokenizer"] == tokenizer.digest
    generate = ["generate", str(run), "--prompt", "kalo miten", "--max-new-tokens", "6", "--temperature", "0"]
    capsys.readouterr()
    forget_process_group()
    assert main(generate) == 0
    said = capsys.readouterr()
    assert said.out.startswith("kalo miten") and "prompt tokens" in said.err
    new = said.out.removeprefix("kalo miten").rstrip("\n")
    assert new and tokenizer.decode(tokenizer.encode(new)) == new
    forget_process_group()
    assert main([*generate, "--stream"]) == 0
    assert capsys.readouterr().out == said.out
    forget_process_group()
    assert main(["experts", str(run), "add", "1", "--output", str(tmp_path / "more")]) == 0
    assert load_tokenizer(str(tmp_path / "more/tokenizer")).digest == tokenizer.digest
    shutil.move(run / "tokenizer", tmp_path / "kept")
    forget_process_group()
    assert main(generate) == 2
    assert "with their tokenizer is not there" in capsys.readouterr().err

    # on the fly it is the same tokenizer; another one is refused when going on
    data = {"kind": "jsonl", "paths": [source], "tokenizer": tok}
    assert train(tmp_path, "b", data) == 0
    whole = losses(tmp_path, "b")
    shutil.rmtree(tmp_path / "runs/b/checkpoints/step-000004")
    assert train(tmp_path, "b", data, "--resume") == 0 and losses(tmp_path, "b") == whole
    small = str(tmp_path / "small")
    assert main(["data", "tokenizer", "train", source, "--vocab-size", "400", "--output", small]) == 0
    assert train(tmp_path, "b", data | {"tokenizer": small}, "--resume") == 2
    assert "tokenizer=" in capsys.readouterr().err
    assert train(tmp_path, "c", data, vocab_size=500) == 2
    assert "has 8000 token ids, but model.vocab_size is 500: set model.vocab_size to 8000" in capsys.readouterr().err


def bytes_of(tokenizer: Any, token: int) -> str:
    """Letters of the byte-level alphabet, one for each byte of the token."""
    return str(tokenizer._tokenizer.id_to_token(token))


def test_a_blend_goes_on_in_its_middle(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, first in (("a", 0), ("b", 100), ("held", 200)):
        texts = [" ".join(chr(97 + (first + i * j) % 26) * 3 for j in range(60)) for i in range(30)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        command = ["data", "prepare", str(tmp_path / f"{name}.jsonl"), "--tokenizer", "bytes", "--workers", "1"]
        assert main([*command, "--output", str(tmp_path / name)]) == 0
    blend = {str(tmp_path / "a"): 3.0, str(tmp_path / "b"): 1.0}
    data = {"kind": "indexed", "blend": blend}
    capsys.readouterr()
    assert train(tmp_path, "whole", data, vocab_size=256) == 0
    assert re.search(r"blend: \S+/a 75.0%, read 0.0\d+ times; \S+/b 25.0%, read", capsys.readouterr().out)
    whole = losses(tmp_path, "whole")
    assert "validation_bits_per_byte" in records_of(tmp_path, "whole")[-1]
    shutil.copytree(tmp_path / "runs/whole", tmp_path / "runs/again")
    shutil.rmtree(tmp_path / "runs/again/checkpoints/step-000004")
    assert train(tmp_path, "again", data, "--resume", vocab_size=256) == 0
    assert losses(tmp_path, "again") == whole
    assert train(tmp_path, "longer", data, "--train.steps", "5", vocab_size=256) == 0
    assert [loss for loss, _ in losses(tmp_path, "longer")][:2] == [loss for loss, _ in whole][:2]
    masked = data | {"mask_documents": True, "reset_positions": True}
    assert train(tmp_path, "masked", masked, vocab_size=256) == 0
    assert all(one != other for one, other in zip(losses(tmp_path, "masked"), whole, strict=True))
    other = {"kind": "indexed", "blend": dict(zip(blend, (1.0, 1.0), strict=True))}
    capsys.readouterr()
    assert train(tmp_path, "again", other, "--resume", vocab_size=256) == 2
    assert "was trained with data=" in capsys.readouterr().err
    last = records_of(tmp_path, "whole")[-1]
    by_corpus = last["validation_loss_by_corpus"]
    assert list(by_corpus) == list(blend) and by_corpus[str(tmp_path / "a")] != by_corpus[str(tmp_path / "b")]
    assert last["validation_loss"] == pytest.approx(np.average([*by_corpus.values()], weights=[3.0, 1.0]), rel=1e-12)
    held_out = data | {"validation_paths": [str(tmp_path / "held")]}
    assert train(tmp_path, "held", held_out, "--run.sample-tokens", "3", vocab_size=256) == 0
    assert "sample after" in capsys.readouterr().out


def test_each_held_out_corpus_has_the_loss_it_has_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = {}
    for name, first, documents in (("train", 0, 30), ("one", 200, 20), ("other", 300, 7)):
        texts = [" ".join(chr(97 + (first + i * j) % 26) * 3 for j in range(60)) for i in range(documents)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        paths[name] = str(tmp_path / name)
        command = ["data", "prepare", str(tmp_path / f"{name}.jsonl"), "--tokenizer", "bytes", "--workers", "1"]
        assert main([*command, "--output", paths[name]]) == 0

    def last(run: str, *held_out: str) -> dict[str, Any]:
        data = {"kind": "indexed", "paths": [paths["train"]], "validation_paths": [paths[name] for name in held_out]}
        assert train(tmp_path, run, data, "--run.eval-sequences", "100000", vocab_size=256) == 0  # all windows
        return records_of(tmp_path, run)[-1]

    alone = {paths[name]: last(f"alone-{name}", name)["validation_loss"] for name in ("one", "other")}
    capsys.readouterr()
    both = last("both", "one", "other")
    assert both["validation_loss_by_corpus"] == pytest.approx(alone, rel=1e-12)
    tokens = [Path(f"{path}.bin").stat().st_size for path in alone]
    assert both["validation_loss"] == pytest.approx(np.average([*alone.values()], weights=tokens), rel=1e-12)
    said = capsys.readouterr().out
    for path, loss in alone.items():
        assert re.search(rf"^step 4  of .*{re.escape(path)} {loss:.4f}", said, re.MULTILINE)
    assert "validation, each" in said
    assert "validation_loss_by_corpus" not in records_of(tmp_path, "alone-one")[-1]
