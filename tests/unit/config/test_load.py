"""Strict loading: what is accepted, and what every refusal says."""

from dataclasses import asdict
from pathlib import Path

import pytest

from moe_dist.config import Config
from moe_dist.config.flags import Parser, override_config
from moe_dist.config.load import dump_config, load_config

# Each would be read as something else if it were not quoted, by YAML 1.2 or by 1.1.
WORDS = "no off 1e5 2024-01-01 010 0o17 4:00:00 ~ 1_0 0b1 +.inf 5. << = null".split() + [""]


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


# Each of these is something else in YAML 1.1: 8, 64, 61, 123, 3 and false.
@pytest.mark.parametrize(
    ("text", "value"), [("010", 10), ("0100", 100), ("-007", -7), ("0o17", 15), ("0x1F", 31), ("+5", 5)]
)
def test_integers_are_those_of_yaml_1_2(tmp_path: Path, text: str, value: int) -> None:
    assert load_config(write(tmp_path, f"train: {{steps: {text}}}")).train.steps == value


@pytest.mark.parametrize("text", ["1:01", "4:00:00", "1_000", "0b11", "0b_", "nan", "inf", "on", "yes", "1e", "=", "-"])
def test_what_yaml_1_2_does_not_call_a_number_is_refused_as_text(tmp_path: Path, text: str) -> None:
    assert refusal(tmp_path, f"train: {{steps: {text}}}") == f"train.steps: {text!r} is not an integer"


def test_off_and_yes_are_words(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, "guard: {spike: off}\nrun: {name: no}\ndata: {paths: [on, yes, y, n, =]}\n"))
    assert (config.guard.spike, config.run.name, config.data.paths) == ("off", "no", ["on", "yes", "y", "n", "="])
    assert refusal(tmp_path, "run: {tensorboard: off}") == "run.tensorboard: 'off' is not true or false"


@pytest.mark.parametrize(
    ("text", "minutes"),
    [("4:00:00", 240.0), ("1:30:00", 90.0), ("1-00:00:30", 1440.5), ("4h", 240.0), ("90m", 90.0), ("1h30m", 90.0)]
    + [("45s", 0.75), ("1.5h", 90.0), ("2d", 2880.0), ("90", 90.0), ("0.5", 0.5), ("null", None)],
)
def test_a_time_limit_means_the_same_in_a_file_and_as_a_flag(tmp_path: Path, text: str, minutes: float | None) -> None:
    config = load_config(write(tmp_path, f"run: {{time_limit: {text}}}"))
    assert config.run.time_limit == minutes
    assert load_config(None, ["--run.time-limit", text]) == config
    assert load_config(write(tmp_path, dump_config(config))) == config


@pytest.mark.parametrize("text", ["1:30", "h", "4 hours", "1:60:00", "-4h", "30m1h", "''"])
def test_no_time(tmp_path: Path, text: str) -> None:
    assert "is no time: write 4h, 90m" in refusal(tmp_path, f"run: {{time_limit: {text}}}")


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
    config.data.paths, config.run.name = (
        ["ünï code.txt", "no", "1e5", "2024-01-01", "010", "0o17", "4:00:00", "off", "~", "", "1_0", "0b1", "+.inf"],
        "1e3",
    )
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
    flags = "--model.moe.top-k 1 --model.moe.capacity-factor null --data.kind text --data.paths a b".split()
    config = load_config(path, [*flags, "--parallel.sequence-parallel", "--run.no-tensorboard"])
    assert (config.model.moe.top_k, config.model.moe.capacity_factor) == (1, None)
    assert config.data.paths == ["a", "b"]
    assert (config.parallel.sequence_parallel, config.run.tensorboard) == (True, False)
    assert (config.model.d_model, config.train.steps) == (64, 7)


def test_overrides_do_not_change_the_config_given() -> None:
    before = Config()
    assert override_config(before, ["--model.moe.num-experts", "4"]).model.moe.num_experts == 4
    assert before == Config()


