"""The page against other readers: an XML parser, html.parser, a Markdown parser, the csv module."""

import csv
import json
import re
import time
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
from markdown_it import MarkdownIt
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure as Drawing

from moe_dist.study.page import write
from moe_dist.study.page.html import html
from moe_dist.study.page.markdown import LONGEST, markdown
from moe_dist.study.page.model import Figure, Notice, Page, Prose, Section, Table
from moe_dist.study.page.text import csv_of, shown, sort_key, spans
from moe_dist.study.page.theme import DARK, HEAT, LIGHT, SERIES, standalone, style, svg_of
from moe_dist.study.page.write import write_page
from tests.unit.study.made_page import curve, points, whole_page

VOID = {"meta", "link", "br", "img", "input", "hr"}


class Reader(HTMLParser):
    """Tags with their attributes, and text by the tag that it stands in. Refuses tags that do not close in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if data.strip():
            self.texts.append((self.open[-1] if self.open else "", data.strip()))


@pytest.fixture(scope="module")
def page() -> Page:
    return whole_page()


@pytest.fixture(scope="module")
def read(page: Page) -> Reader:
    return Reader(html(page))


def table_page(rows, formats=None, columns=("a", "b")) -> Page:
    table = Table(name="t", title="T", columns=columns, rows=rows, formats=formats or {})
    return Page(title="p", lead=[], sections=[Section("s", [table])])


class TestHtml:
    def test_texts_are_shown_as_written(self, read):
        assert ("h1", "capacity-<b>cpu</b>") in read.texts
        assert ("h2", "Scaling & more") in read.texts
        assert ("strong", "1.0") in read.texts and ("code", "capacity_factor") in read.texts
        assert [tag for tag, _ in read.tags].count("script") == 1  # the page's own

    def test_one_file_names_nothing_elsewhere(self, read):
        for tag, attributes in read.tags:
            for name in ("src", "href", "xlink:href", "srcset", "action"):
                value = attributes.get(name)
                assert value is None or value.startswith(("#", "data:")), (tag, name, value)

    def test_no_name_is_used_twice_and_every_reference_meets_one(self, page, read):
        ids = [attributes["id"] for _, attributes in read.tags if attributes.get("id")]
        assert len(ids) == len(set(ids))
        for tag, attributes in read.tags:
            for name in ("href", "xlink:href", "aria-labelledby"):
                value = attributes.get(name) or ""
                if value.startswith("#") or name.startswith("aria"):
                    assert value.removeprefix("#") in ["", *ids], (tag, value)
        for used in re.findall(r"url\(#([^)]+)\)", html(page)):
            assert used in ids

    def test_violations_lead(self, read):
        levels = [
            attributes["class"].split()[1]
            for tag, attributes in read.tags
            if tag == "div" and (attributes.get("class") or "").startswith("notice")
        ]
        assert levels == ["violation", "good", "warning"]
        texts = [text for _, text in read.texts]
        assert texts.index("Two points were trained on other data.") < texts.index("12 of 12 points have finished.")

    def test_exploratory_sections_are_marked(self, read):
        sections = [attributes for tag, attributes in read.tags if tag == "section"]
        marked = [each["id"] for each in sections if each.get("class") == "exploratory"]
        assert marked == ["scaling-more"]
        assert [text for tag, text in read.texts if tag == "span"].count("exploratory") == 2  # contents and heading

    def test_links_hold_the_data(self, page, read):
        links = {each["download"]: each["href"] for tag, each in read.tags if tag == "a" and each.get("download")}
        assert list(links) == ["curve.csv", "points.csv", "other.csv", "setting.csv"]
        kind, _, text = links["points.csv"].partition(",")
        assert kind == "data:text/csv;charset=utf-8"
        assert unquote(text) == csv_of(points().columns, points().rows)

    def test_drawings_are_described(self, read):
        described = [each["aria-label"] for tag, each in read.tags if tag == "svg"]
        assert described == [
            "Curve of first. Falls with every step of curve.",
            "Curve of </svg><script>alert(1)</script> $x$. Falls with every step of curve.",
        ]

    def test_names_for_the_ear_are_without_marks(self, read):
        labels = [each["aria-label"] for _, each in read.tags if each.get("aria-label")]
        assert "data of Curve of first as CSV" in labels and "Curve of first: drawing" in labels

    def test_a_table_without_rows(self):
        read = Reader(html(table_page([])))
        assert [text for tag, text in read.texts if tag == "th"] == ["a", "b"]

    def test_cells_say_what_they_are_sorted_by(self):
        rows = [("x", 0.12345), ("y", None), ("z", float("nan")), ("w", float("inf"))]
        read = Reader(html(table_page(rows, {"b": ".1%"})))
        cells = [attributes for tag, attributes in read.tags if tag == "td"]
        assert [each.get("data-n") for each in cells] == ["0.12345", None, None, "Infinity"]  # as JavaScript reads it
        assert [text for tag, text in read.texts if tag == "td"] == ["12.3%", "–", "–", "inf"]
        assert all(each["class"] == "number" for each in cells)

    def test_a_format_that_does_not_fit_is_named(self):
        with pytest.raises(ValueError, match=r"^column 'b' cannot show 1.5 as ',d': .*"):
            html(table_page([("x", 1.5)], {"b": ",d"}))

    def test_twenty_figures_and_five_hundred_rows_take_seconds(self, tmp_path):
        figure = curve()
        figures = [
            Figure(name=f"f{i}", title="t", caption="c", svg=figure.svg, columns=("a",), rows=[(1,)]) for i in range(20)
        ]
        begin = time.process_time()
        write_page(Page(title="p", lead=[], sections=[Section("s", [points(), *figures])]), tmp_path)
        assert time.process_time() - begin < 5


class TestMarkdown:
    def test_says_what_the_page_says(self, page):
        tokens = MarkdownIt("commonmark").enable("table").parse(markdown(page))
        text = [token.content for token in tokens if token.type == "inline"]
        heads = [tokens[i + 1].children for i, token in enumerate(tokens) if token.type == "heading_open"]
        shown_heads = ["".join(child.content for child in children) for children in heads]
        assert shown_heads == [
            "capacity-<b>cpu</b>",
            "The question",
            "Curve of first",
            "Scaling & more (exploratory)",
            "Every point",
            "Curve of </svg><script>alert(1)</script> $x$",
            "The question",
            "Again",
            "Setting",
        ]
        assert text.index("Two points were trained on other data.") < text.index("12 of 12 points have finished.")
        assert not any(token.type.startswith("html") for token in tokens)
        assert not any(child.type == "html_inline" for token in tokens for child in token.children or [])

    @pytest.mark.parametrize(
        "words",
        [
            "a|b",
            "a_b_c",
            "_a_",
            "*a*",
            "<b>",
            "[a](b)",
            "1. a",
            "12) a",
            "# a",
            "- a",
            "---",
            "===",
            "2 - 1",
            "a\\|b",
            "~~a~~",
            "&amp; <",
            "`a",
        ],
    )
    def test_cells_and_paragraphs_keep_every_character(self, words):
        page = Page(title="p", lead=[Prose([words])], sections=[*table_page([(words, 1)]).sections])
        tokens = MarkdownIt("gfm-like", {"linkify": False}).parse(markdown(page))
        paragraph = tokens[4]
        assert "".join(child.content for child in paragraph.children) == words
        assert {child.type for child in paragraph.children} <= {"text", "text_special"}
        cell = tokens[next(i for i, token in enumerate(tokens) if token.type == "td_open") + 1]
        assert "".join(child.content for child in cell.children) == words

    def test_code_with_a_bar_stays_one_cell(self):
        tokens = MarkdownIt("commonmark").enable("table").parse(markdown(table_page([("`a|b`", 1)])))
        assert [t.content for t in tokens if t.type == "inline"][-3:-1] == ["`a|b`", "1"]

    def test_long_tables_are_cut_with_a_pointer(self, page):
        text = markdown(page)
        assert text.count("\n| num_experts=") == LONGEST
        assert f"{500 - LONGEST} more rows are in [data/points.csv](data/points.csv)." in text


class TestTheme:
    def test_every_colour_of_the_theme_is_a_variable(self):
        svg = curve().svg
        assert not re.findall(r"#[0-9a-f]{6}\b", re.sub(r'(href="#|url\(#)[^")]+', "", svg))
        used = set(re.findall(r"var\(--([a-z0-9-]+)\)", svg))
        assert used <= set(LIGHT) and set(LIGHT) == set(DARK)
        assert {f"series-{number}" for number in range(len(SERIES))} | {"ink", "heat-0", "heat-31"} <= used
        assert len(set(LIGHT.values())) == len(LIGHT)  # else one colour would stand for two variables

    def test_black_and_unsaid_colours_are_ink(self):
        with style():
            drawing = Drawing(figsize=(2, 2))
            drawing.subplots().text(0.5, 0.5, "word", color="black")
            svg = svg_of(drawing)
        assert svg.split(">")[0].count("fill: var(--ink)") == 1
        assert "#000000" not in svg

    def test_nothing_of_a_figure_applies_beyond_it(self):
        svg = curve().svg
        assert "<style" not in svg and "<metadata" not in svg and "<!--" not in svg

    def test_texts_keep_all_their_digits_and_letters(self):
        said = ["0.00015", "1.5575", "#0072b2", "a; font-family: b"]
        with style():
            drawing = Drawing(figsize=(4, 3))
            axes = drawing.subplots()
            axes.plot(range(4), [1.5570, 1.5575, 1.5580, 1.5585])
            axes.set_xticks(range(4), said)
            axes.set_yticks([1.5575])
            svg = svg_of(drawing)
        texts = [each.text for each in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]
        assert texts == [*said, "1.5575"]

    def test_same_figure_same_bytes(self):
        assert curve().svg == curve().svg
        with style():
            drawing = Drawing(figsize=(4, 3))
            axes = drawing.subplots()
            drawing.colorbar(axes.pcolormesh([[1.0, 2.0]]), ax=axes)
            assert svg_of(drawing) == svg_of(drawing)

    def test_file_is_svg_with_fixed_colours_on_paper(self):
        root = ElementTree.fromstring(standalone(curve(label="a < b $ c").svg))
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        assert root[0].tag.endswith("rect") and "#ffffff" in root[0].get("style")
        assert "var(" not in ElementTree.tostring(root, encoding="unicode")
        assert "a < b $ c" in "".join(root.itertext())

    @pytest.mark.parametrize("colours", [LIGHT, DARK], ids=["light", "dark"])
    def test_text_and_lines_stand_out(self, colours):
        for name in ("ink", "faint", "violation-ink", "warning-ink", "good-ink", "series-0"):
            assert contrast(colours[name], colours["paper"]) >= 4.5, name
            assert contrast(colours[name], colours["shade"]) >= 4.5, name
        for number in range(len(SERIES)):
            assert contrast(colours[f"series-{number}"], colours["paper"]) >= 3, number

    def test_more_is_farther_from_the_paper(self):
        for colours in (LIGHT, DARK):
            far = [contrast(colours[f"heat-{level}"], colours["paper"]) for level in range(HEAT.N)]
            assert np.all(np.diff(far) > 0) and far[-1] > 10


def contrast(one: str, other: str) -> float:
    """WCAG 2.2's contrast ratio."""

    def luminance(colour: str) -> float:
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted([luminance(one), luminance(other)])
    return (high + 0.05) / (low + 0.05)


