"""moe-dist submit, cancel and status, with commands of Slurm that pretend."""

import json
import os
import shlex
from pathlib import Path

import pytest

from moe_dist.cli import main
from moe_dist.cluster import history
from moe_dist.disk import locked
from moe_dist.train.record.status import LOCK, write_status
from tests.unit.cluster.pretended import ROOT, Slurm

SCRIPT = str(ROOT / "slurm/train.sbatch")
HOSTILE = [
    "$(touch canary)",
    "`touch canary`",
    "a;touch canary",
    "-x",
    "--wrap=touch canary",
    "a b|touch canary",
    "'\"\\",
]


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Slurm:
    slurm = Slurm(tmp_path / "tools", tmp_path / "runs/mine")
    monkeypatch.setattr(os, "environ", slurm.environ(MOE_DIST_ROOT=str(ROOT)))
    return slurm


def config(slurm: Slurm, name: str = "config.yaml", **sections: object) -> str:
    path = slurm.run.parents[1] / name
    path.write_text(json.dumps({"run": {"root": str(slurm.run.parent), "name": "mine"}} | sections))
    return str(path)


def handed_in(slurm: Slurm) -> list[str]:
    (call,) = slurm.calls("sbatch")
    return call


def refused(*args: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert main(list(args)) == 2
    return capsys.readouterr().err


def test_a_configuration_is_handed_in_with_everything_as_arguments(
    slurm: Slurm, capsys: pytest.CaptureFixture[str]
) -> None:
    path = config(slurm)
    options = ("--nodes", "2", "--gpus-per-node=4", "--spare-nodes", "1", "--time", "4:00:00", "--partition=big")
    flags = ("--parallel.ep", "8", "--train.steps", "40", "--device", "cuda")
    assert main(["submit", path, *options, *flags, "--", "--mem=0", "--exclusive"]) == 0
    assert handed_in(slurm) == [
        "--job-name=mine",
        f"--comment={slurm.run}",
        f"--output={slurm.run}/slurm/%j.out",
        "--time=4:00:00",
        "--partition=big",
        "--mem=0",
        "--exclusive",
        "--nodes=3",
        "--ntasks-per-node=1",
        "--gpus-per-node=4",
        "--no-kill",
        "--parsable",
        SCRIPT,
        "--ranks-per-node=4",
        "--spare-nodes=1",
        path,
        *flags[:4],
        "--device=cuda",
    ]
    said = capsys.readouterr().out
    assert "job 41: mine on 2 nodes x 4 ranks and 1 spare" in said and f"moe-dist cancel {slurm.run}" in said
    assert [(line["event"], line["job"]) for line in history.read(slurm.run)] == [("submitted", "41")]
    assert (slurm.run / "slurm").is_dir()


def test_a_run_is_handed_in_once(slurm: Slurm, capsys: pytest.CaptureFixture[str]) -> None:
    path = config(slurm)
    assert main(["submit", path, "--nodes", "2"]) == 0
    slurm.say(queue="41 41 41 PENDING\n")
    assert "is in job 41 already (PENDING)" in refused("submit", path, "--nodes", "2", capsys=capsys)
    slurm.say(queue="")
    assert main(["submit", path, "--nodes", "2"]) == 0 and len(slurm.calls("sbatch")) == 2
    write_status(slurm.run, "finished", step=1000)
    capsys.readouterr()
    assert main(["submit", path, "--nodes", "2"]) == 0 and len(slurm.calls("sbatch")) == 2
    assert "has finished its 1000 steps already" in capsys.readouterr().out


def test_print_hands_in_nothing_and_shows_what_a_shell_takes_as_it_stands(
    slurm: Slurm, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = config(slurm, "a b;$(touch canary).yaml")
    assert main(["submit", path, "--nodes", "2", "--print", "--account", "x y"]) == 0
    words = shlex.split(capsys.readouterr().out)
    assert words[0] == "sbatch" and path in words and "--account=x y" in words
    assert slurm.calls("sbatch") == [] and not slurm.run.exists()
    monkeypatch.setitem(os.environ, "PATH", str(slurm.run))
    assert main(["submit", path, "--nodes", "2", "--print"]) == 0, "no Slurm is needed to see it"
    said = refused("submit", path, "--nodes", "2", capsys=capsys)
    assert "no sbatch on the PATH: submit where Slurm is, or: launch/torchrun.sh 1" in said


@pytest.mark.parametrize("value", HOSTILE)
def test_hostile_values_are_inert(slurm: Slurm, value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is one word of sbatch's, behind an = or the script's name."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / value.replace("/", "_").replace("\\", "_")
    path = config(slurm, "-c" + value.replace("/", "_"), run={"root": str(folder / "100%j"), "name": "mine"})
    site = tmp_path / "site" / value
    site.parent.mkdir()
    site.touch()
    options = [f"--{name}={value}" for name in ("time", "partition", "account", "qos", "reservation", "exclude")]
    flags = ["--data.kind=text", f"--data.paths={value}"]
    assert main(["submit", path, "--nodes=2", *options, f"--site={site}", *flags, "--", f"--comment={value}"]) == 0
    call = handed_in(slurm)
    at = call.index(SCRIPT)
    assert all(word.startswith("--") for word in call[:at])
    assert {*options, f"--comment={value}"} <= set(call[:at]) and call[at + 3] == path
    assert f"--output={folder}/100%%j/mine/slurm/%j.out" in call and call[-1] == f"--data.paths={value}"
    assert not list(tmp_path.rglob("canary")) and not (ROOT / "canary").exists()


@pytest.mark.parametrize("value", ["a\nb", "x\rtouch canary", "\x1b[2J", "a\u2028b", "a\0"])
def test_control_characters_are_refused(slurm: Slurm, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = config(slurm, data={"kind": "text", "paths": ["x"]})
    for option in (f"--partition={value}", f"--run.root={value}", f"--data.paths={value}"):
        said = refused("submit", path, "--nodes=2", option, capsys=capsys)
        assert "holds a control character" in said and said.count("\n") == 1
    assert "holds a control" in refused("submit", path, "--nodes=2", "--", f"--mem={value}", capsys=capsys)
    assert slurm.calls("sbatch") == []


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ((), "--nodes is missing"),
        (("--nodes", "0"), "--nodes 0 is below 1"),
        (("--nodes", "2", "--spare-nodes", "-1"), "--spare-nodes -1 is below 0"),
        (("--nodes", "2", "--ranks-per-node", "0"), "--ranks-per-node 0 is below 1"),
        (("--nodes", "x"), "argument --nodes: invalid int value: 'x'"),
        (("--nodes", "3", "--parallel.ep", "2"), "ep=2"),
        (("--nodes", "2", "--run.name", "a b;touch"), "is not a simple file name"),
        (("--nodes", "2", "--run.name=-x"), "is not a simple file name"),
        (("--nodes", "2", "--resume"), "--resume: unknown flag"),
        (("--nodes", "2", "--array", "0-9"), "write 0-9%1"),
        (("--nodes", "2", "--array", "0-9%4"), "write 0-9%1"),
        (("--nodes", "2", "--site", "/no/such"), "--site /no/such is no file"),
        (("--nodes", "2", "--", "evil.sh"), "'evil.sh' behind --: write options of sbatch as --NAME=VALUE"),
        (("--nodes", "2", "--", "--mem", "4G"), "'4G' behind --"),
        (("--nodes", "2", "--", "-N", "4"), "'-N' behind --"),
        (("--nodes", "2", "--", "--", "x"), "'--' behind --"),
        (("--nodes", "2", "--", "--wrap=touch canary"), "moe-dist submit sets it itself"),
        (("--nodes", "2", "--", "--nodes=4"), "moe-dist submit sets it itself"),
        (("--nodes", "2", "--", "--array=0-3"), "write it before, where it is checked"),
        (("--nodes", "2", "--", "--arr=0-3"), "write it before, where it is checked"),
        (("--nodes", "2", "--", "--array", "--mem=0"), "write it before, where it is checked"),
        (("--nodes", "2", "--", "--wra=touch canary"), "moe-dist submit sets it itself"),
        (("--nodes", "2", "--", "--node=4"), "moe-dist submit sets it itself"),
    ],
)
def test_what_makes_no_sense_is_refused(
    slurm: Slurm, args: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert said in refused("submit", config(slurm), *args, capsys=capsys)
    assert slurm.calls("sbatch") == [] and not slurm.run.exists()


def test_what_does_not_fit_is_refused_where_the_hardware_is_known(
    slurm: Slurm, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of 8 GPUs without ZeRO: 12 layers of 8 experts of 3 * 4096 * 14336, 16 bytes an element, 2.4e11 bytes."""
    sizes = {"d_model": 4096, "num_layers": 12, "num_heads": 32, "d_ff": 14336}
    path = config(slurm, model=sizes | {"moe": {"num_experts": 8}}, train={"global_batch": 64, "micro_batch": 1})
    given = ("submit", path, "--nodes=1", "--gpus-per-node=8")
    said = refused(*given, "--hardware=h100", capsys=capsys)
    assert "a rank is planned to take 2" in said and "more than the 70.8 GiB of NVIDIA H100 SXM 80 GB: " in said
    assert "; raise parallel.ep to 2" in said and said.count("\n") == 1
    assert "is planned" in refused(*given, "--hardware=h100", "--print", capsys=capsys)
    assert "'moon' is none of " in refused(*given, "--hardware=moon", capsys=capsys)
    assert slurm.calls("sbatch") == [] and not slurm.run.exists()
    assert main([*given, "--hardware=h100", "--parallel.ep=8", "--engine.precision=bf16"]) == 0
    assert "of the 70.8 GiB of NVIDIA H100" in capsys.readouterr().out
    assert not any("hardware" in word for word in handed_in(slurm))


def test_without_hardware_nothing_is_refused_and_the_plan_is_told(
    slurm: Slurm, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["submit", config(slurm), "--nodes=2"]) == 0
    assert "\n  a rank is planned to take " in capsys.readouterr().out


def test_jobs_one_after_the_other(slurm: Slurm) -> None:
    assert main(["submit", config(slurm), "--nodes", "2", "--array", "0-9%1"]) == 0
    assert "--array=0-9%1" in handed_in(slurm) and f"--output={slurm.run}/slurm/%A_%a.out" in handed_in(slurm)


def test_a_folder_that_sbatch_would_not_find_is_refused(slurm: Slurm, capsys: pytest.CaptureFixture[str]) -> None:
    """Slurm takes a backslash out of --output, and then leaves %j as it stands."""
    said = refused("submit", config(slurm), "--nodes=2", f"--run.root={slurm.run}/a\\b", capsys=capsys)
    assert "a\\b/mine holds a backslash" in said and slurm.calls("sbatch") == []


@pytest.mark.parametrize("said", ["", "Usage: sbatch [OPTIONS(0)...]\n", "slurm-wlm 22.05.8\n"])
def test_what_names_no_job_has_handed_in_none(slurm: Slurm, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    slurm.say(job=said)
    told = refused("submit", config(slurm), "--nodes=2", "--", "--test-only", capsys=capsys)
    assert f"names no job but says {said.strip() or 'nothing'}" in told and history.read(slurm.run) == []


def test_slurm_may_refuse(slurm: Slurm, capsys: pytest.CaptureFixture[str]) -> None:
    (slurm.tools / "sbatch").write_text("#!/bin/sh\necho 'sbatch: error: invalid partition' >&2; exit 1\n")
    assert "failed: sbatch: error: invalid partition" in refused("submit", config(slurm), "--nodes=2", capsys=capsys)
    assert history.read(slurm.run) == []


def test_a_cancelled_job_saves_first_and_does_not_come_back(slurm: Slurm, capsys: pytest.CaptureFixture[str]) -> None:
    history.append(slurm.run, "submitted", job="41")
    slurm.say(queue="41 41 41 RUNNING\n")
    (slurm.tools / "scancel").write_text((slurm.tools / "scancel").read_text() + ': >"$tools/queue"\n')
    assert main(["cancel", str(slurm.run)]) == 0
    assert [line["event"] for line in history.read(slurm.run)] == ["submitted", "cancel"]
    assert slurm.calls("scancel") == [["--signal=USR2", "41"]]
    assert "job 41 has ended" in capsys.readouterr().out
    assert "job 41 neither waits nor runs" in refused("cancel", "41", capsys=capsys)


def test_a_job_that_does_not_end_or_has_not_begun_is_cancelled(
    slurm: Slurm, capsys: pytest.CaptureFixture[str]
) -> None:
    slurm.say(queue="41 41 41_3 RUNNING\n")
    assert main(["cancel", "41_3", "--seconds", "0"]) == 0
    assert slurm.calls("scontrol") == [["update", "JobId=41_3", "Requeue=0"]], "nothing says which run it has"
    slurm.say(queue="42 42 42 PENDING\n")
    assert main(["cancel", "42"]) == 0
    assert slurm.calls("scancel") == [["--signal=USR2", "41_3"], ["41_3"], ["42"]]
    for what in ("-x", "no/such", "41; touch canary"):
        assert main(["cancel", what]) == 2
    assert len(slurm.calls("scancel")) == 3


def test_all_runs_are_listed(slurm: Slurm, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = slurm.run.parent
    for name, steps in (("mine", 40), ("deep/other", 10)):
        (root / name / "checkpoints/step-000005").mkdir(parents=True)
        (root / name / "config.yaml").write_text(f"train: {{steps: {steps}}}\n")
    records = [
        {"step": step, "loss": 2.0 + step, "step_seconds": 3.0, "kept_seconds": 3.0 * step} for step in range(1, 11)
    ]
    (root / "mine/metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    lines = [
        {"time": f"2026-01-01T{time}+00:00", "event": event, "job": "41", "next": "requeue"}
        for time, event in (("00:00:00", "start"), ("00:00:30", "end"), ("09:00:00", "start"), ("09:00:10", "end"))
    ]
    (root / "mine/history.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_status(root / "mine", "running")
    write_status(root / "deep/other", "finished", step=10)
    history.append(root / "waits", "submitted", job="42")
    slurm.say(queue="41 41 41 RUNNING\n42 42 42 PENDING\n")
    with locked(root / "mine" / LOCK):
        assert main(["status", str(root)]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert rows[0] == "run state step loss left restarts ETTR job".split()
    assert rows[1:] == [
        "deep/other finished 10/10".split(),
        "mine running 10/40 12.0000 1m30s 1 75.0% 41 RUNNING".split(),
        "waits none 0/? 42 PENDING".split(),
    ]
