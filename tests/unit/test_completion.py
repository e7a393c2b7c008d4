"""`moe-dist completion`: real shells complete with its scripts. zsh and fish are asked where they are installed."""

import os
import pty
import re
import select
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from moe_dist.cli import COMMANDS, main
from moe_dist.config.model import MoEConfig

DRIVER = """
source {script}
function=$(complete -p moe-dist | sed 's/.*-F \\([^ ]*\\) .*/\\1/')
for line in "$@"; do
  read -ra COMP_WORDS <<<"$line"
  [[ "$line" == *" " ]] && COMP_WORDS+=("")
  COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1)) COMPREPLY=()
  $function
  echo "${{COMPREPLY[@]}}"
done
"""


def script_of(shell: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    assert main(["completion", shell]) == 0
    path = folder / f"moe-dist.{shell}"
    path.write_text(capsys.readouterr().out, encoding="utf-8")
    return path


def test_bash_completes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.yaml").touch()
    (tmp_path / "texts").mkdir()
    routers = " ".join(MoEConfig.__annotations__["router"].__args__)
    asked = {
        "moe-dist ": " ".join(COMMANDS),
        "moe-dist tra": "train",
        "moe-dist train mi": "mine.yaml",
        "moe-dist train mine.yaml --model.moe.top": "--model.moe.top-k --model.moe.top-k-groups",
        "moe-dist train mine.yaml --model.moe.router ": routers,
        "moe-dist submit mine.yaml --nodes 2 --parallel.seq": "--parallel.sequence-parallel",
        "moe-dist plan mine.yaml --ranks 8 --dry": "--dry-run",
        "moe-dist data tok": "tokenizer",
        "moe-dist data tokenizer train te": "texts",
        "moe-dist data prepare texts --to": "--tokenizer",
        "moe-dist checkpoint convert --dtype b": "bf16",
        "moe-dist study report --ch": "--check",
        "moe-dist config mine.yaml model.moe.top": "model.moe.top_k model.moe.top_k_groups",
        "moe-dist generate --device ": "cpu cuda",
        "moe-dist no-command --": "",
    }
    driver = tmp_path / "driver"
    driver.write_text(DRIVER.format(script=script_of("bash", tmp_path, capsys)), encoding="utf-8")
    done = subprocess.run(
        ["bash", "--norc", driver, *asked], cwd=tmp_path, capture_output=True, text=True, timeout=200, check=True
    )
    assert done.stderr == ""
    told = dict(zip(asked, done.stdout.splitlines(), strict=True))
    told["moe-dist no-command --"] = ""  # of no command there is nothing to expect, and nothing to fail
    assert told == asked


def test_a_press_of_tab_completes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A terminal, bash and readline as somebody has them."""
    rc = script_of("bash", tmp_path, capsys)
    shell, terminal = pty.fork()
    if not shell:
        os.environ.update(TERM="dumb", PS1="$ ", INPUTRC="/dev/null")
        os.execlp("bash", "bash", "--noprofile", "--rcfile", str(rc), "-i")
    shown, end = b"", time.monotonic() + 200
    os.write(terminal, b"moe-dist gener\t--temp\t")
    while b"moe-dist generate --temperature" not in shown and time.monotonic() < end:
        if select.select([terminal], [], [], 1)[0]:
            shown += os.read(terminal, 4096)
    os.write(terminal, b"\x15exit\n")
    os.close(terminal)
    os.waitpid(shell, 0)
    assert b"moe-dist generate --temperature" in shown


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_read_their_scripts(shell: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = script_of(shell, tmp_path, capsys)
    text = script.read_text(encoding="utf-8")
    assert all(re.search(rf"\b{name}\b", text) for name in COMMANDS)
    assert "model.moe.top-k" in text and "expert_choice" in text
    if shutil.which(shell) is None:
        pytest.skip(f"no {shell} here; its script was made")
    subprocess.run([shell, "-n", script], check=True, timeout=60)
    if shell == "fish":
        asked = f"source {script}; complete -C 'moe-dist train x.yaml --model.moe.top'"
        told = subprocess.run(["fish", "-c", asked], capture_output=True, text=True, timeout=60, check=True).stdout
        assert [line.split("\t")[0] for line in told.splitlines()] == ["--model.moe.top-k", "--model.moe.top-k-groups"]


def test_a_shell_that_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "dos"]) == 2
    assert "'dos'" in capsys.readouterr().err
