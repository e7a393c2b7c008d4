"""Strict loading: what is accepted, and what every refusal says."""

import math
from dataclasses import asdict
from pathlib import Path

import pytest

from moe_dist.config import Config
from moe_dist.config.load import dump_config, load_config, override_config
from moe_dist.config.parse import parse_dict


def write(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def refusal(folder: Path, text: str) -> str:
    """What loading `text` says, without the path that opens every line."""
    path = write(folder, text)
    with pytest.raises(ValueError) as caught:
        load_config(path)
    lines = str(caught.value).splitlines()
    assert all(line.startswith(f"{path}: ") for line in lines), lines
    return "\n".join(line.removeprefix(f"{path}: ") for line in lines)


def test_no_file_and_empty_file_and_empty_sections_are_the_defaults(tmp_path: Path) -> None:
    assert load_config(None) == Config()
    assert load_config(write(tmp_path, "# nothing\n")) == Config()
    assert load_config(write(tmp_path, "model:\n  moe:\ntrain:\n")) == Config()


def test_values_land_where_they_belong(tmp_path: Path) -> None:
    config = load_config(
        write(
            tmp_path,
            """
            model: {d_model: 64, moe: {top_k: 1, capacity_factor: null, drop_policy: score}}
            data: {kind: text, paths: [a.txt, 2024-01-01]}
            parallel: {sequence_parallel: true}
            """,
        )
    )
    assert (config.model.d_model, config.model.moe.top_k) == (64, 1)
    assert config.model.moe.capacity_factor is None
    assert config.model.moe.drop_policy == "score"
    assert config.data.paths == ["a.txt", "2024-01-01"]
    assert config.parallel.sequence_parallel is True
    assert config.train == Config().train


@pytest.mark.parametrize(
    ("text", "value"),
    [("3e-4", 3e-4), ("1e-3", 1e-3), ("1E+2", 100.0), ("5e3", 5000.0), ("2.5e-1", 0.25), (".5e1", 5.0), ("1", 1.0)],
)
def test_scientific_notation_and_integers_are_numbers(tmp_path: Path, text: str, value: float) -> None:
    lr = load_config(write(tmp_path, f"optim: {{lr: {text}}}")).optim.lr
    assert lr == value
    assert isinstance(lr, float)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("model: {moe: {topk: 1}}", "model.moe.topk: unknown key; did you mean top_k?"),
        ("model: {top_k: 1}", "model.top_k: unknown key; top_k belongs under model.moe or model.attention.moe"),
        ("lr: 1.0", "lr: unknown key; lr belongs under optim"),
        ("train: {d_ff: 1}", "train.d_ff: unknown key; d_ff belongs under model or model.moe or model.attention.moe"),
        ("model: {topk: 1}", "model.topk: unknown key; did you mean model.moe.top_k?"),
        ("modle: {d_model: 1}", "modle: unknown key; did you mean model?"),
        ("parallel: {zzz: 1}", "parallel.zzz: unknown key; parallel has ep, etp, node_size, tp, sequence_parallel"),
        ("1: 2", "1: unknown key; the top level has task, model, parallel, engine, optim, data, train, run, guard"),
        ("model: {d_model: big}", "model.d_model: 'big' is not an integer"),
        ("model: {d_model: 64.0}", "model.d_model: 64.0 is not an integer"),
        ("model: {d_model: true}", "model.d_model: True is not an integer"),
        ("model: {d_model: null}", "model.d_model: None is not an integer"),
        ("optim: {lr: fast}", "optim.lr: 'fast' is not a number"),
        ("optim: {lr: .nan}", "optim.lr: nan is not a finite number"),
        ("optim: {lr: 1e999}", "optim.lr: inf is not a finite number"),
        ("engine: {grad_clip: None}", "engine.grad_clip: 'None' is not a number; write null for none"),
        ("run: {tensorboard: 1}", "run.tensorboard: 1 is not true or false"),
        ("run: {name: 7}", "run.name: 7 is not text; put it in quotes"),
        ("data: {paths: a.txt}", "data.paths: 'a.txt' is not a list"),
        ("data: {paths: [a, 3]}", "data.paths.1: 3 is not text; put it in quotes"),
        ("train: 3", "train: 3 is not a section (key: value lines)"),
        ("engine: {name: horovod}", "engine.name: 'horovod' is not one of 'native', 'deepspeed'"),
    ],
)
def test_refusals_name_the_key_and_the_way_out(tmp_path: Path, text: str, expected: str) -> None:
    assert refusal(tmp_path, text) == expected


def test_all_problems_are_reported_at_once(tmp_path: Path) -> None:
    lines = refusal(tmp_path, "model: {d_model: big, moe: {topk: 1}}\noptim: {lr: x}\n").splitlines()
    assert sorted(lines) == [
        "model.d_model: 'big' is not an integer",
        "model.moe.topk: unknown key; did you mean top_k?",
        "optim.lr: 'x' is not a number",
    ]


