"""The page in headless Chromium, over a local server that notes what is asked of it."""

import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from moe_dist.study.page.text import sort_key
from moe_dist.study.page.theme import DARK, LIGHT
from moe_dist.study.page.write import write_page
from tests.unit.study.browser import NAMES, Browser, browsing, chromium, sideways
from tests.unit.study.made_page import points, whole_page

pytestmark = pytest.mark.skipif(chromium() is None, reason=f"no Chromium on the PATH (none of {', '.join(NAMES)})")


class Noting(SimpleHTTPRequestHandler):
    asked: list[str]

    def do_GET(self) -> None:
        self.asked.append(self.path)
        super().do_GET()

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def served(tmp_path_factory) -> Iterator[tuple[str, Path, list[str]]]:
    folder = tmp_path_factory.mktemp("page")
    write_page(whole_page(), folder)
    asked: list[str] = []
    handler = type("Handler", (Noting,), {"asked": asked})
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}", folder, asked
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> Iterator[Browser]:
    with browsing(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


def column(browser: Browser, place: int) -> list[str]:
    return browser.run(f"[...document.querySelectorAll('#points tbody tr')].map(row => row.cells[{place}].textContent)")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1400])
def test_shows_without_a_word_a_request_or_a_scroll(served, browser, width, scheme):
    address, _, asked = served
    asked.clear()
    browser.open(f"{address}/report.html", width, scheme)
    assert browser.complaints() == []
    assert [url for url in browser.requests() if not url.startswith("data:")] == [f"{address}/report.html"]
    assert asked == ["/report.html"]  # no icon either
    page_width, window_width, outside = sideways(browser)
    assert page_width <= window_width <= width and outside == []
    colours = DARK if scheme == "dark" else LIGHT
    red, green, blue = (int(colours["paper"][at : at + 2], 16) for at in (1, 3, 5))
    assert browser.run("getComputedStyle(document.body).backgroundColor") == f"rgb({red}, {green}, {blue})"
    stroke = browser.run("getComputedStyle(document.querySelector('#curve path[style*=\"--series-1\"]')).stroke")
    red, green, blue = (int(colours["series-1"][at : at + 2], 16) for at in (1, 3, 5))
    assert stroke == f"rgb({red}, {green}, {blue})"


def test_would_notice(served, browser):
    """That the checks above can fail."""
    address, folder, asked = served
    asked.clear()
    text = "<body style='width: 3000px'><img src='picture.png'><div>x</div><script>nothing.here</script>"
    (folder / "bad.html").write_text(text)
    browser.open(f"{address}/bad.html", 390)
    assert "/picture.png" in asked and f"{address}/picture.png" in browser.requests()
    assert any("nothing is not defined" in each for each in browser.complaints())
    page_width, window_width, outside = sideways(browser)
    assert page_width > window_width and outside


def test_wide_things_scroll_in_their_own_box(served, browser):
    browser.open(f"{served[0]}/report.html", 390)
    for box in ("#points .box", "#curve .box", "#again pre"):
        assert browser.run(f"(box => box.scrollWidth > box.clientWidth)(document.querySelector('{box}'))"), box
    browser.run("document.querySelector('#points .box').scrollLeft = 300")
    left = browser.run("document.querySelector('#points tbody th').getBoundingClientRect().left")
    assert 0 <= left < 60  # the row's name stays


def test_sorts_by_click(served, browser):
    browser.open(f"{served[0]}/report.html", 1400)
    before = column(browser, 0)
    press = "document.querySelectorAll('#points th button')[{}].click()"
    state = "document.querySelectorAll('#points thead th')[{}].getAttribute('aria-sort')"
    for place in (1, 2, 3, 6):
        rows = [row for row in points().rows if row[place] is not None]
        empty = ["–"] * (500 - len(rows))
        ascending = [sort_key(row[place]) for row in sorted(rows, key=lambda row: sort_key(row[place]))]
        browser.run(press.format(place))
        assert browser.run(state.format(place)) == "ascending"
        texts = column(browser, place)
        assert [number(text) for text in texts[: len(rows)]] == pytest.approx(ascending, abs=1e-3)
        assert texts[len(rows) :] == empty
        browser.run(press.format(place))
        assert browser.run(state.format(place)) == "descending"
        texts = column(browser, place)
        assert [number(text) for text in texts[: len(rows)]] == pytest.approx(ascending[::-1], abs=1e-3)
        assert texts[len(rows) :] == empty
    browser.run(press.format(6))
    assert browser.run(state.format(6)) is None
    assert column(browser, 0) == before  # the third press restores
    browser.run(press.format(4))
    assert list(dict.fromkeys(column(browser, 4))) == ["failed", "finished", "item 9", "item 10"]
    sorted_heads = browser.run("document.querySelectorAll('#points [aria-sort]').length")
    assert sorted_heads == 1
    assert browser.complaints() == []


def number(text: str) -> float:
    first = text.split()[0].replace(",", "")
    return float(first.removesuffix("%")) / (100 if first.endswith("%") else 1)


def test_sorts_by_key(served, browser):
    browser.open(f"{served[0]}/report.html", 1400)
    browser.run("document.querySelector('#points .box').focus()")
    for _ in range(2):
        browser.press("Tab", 9)
    assert browser.run("document.activeElement.textContent") == "order"
    browser.press("Enter", 13)
    assert [int(text) for text in column(browser, 1)] == sorted(row[1] for row in points().rows)
    browser.press(" ", 32)
    assert browser.run("document.activeElement.parentElement.getAttribute('aria-sort')") == "descending"


def test_data_can_be_taken(served, browser, tmp_path):
    _, folder, _ = served
    browser.open(f"{served[0]}/report.html", 1400)
    browser("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path), eventsEnabled=True)
    browser.run("document.querySelector('#points a[download]').click()")
    browser.wait(lambda event: event.get("params", {}).get("state") == "completed")
    assert (tmp_path / "points.csv").read_bytes() == (folder / "data/points.csv").read_bytes()
    assert browser.complaints() == []


def test_svg_files_show(served, browser):
    browser.open(f"{served[0]}/figures/curve.svg", 1400)
    assert browser.complaints() == []
    assert browser.run("document.documentElement.getBBox().width") > 100


def test_prints_light_and_whole(served, browser, tmp_path):
    browser.open(f"{served[0]}/report.html", 1400, "dark")
    browser("Emulation.setEmulatedMedia", media="print", features=[{"name": "prefers-color-scheme", "value": "dark"}])
    assert browser.run("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert browser.run("(box => box.scrollHeight - box.clientHeight)(document.querySelector('#points .box'))") == 0
    assert browser("Page.printToPDF")["data"]
    browser("Emulation.setEmulatedMedia", media="")
