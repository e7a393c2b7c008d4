"""The report of a study: its ledger and measurements as a page (page/), answer first.

| part          | is made in                                             |
|---------------|--------------------------------------------------------|
| the answer    | answer.py, of the comparisons of matches.py            |
| the checks    | checks.py                                              |
| figures       | figures/, of numbers that sections.py gathers          |
| tables        | tables.py                                              |
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moe_dist.study.design.grid import Study
from moe_dist.study.design.study_file import Question
from moe_dist.study.ledger.cells import Cell, cells
from moe_dist.study.ledger.ledger import Ledger
from moe_dist.study.page.model import Notice, Page, Part, Prose, Section, Table
from moe_dist.study.page.write import write_page
from moe_dist.study.report.answer import HOW, Answer, answer
from moe_dist.study.report.checks import CHECKS, check
from moe_dist.study.report.finding import Finding
from moe_dist.study.report.matches import compared
from moe_dist.study.report.metric import title
from moe_dist.study.report.overall import overall_table
from moe_dist.study.report.sections import compute_sections, dispatch_section, pareto_section, run_section
from moe_dist.study.report.tables import (
    advice_table,
    checks_table,
    comparisons_tables,
    costs_table,
    failed_table,
    results_table,
    routing_table,
    setting_table,
)

_LINES = 3  # of one check, in the notice that leads


def write_report(study: Study, folder: Path | None = None) -> list[Path]:
    """Writes the page into `folder`, else into the study's own; returns its files, or none before any point has
    ended."""
    page = page_of(study)
    return [] if page is None else write_page(page, study.folder if folder is None else folder)


def check_study(study: Study) -> list[Finding]:
    return _read(study)[-1]


def page_of(study: Study) -> Page | None:
    """None before any point has finished or failed; only checks and failures where all that ended have failed."""
    latest, grid, found, findings = _read(study)
    failed = failed_table(study, latest)
    done = sum(len(cell.records) for cell in grid)
    checks = Section("Checks", [checks_table(findings)])
    if not done:
        return _page(study, grid, found, findings, [checks, Section("Points", [failed])]) if failed else None
    metric = "validation_loss" if found.question is None else found.question.metric
    sections = [
        *_answer_sections(study, found, grid, metric),
        checks,
        run_section(study, grid, found.families, metric),
        *dispatch_section(study, grid, found.families),
        *pareto_section(grid, metric),
        *compute_sections(study, grid, metric),
        Section("Points", [*_points(study, grid, found, metric), *([failed] if failed else [])]),
    ]
    return _page(study, grid, found, findings, sections)


def _read(study: Study) -> tuple[dict[str, dict[str, Any]], list[Cell], Answer, list[Finding]]:
    """The last line of each point in the ledger, and what follows from them."""
    ledger = Ledger(study.ledger)
    _, unreadable = ledger.read()
    latest = ledger.latest()
    grid = cells(study, latest)
    found = answer(study, grid)
    return latest, grid, found, check(study, grid, latest, found.families, unreadable)


def _page(
    study: Study, grid: Sequence[Cell], found: Answer, findings: Sequence[Finding], sections: list[Section]
) -> Page:
    done = sum(len(cell.records) for cell in grid)
    return Page(
        study.file.name,
        [*_notices(findings), Prose(_lead(study, found, done))],
        sections,
        [f"moe-dist study run {study.path}", f"moe-dist study report {study.path}"],
        setting_table(study, grid),
    )


def _notices(findings: Sequence[Finding]) -> list[Notice]:
    notices = []
    for level in ("violation", "warning"):
        of_level = [finding for finding in findings if finding.level == level]
        lines = []
        for name in CHECKS:
            of_check = [finding.line for finding in of_level if finding.check == name]
            lines += of_check[:_LINES]
            if len(of_check) > _LINES:
                lines.append(f"{name}: and {len(of_check) - _LINES} more, in the table of checks")
        if lines:
            notices.append(Notice(level, lines))
    if not findings:
        notices.append(Notice("good", ["The design supports the question: all checks are kept."]))
    return notices


def _lead(study: Study, found: Answer, done: int) -> list[str]:
    asked = [f"**{found.asked}**"] if found.asked else []
    return [*asked, " ".join(found.sentences), f"{done} of {len(study.points)} points have finished."]


def _answer_sections(study: Study, found: Answer, grid: Sequence[Cell], metric: str) -> list[Section]:
    sections, asked = [], found.question or Question(baseline={}, metric=metric)
    floor = ""
    if found.floor is not None:
        interval = found.floor.interval
        between = "" if interval is None else f" ({interval.low:.3g} to {interval.high:.3g})"
        floor = f"Seeds of one point spread by {found.floor.deviation:.3g}{between} in {title(metric)}."
    if found.comparisons:
        note = (
            f"{title(metric)}, seed by seed, minus the baseline, with each one's own 95% t interval, which the answer "
            "gives too; p after Holm over the family; the difference that so many seeds show in 80 of 100 studies. "
            f"{floor}"
        )
        named = (found.families.named, found.comparisons, asked, note)
        parts: list[Part] = [*comparisons_tables("comparisons", "Named comparisons", *named)]
        if len(found.advice) > 1:
            parts.append(advice_table(found))
        elif said := [*_reasons(found), *(order.words for order in found.orders)]:
            parts.append(Prose(said))
        sections.append(Section("Answer", parts))
    elif found.question is None:
        lines = "  \n".join(HOW.splitlines())
        sections.append(
            Section("How to state a question", [Prose([f"In the study's file, before the runs: `{lines}`"])])
        )
    if found.families.others:
        comparisons = compared(found.families.others, metric)
        note = f"Not named by a question before the runs: no claims. {floor}"
        others = (found.families.others, comparisons, asked, note)
        tables = comparisons_tables("exploratory", "Other comparisons", *others)
        sections.append(Section("Other comparisons", tables, exploratory=True))
    overall = overall_table((*found.families.named, *found.families.others), metric)
    if overall is not None:
        sections.append(Section("Over all settings", [overall], exploratory=True))
    return sections


def _reasons(found: Answer) -> list[str]:
    """Of the recommendation, where there is one setting."""
    return [f"The recommendation: {each.reasons}." for each in found.advice]


def _points(study: Study, grid: Sequence[Cell], found: Answer, metric: str) -> list[Table]:
    baselines = {id(match.cell): match.baseline for match in (*found.families.named, *found.families.others)}
    return [results_table(study, grid, baselines, metric), routing_table(study, grid), costs_table(grid)]