class TestWritePage:
    def test_files_and_their_data(self, page, tmp_path):
        written = [path.relative_to(tmp_path).as_posix() for path in write_page(page, tmp_path)]
        assert written[:2] == ["report.html", "report.md"]
        on_disk = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
        assert on_disk == {*written, "report.json"}
        with (tmp_path / "data/points.csv").open(newline="") as file:
            head, *rows = csv.reader(file)
        assert tuple(head) == points().columns
        for read_row, row in zip(rows, points().rows, strict=True):
            assert read_row == ["" if value is None else str(value) for value in row]
        for name in re.findall(r"\]\(((?:figures|data)/[^)]+)\)", (tmp_path / "report.md").read_text()):
            assert name in on_disk

    def test_same_page_same_bytes(self, page, tmp_path):
        for folder in ("a", "b"):
            write_page(page, tmp_path / folder)
        for path in (tmp_path / "a").rglob("*.*"):
            assert path.read_bytes() == (tmp_path / "b" / path.relative_to(tmp_path / "a")).read_bytes()

    def test_removes_what_an_earlier_report_made_and_nothing_else(self, page, tmp_path):
        write_page(page, tmp_path)
        (tmp_path / "data/mine.csv").write_text("mine")
        (tmp_path / "figures/notes.svg").write_text("mine")
        write_page(table_page([("x", 1)]), tmp_path)
        left = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
        assert left == {"report.html", "report.md", "report.json", "data/t.csv", "data/mine.csv", "figures/notes.svg"}

    def test_removes_an_empty_folder(self, page, tmp_path):
        write_page(page, tmp_path)
        write_page(table_page([("x", 1)]), tmp_path)
        assert not (tmp_path / "figures").exists()

    @pytest.mark.parametrize(
        "text", ['{"files": ["../kept", "data/../kept", "kept"]}', "[]", "no JSON", '{"files": 3}']
    )
    def test_a_list_that_somebody_wrote_removes_nothing_of_others(self, tmp_path, text):
        folder = tmp_path / "report"
        folder.mkdir()
        for kept in (tmp_path / "kept", folder / "kept"):
            kept.write_text("mine")
        (folder / "report.json").write_text(text)
        write_page(table_page([("x", 1)]), folder)
        assert (tmp_path / "kept").exists() and (folder / "kept").exists()

    def test_stopped_half_way_the_old_page_stays_and_nothing_is_left_for_ever(self, page, tmp_path, monkeypatch):
        write_page(page, tmp_path)
        before = (tmp_path / "report.html").read_bytes()
        real = write.replace_text

        def full(path: Path, text: str) -> None:
            if path.suffix == ".html":
                raise OSError("disk full")
            real(path, text)

        monkeypatch.setattr(write, "replace_text", full)
        with pytest.raises(OSError, match="disk full"):
            write_page(table_page([("x", 1)]), tmp_path)
        assert (tmp_path / "report.html").read_bytes() == before
        monkeypatch.setattr(write, "replace_text", real)
        write_page(Page(title="p", lead=[], sections=[]), tmp_path)
        assert {path.name for path in tmp_path.rglob("*")} == {"report.html", "report.md", "report.json"}
        assert len(json.loads((tmp_path / "report.json").read_text())["files"]) == 2

    def test_nothing_is_written_of_a_page_that_cannot_be_shown(self, tmp_path):
        with pytest.raises(ValueError, match="column 'b'"):
            write_page(table_page([("x", 1.5)], {"b": ",d"}), tmp_path / "new")
        assert not (tmp_path / "new").exists()


