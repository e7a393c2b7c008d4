"""Files that mean harm, or were damaged: refused in words that name the file, in little time and memory."""

import random
import resource
import time
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml

from moe_dist.config import Config, validate
from moe_dist.config.load import dump_config, load_config
from moe_dist.config.parse import parse_dict
from moe_dist.config.read import MAX_BYTES

ROOT = Path(__file__).parents[3]
BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 10)
)
PIECES = [
    *("&x ", "*x", "<<: *x", "!!python/object/apply:os.system ['touch /tmp/owned']", "!!int ", "!", "? ", "- ", ": "),
    *("[", "]", "{", "}", "|", ">", "%YAML 9.9\n", "---\n", "...\n", "\t", "\0", "\ud7ff", '"\\ud800"', "'", '"', "#"),
    *(".nan", "-.inf", "1e999", "0x" + "f" * 40, "9" * 5000, "1" * 90, "1:60:60", "0b_", "null", "~", "yes", "=", "<<"),
    *(
        "- " * 50,
        "[" * 50,
        "{a: " * 50,
        "model:",
        "moe:",
        "\n  ",
        "\n",
        "-1",
        "0",
        "3.5",
        "2024-01-01",
        "[1, [2]]",
        "{}",
    ),
]


@contextmanager
def cheap(seconds: float = 10.0, mebibytes: int = 200) -> Iterator[None]:
    """What runs inside takes little time, and little memory of Python's."""
    tracemalloc.start()
    began = time.monotonic()
    yield
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert time.monotonic() - began < seconds
    assert peak < mebibytes * 2**20, f"{peak / 2**20:.0f} MiB"