def test_duplicate_keys_are_refused_with_their_lines(tmp_path: Path) -> None:
    text = "model:\n  d_model: 64\n  num_heads: 4\n  d_model: 128\n"
    assert refusal(tmp_path, text) == "line 4: key 'd_model' appears twice, first on line 2; keep one"
    assert refusal(tmp_path, "train: {}\nrun: {}\ntrain: {}\n").startswith("line 3: key 'train' appears twice")


def test_a_merge_may_be_overridden(tmp_path: Path) -> None:
    moe = load_config(write(tmp_path, "model:\n  moe:\n    <<: {top_k: 1, every: 2}\n    every: 4\n")).model.moe
    assert (moe.top_k, moe.every) == (1, 4)


@pytest.mark.parametrize("text", ["- 1\n- 2\n", "just words\n", "3\n"])
def test_a_file_that_is_no_mapping_is_refused(tmp_path: Path, text: str) -> None:
    assert "not sections such as `model:`" in refusal(tmp_path, text)


def test_broken_yaml_names_the_line(tmp_path: Path) -> None:
    assert refusal(tmp_path, "model:\n  d_model: [1\n").startswith("line 3: ")
    assert refusal(tmp_path, "? [a, b]\n: 1\n") == "line 1: a key must be plain text"
    assert "python/object:os.system' is not supported" in refusal(tmp_path, "run: !!python/object:os.system {}\n")


def test_files_that_cannot_be_read_are_value_errors_with_the_path(tmp_path: Path) -> None:
    missing = tmp_path / "missing.yaml"
    with pytest.raises(ValueError, match=r"missing\.yaml: no such file"):
        load_config(missing)
    with pytest.raises(ValueError, match="is a folder"):
        load_config(tmp_path)
    with pytest.raises(ValueError, match="cannot be read"):
        load_config(write(tmp_path, "") / "below-a-file.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"run: {name: caf\xe9}\n")
    with pytest.raises(ValueError, match=r"latin\.yaml: byte 15 is not UTF-8"):
        load_config(tmp_path / "latin.yaml")


def test_dump_has_every_field_and_loads_back_equal(tmp_path: Path) -> None:
    config = Config()
    config.optim.lr, config.optim.eps, config.engine.grad_clip = 3e-4, 1e-12, None
    config.data.paths, config.run.name = ["ünï code.txt", "no", "1e5", "2024-01-01"], "1e3"
    text = dump_config(config)
    assert load_config(write(tmp_path, text)) == config
    assert dump_config(load_config(write(tmp_path, text))) == text
    assert text.index("model:") < text.index("parallel:") < text.index("run:")
    assert text.startswith("task: ")
    for section in (value for value in asdict(config).values() if isinstance(value, dict)):
        for key in section:
            assert f"  {key}:" in text


def test_overrides_win_over_the_file_and_leave_the_rest(tmp_path: Path) -> None:
    path = write(tmp_path, "model: {d_model: 64, moe: {top_k: 2}}\ntrain: {steps: 7}\n")
    flags = "--model.moe.top-k 1 --model.moe.capacity-factor None --data.kind text --data.paths a b".split()
    config = load_config(path, [*flags, "--parallel.sequence-parallel", "--run.no-tensorboard"])
    assert (config.model.moe.top_k, config.model.moe.capacity_factor) == (1, None)
    assert config.data.paths == ["a", "b"]
    assert (config.parallel.sequence_parallel, config.run.tensorboard) == (True, False)
    assert (config.model.d_model, config.train.steps) == (64, 7)


def test_overrides_do_not_change_the_config_given() -> None:
    before = Config()
    assert override_config(before, ["--model.moe.num-experts", "4"]).model.moe.num_experts == 4
    assert before == Config()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_overrides_are_checked_like_the_file(value: float) -> None:
    with pytest.raises(ValueError, match=f"command line: optim.lr: {value} is not a finite number"):
        load_config(None, ["--optim.lr", str(value)])


def test_unknown_flags_end_the_program_with_a_suggestion(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        load_config(None, ["--model.moe.topk", "1"])
    assert caught.value.code == 2
    assert "--model.moe.top-k" in capsys.readouterr().err


def test_help_shows_program_description_docstrings_and_present_values(capsys: pytest.CaptureFixture[str]) -> None:
    config = parse_dict({"train": {"steps": 4321}}, "test")
    with pytest.raises(SystemExit) as caught:
        override_config(config, ["--help"], prog="moe-dist train CONFIG", description="Train a model.")
    assert caught.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for piece in ("moe-dist train CONFIG", "Train a model.", "--model.moe.top-k", "Optimizer steps.", "4321"):
        assert piece in text