class TestModel:
    def test_refuses(self):
        with pytest.raises(ValueError, match=r"^'../a' names no file"):
            Table(name="../a", title="", columns=(), rows=())
        with pytest.raises(ValueError, match=r"^t: row 1 has 1 values for 2 columns$"):
            Table(name="t", title="", columns=("a", "b"), rows=[(1, 2), (1,)])
        with pytest.raises(ValueError, match=r"^table t has formats for \['c'\]; its columns are \['a'\]$"):
            Table(name="t", title="", columns=("a",), rows=[], formats={"c": ".1f"})
        table = Table(name="t", title="", columns=("a",), rows=[])
        with pytest.raises(ValueError, match=r"share the names \['t'\]"):
            Page(title="", lead=[Notice("good", [])], sections=[Section("", [table])], setting=table)


class TestText:
    def test_marks(self):
        assert spans("a `b **c**` **d** 2 ** 3 `") == [
            ("plain", "a "),
            ("code", "b **c**"),
            ("plain", " "),
            ("bold", "d"),
            ("plain", " 2 ** 3 `"),
        ]

    @pytest.mark.parametrize(
        ("value", "key"),
        [
            (3, 3.0),
            (0.5, 0.5),
            ("12", 12.0),
            ("-1,250.5 ± 3 ms", -1250.5),
            ("+0.02 ± 0.01", 0.02),
            ("31 %", 31.0),
            ("1.5e-3", 0.0015),
            ("2.13.0", None),
            ("8 experts of 4", None),
            ("dropless", None),
            ("", None),
            (None, None),
            (float("nan"), None),
            (float("inf"), float("inf")),
        ],
    )
    def test_sort_key(self, value, key):
        assert sort_key(value) == key

    def test_shown(self):
        assert [shown(float("inf"), ",d"), shown(7, ".2f"), shown(-0.00012345), shown(True)] == [
            "inf",
            "7.00",
            "-0.0001234",
            "True",
        ]