def refusal(folder: Path, text: str | bytes) -> str:
    path = folder / "run.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(ValueError) as caught, cheap():
        load_config(path)
    lines = str(caught.value).splitlines()
    assert lines and all(line.startswith(f"{path}: ") for line in lines), lines
    assert len(str(caught.value)) < 100_000
    return "\n".join(line.removeprefix(f"{path}: ") for line in lines)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (BOMB, "line 4: more than 10000 values, with aliases written out"),
        ("a: &a [*a]", "the alias *a is inside of what it stands for"),
        ("a: &a {b: *a}", "the alias *a is inside of what it stands for"),
        ("data: {paths: " + "[" * 40 + "]" * 40 + "}", "more than 32 levels deep"),
        ("[" * 100_000, "more than 32 levels deep"),
        ("- " * 100_000, "more than 32 levels deep"),
        ("data: {paths: [" + "a, " * 12_000 + "]}", "more than 10000 values"),
        ("# " + "x" * MAX_BYTES, f"longer than {MAX_BYTES} bytes"),
        ("optim: {lr: " + "9" * 5000 + "}", "line 1: a number of 5000 digits"),
        ("train: {seed: 0x" + "1" * 5000 + "}", "line 1: a number of 5002 digits"),
        ("train: {seed: 0b" + "1" * 5000 + "}", "is not an integer"),
        ("train: {seed: " + "1:" * 5000 + "1}", "is not an integer"),
        ("train: {seed: 0x_}", "train.seed: '0x_' is not an integer"),
        ("train: {seed: " + "9" * 50 + "}", f"train.seed: {'9' * 50} does not fit 64 bits"),
        ("model: {moe: {d_ff: [1, -9223372036854775809]}}", "model.moe.d_ff.1: -9223372036854775809 does not fit"),
        ("optim: {lr: .nan}", "optim.lr: nan is not a finite number"),
        ("optim: {lr: -.inf}", "optim.lr: -inf is not a finite number"),
        ("optim: {lr: 1e999}", "optim.lr: inf is not a finite number"),
        ("run: !!python/object/apply:os.system ['touch owned']", "the tag 'tag:yaml.org,2002:python/object/apply:os.s"),
        ("run: !!python/name:os.system", "the tag 'tag:yaml.org,2002:python/name:os.system' is not supported"),
        ("train: {seed: !!timestamp x}", "the tag"),
        ("train: {seed: !!bool x}", "the tag"),
        ("run: !mine {name: a}", "the tag '!mine' is not supported"),
        ("train: {steps: 1}\ntrain: {steps: 2}", "line 2: key 'train' appears twice, first on line 1"),
        ("model: {moe: {capacity_schedule: {1: 1.0, 0x1: 2.0}}}", "key '1' appears twice"),
        ('model: {moe: {capacity_schedule: {1: 1.0, "1": 2.0}}}', "key '1' appears twice"),
        ("1: {steps: 1}", "1: unknown key"),
        ("null: {steps: 1}", "unknown key"),
        ("train: {.nan: 1}", "unknown key"),
        ("[1, 2]: 3", "a key must be plain text"),
        ("{a: 1}: 3", "a key must be plain text"),
        ("run: {name: \0}", "not YAML: unacceptable character"),
        (b"run: {name: \xff}", "byte 12 is not UTF-8"),
        ('run: {name: "\\ud800"}', "half of a surrogate pair"),
        ("run: {" + "x" * 900 + ": 1}", "unknown key"),
        ("\n".join(f"key{i}: 1" for i in range(3000)), "and 2950 more problems"),
    ],
)
def test_refused(text: str | bytes, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert words in refusal(tmp_path, text)
    assert [path.name for path in tmp_path.iterdir()] == ["run.yaml"]  # no command ran


def test_a_file_without_end_is_refused() -> None:
    with cheap(), pytest.raises(ValueError, match="/dev/zero: longer than"):
        load_config("/dev/zero")


def test_long_values_are_shown_in_part(tmp_path: Path) -> None:
    said = refusal(tmp_path, "optim: {lr: " + "x" * 50_000 + "}")
    assert "is not a number" in said and len(said) < 300


def test_honest_aliases_and_merges_still_work(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(
        "model: {d_model: &width 64, d_ff: *width, moe: {d_ff: *width}}\noptim: {<<: {lr: 0.5}, eps: 1e-6}\n"
    )
    config = load_config(path)
    assert (config.model.d_ff, config.model.moe.d_ff, config.optim.lr, config.optim.eps) == (64, 64, 0.5, 1e-6)


def test_equal_lists_are_written_out(tmp_path: Path) -> None:
    factors = [1.0, None]
    config = Config()
    config.model.moe.capacity_factor = config.model.moe.eval_capacity_factor = factors
    assert "&" not in dump_config(config)
    assert parse_dict(yaml.safe_load(dump_config(config)), "again") == config


def mutated(text: str, number: int) -> bytes:
    """The text with one to four random changes, the same for each number."""
    rng = random.Random(number)
    for _ in range(rng.randint(1, 4)):
        first = rng.randrange(len(text) + 1)
        last = min(len(text), first + rng.choice([0, 0, 1, 1, 5, 40]))
        match rng.randrange(4):
            case 0:
                text = text[:first] + rng.choice(PIECES) + text[last:]
            case 1:
                text = text[:first] + text[last:]
            case 2:
                text = text[:first] + text[first:last] * rng.randint(2, 50) + text[last:]
            case _:
                lines = text.split("\n")
                rng.shuffle(lines)
                text = "\n".join(lines)
    data = bytearray(text.encode(errors="surrogatepass"))
    for _ in range(rng.choice([0, 0, 0, 3])):
        data[rng.randrange(len(data))] = rng.randrange(256)
    return bytes(data)


def check_mutants(folder: Path, numbers: range) -> tuple[int, int]:
    """(accepted, refused); every other outcome fails."""
    seeds = [path.read_text() for path in sorted((ROOT / "configs").glob("*.yaml"))] + [dump_config(Config())]
    path = folder / "run.yaml"
    accepted = 0
    for number in numbers:
        path.write_bytes(mutated(seeds[number % len(seeds)], number))
        try:
            config = load_config(path)
        except ValueError as error:
            assert str(error).startswith(f"{path}: "), f"mutant {number}: {error}"
            continue
        try:
            validate(config, 2)
        except ValueError as error:
            assert str(error)
        accepted += 1
    return accepted, len(numbers) - accepted


def test_mutants(tmp_path: Path) -> None:
    with cheap(seconds=60):
        accepted, refused = check_mutants(tmp_path, range(100))
    assert accepted > 5 and refused > 20
    assert not Path("/tmp/owned").exists()


@pytest.mark.slow
def test_many_mutants(tmp_path: Path) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    check_mutants(tmp_path, range(100, 1100))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 1024  # KiB
    assert not Path("/tmp/owned").exists()
