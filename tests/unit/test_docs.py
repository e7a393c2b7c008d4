"""README.md and docs/ keep their word: commands, flags, keys and files that they name are there; every page is in the
navigation; drawings are what their script draws; the site builds, and asks no other machine for anything.

written_commands.py says how commands are read, and which comments say how far they are tried.
"""

import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml

from tests.unit.study.browser import browsing, chromium, sideways
from tests.unit.written_commands import LANGUAGES, NEEDS, ROOT, Checker, blocks, simple

DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("**/*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_are_known(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checker = Checker(tmp_path, page)
    monkeypatch.chdir(tmp_path)
    for block in blocks(page):
        written = page.name == "report.md"  # by moe-dist study report
        assert written or block.language in LANGUAGES, f"a block is {block.language!r}: {block.text[:60]}"
        kind, _, what = block.mark.partition(": ")
        assert kind in ("", "run", "long", "needs", "fails") or not block.commands(), block.mark
        assert kind != "needs" or what in NEEDS, block.mark
        for line in block.commands():
            try:
                for words in simple(line):
                    checker.check(words)
            except (AssertionError, ValueError) as reason:
                told = str(reason)
                if kind != "fails":
                    raise AssertionError(f"{line}\n{told}") from None
                assert f"moe-dist: {told}" in block.text, told
            else:
                assert kind != "fails", f"nothing is wrong with {line}"


@pytest.mark.parametrize(
    "command",
    [
        "moe-dist trian configs/tiny.yaml",
        "moe-dist train configs/no-such.yaml",
        "moe-dist train configs/tiny.yaml --model.moe.no-key 1",
        "moe-dist train configs/tiny.yaml --model.moe.top-k 100",
        "moe-dist verify --settings router=none",
        "launch/torchrun.sh 3 configs/tiny.yaml --parallel.ep 2",
        "torchrun --nproc_per_node 2 -m moe_dist.cli train configs/tiny.yaml --parallel.tp 4",
        "python benchmarks/no_such.py",
        "bash launch/gpu.sh && python benchmarks/train_step.py --no-such-flag",
        "no-such-program",
    ],
)
def test_a_command_that_cannot_work_is_found(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checker = Checker(tmp_path, ROOT / "README.md")
    monkeypatch.chdir(tmp_path)
    with pytest.raises((AssertionError, ValueError)):
        for words in simple(command):
            checker.check(words)


RUN = [page for page in PAGES if any(block.mark.startswith("run") for block in blocks(page))]


@pytest.mark.slow
@pytest.mark.timeout(1200)  # trains, on a machine that may have other work
@pytest.mark.parametrize("page", RUN, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_run(page: Path, tmp_path: Path) -> None:
    """In an empty folder beside what the repository has, one after the other; each must end as it should."""
    Checker(tmp_path, page)
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "moe-dist").write_text(f'#!/bin/sh\nexec {sys.executable} -m moe_dist.cli "$@"\n', encoding="utf-8")
    (programs / "moe-dist").chmod(0o755)
    environment = os.environ | {
        "PATH": f"{programs}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "MOE_DIST_PYTHON": sys.executable,
        "COLUMNS": "120",
    }
    for block in blocks(page):
        kind, _, code = block.mark.partition(": ")
        program = ["python", "-c"] if block.language == "python" else ["bash", "-c"]
        for text in [block.text] if block.language == "python" else block.commands():
            if kind == "run":
                done = subprocess.run([*program, text], cwd=tmp_path, env=environment, capture_output=True, text=True)
                assert done.returncode == int(code or 0), f"{text}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"


def test_every_page_is_in_the_navigation() -> None:
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    from_elsewhere = {"changelog.md", "contributing.md", "results.md"}  # docs/hooks/pages.py
    assert sorted(_leaves(nav)) == sorted({str(page.relative_to(DOCS)) for page in PAGES[1:]} | from_elsewhere)


def _leaves(nav: object) -> Iterator[str]:
    if isinstance(nav, str):
        yield nav
    for inner in nav.values() if isinstance(nav, dict) else nav if isinstance(nav, list) else ():
        yield from _leaves(inner)


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 200


def test_drawings_are_what_their_script_draws(tmp_path: Path) -> None:
    shutil.copytree(DOCS / "drawings", tmp_path / "drawings", ignore=shutil.ignore_patterns("*.svg", "__pycache__"))
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "drawings/draw.py"], cwd=tmp_path, env=environment, check=True, timeout=120)
    drawn = {path.name: path.read_bytes() for path in (tmp_path / "drawings").glob("*.svg")}
    assert drawn == {path.name: path.read_bytes() for path in (DOCS / "drawings").glob("*.svg")}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("mkdocs", reason="pip install -e '.[docs]'")
    pytest.importorskip("mkdocstrings", reason="pip install -e '.[docs]'")
    folder = tmp_path_factory.mktemp("site")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    built = subprocess.run(build, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return folder


@pytest.mark.slow
def test_the_site_builds_and_names_nothing_of_other_machines(site: Path) -> None:
    asked = re.compile(
        r'<(?:script|img|iframe|source)\b[^>]*\bsrc="(?:https?:)?//|<link\b(?![^>]*canonical)[^>]*href="(?:https?:)?//'
    )
    pages = sorted(site.glob("**/*.html"))
    assert len(pages) > len(PAGES)
    for page in pages:
        found = asked.search(page.read_text(encoding="utf-8"))
        assert found is None, f"{page.relative_to(site)}: {found[0]}"


@pytest.mark.slow
@pytest.mark.skipif(chromium() is None, reason="NO CHROMIUM: the site is not looked at in a browser")
def test_the_site_in_a_browser(site: Path, tmp_path: Path) -> None:
    """Wide and narrow, light and dark: nothing is asked of another machine, no script complains, nothing sticks out."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    home = f"http://127.0.0.1:{server.server_port}/"
    try:
        with browsing(tmp_path) as browser:
            for page in ("index", "tutorial", "concepts/capacity", "comparison", "reference/api/moe"):
                for width, scheme in ((1400, "light"), (390, "dark")):
                    browser.open(f"{home}{page}.html", width, scheme)
                    assert [url for url in browser.requests() if not url.startswith((home, "data:"))] == []
                    assert browser.complaints() == []
                    wide, window, *_ = sideways(browser)
                    assert wide <= window, f"{page} is {wide} wide in a window of {window}"
                    ink = browser.run("getComputedStyle(document.body).getPropertyValue('--md-default-bg-color')")
                    assert ("#fff" in ink) == (scheme == "light"), f"{page} does not follow {scheme}: {ink}"
    finally:
        server.shutdown()
        server.server_close()


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args: object) -> None:
        pass
