import json
from pathlib import Path

from moe_dist.cluster import history


def ends(*reached: tuple[int, int]) -> list[dict[str, object]]:
    return [{"event": "end", "step": step, "saved": saved} for step, saved in reached]


def test_starts_without_progress_are_counted() -> None:
    assert history.fruitless([]) == 0
    assert history.fruitless(ends((0, 0))) == 1, "it ended before its first step"
    assert history.fruitless(ends((10, 0), (10, 0), (9, 0))) == 2
    assert history.fruitless(ends((10, 0), (10, 0), (11, 0))) == 0
    assert history.fruitless(ends((15, 10), (14, 13))) == 0, "a newer checkpoint"
    assert history.fruitless(ends((15, 10), (14, 13), (14, 13), (12, 11))) == 2


def test_what_is_appended_is_read_whatever_was_torn(tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert history.read(run) == []
    history.append(run, "submitted", job="7")
    with (run / history.FILE).open("a") as file:
        file.write('{"event": "start", "jo')  # a machine went down
    history.append(run, "start", start=1, job="8", nodes=["a"], step=0, saved=0)
    lines = history.read(run)
    assert [line["event"] for line in lines] == ["submitted", "start"]
    assert all(line["time"].endswith("+00:00") for line in lines)
    assert history.starts(lines) == 1 and history.job_of(lines) == "8" and history.unfinished(lines) == lines[1]
    history.append(run, "end", start=1, job="8", nodes=["a"], cause="stalled", step=3, saved=0, next="restart")
    assert history.unfinished(history.read(run)) is None


def test_how_far_a_run_is_is_read_from_its_files(tmp_path: Path) -> None:
    assert history.reached(tmp_path) == {"step": 0, "saved": 0}
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 31}) + "\n" + '{"step": 3')
    for name in ("step-000010", "step-000030", "step-000030.old", ".step-000040"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert history.reached(tmp_path) == {"step": 31, "saved": 30}