@pytest.mark.parametrize(
    ("flags", "yaml"),
    [
        ("--model.moe.capacity-factor null", "model: {moe: {capacity_factor: null}}"),
        ("--model.moe.capacity_factor=None", "model: {moe: {capacity_factor: null}}"),
        ("--model.moe.capacity-factor 1.0 null 2", "model: {moe: {capacity_factor: [1.0, null, 2]}}"),
        ("--model.moe.capacity-schedule 0 2.0 100 null", "model: {moe: {capacity_schedule: {0: 2.0, 100: null}}}"),
        ("--model.moe.d-ff 8 16", "model: {moe: {d_ff: [8, 16]}}"),
        ("--run.tensorboard=false", "run: {tensorboard: false}"),
        ("--run.tensorboard false", "run: {tensorboard: false}"),
        ("--run.no-tensorboard", "run: {tensorboard: false}"),
        ("--run.async-save", "run: {async_save: true}"),
        ("--run.async-save=true --run.name 7", "run: {async_save: true, name: '7'}"),
        ("--train.steps 0100 --train.seed=0x10", "train: {steps: 0100, seed: 0x10}"),
        ("--guard.spike off --run.time-limit 4h", "guard: {spike: off}\nrun: {time_limit: 4h}"),
        ("--data.paths 2024 null true", "data: {paths: ['2024', 'null', 'true']}"),
        ("--data.paths", "data: {paths: []}"),
        ("--run.wandb null --data.tokenizer None", "run: {wandb: null}"),
        ("--run.wandb my-project", "run: {wandb: my-project}"),
        ("--data.paths [a.txt,on]", "data: {paths: [a.txt, 'on']}"),
        ("--data.paths ./[a.txt]", "data: {paths: ['./[a.txt]']}"),
        ("--data.paths [a.txt] b", "data: {paths: ['[a.txt]', b]}"),
        ("--optim.lr 1e-3 --optim.weight-decay -1e-3", "optim: {lr: 1e-3, weight_decay: -1e-3}"),
        ("--train.steps 1 --train.steps 2", "train: {steps: 2}"),
    ],
)
def test_a_flag_means_what_the_file_means(tmp_path: Path, flags: str, yaml: str) -> None:
    assert load_config(None, flags.split()) == load_config(write(tmp_path, yaml))


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--optim.lr .nan", "optim.lr: nan is not a finite number"),
        ("--train.steps four", "train.steps: 'four' is not an integer"),
        ("--train.steps null", "train.steps: None is not an integer"),
        ("--run.tensorboard=off", "run.tensorboard: 'off' is not true or false"),
        ("--model.moe.topk 1", "model.moe.topk: unknown key; did you mean top_k?"),
        ("--top-k 1", "--top-k: unknown flag"),
        ("--resum", "--resum: unknown flag; did you mean --resume?"),
        ("--train.steps", "--train.steps needs a value: write --train.steps VALUE"),
        ("--train.steps 1 2", "--train.steps takes one value, got 1 2"),
        ("--model.moe 3", "model.moe: ['3'] is not a section (key: value lines)"),
        ("--train.steps.x 3", "train.steps.x: steps is a value, not a section"),
        ("--model.moe.capacity-schedule 1 2.0 3", "takes pairs of a key and its value, got 3 words"),
        ("--optim.lr [1", "--optim.lr: '[1' cannot be read"),
        ("1e-3 --optim.lr", "'1e-3' belongs to no flag"),
    ],
)
def test_a_wrong_flag_is_one_line_in_the_words_of_a_file(flags: str, said: str) -> None:
    with pytest.raises(ValueError) as caught:
        override_config(Config(), flags.split(), own=["--resume"])
    (line,) = str(caught.value).splitlines()
    assert line.startswith("command line: ") and said in line


def test_flags_of_a_command_are_one_line_too() -> None:
    parser = Parser("moe-dist train")
    parser.add_argument("--device", choices=["cpu", "cuda"])
    with pytest.raises(ValueError, match=r"^command line: argument --device: invalid choice: 'tpu' .*--help lists"):
        parser.parse_args(["--device", "tpu"])
