"""The page of a comparison, out of its figures and tables."""

import shlex
from collections.abc import Sequence
from pathlib import Path

from moe_dist.study.compare.figures import POINTS, Panel, curves, load_map
from moe_dist.study.compare.runs import RunRecord
from moe_dist.study.compare.tables import differences, ends, setting
from moe_dist.study.page.model import Figure, Notice, Page, Part, Prose, Section, Table

_BINS = f"A curve of more than {POINTS} steps is drawn as means over {POINTS} bins; above the axes lie first steps."
_NEXT = 3
"""Runs that the lead names after the one with the lowest loss."""


def comparison(runs: Sequence[RunRecord], output: Path) -> Page:
    """output: where it will be written, for the command that makes it again."""
    sections = [
        Section("How they ended", [ends(runs)]),
        Section("Loss", _losses(runs)),
        Section("Drops and load", _routing(runs)),
        Section("Speed", _speed(runs)),
        Section("What differs", _differences(runs)),
    ]
    command = shlex.join(["moe-dist", "compare", *(str(run.folder) for run in runs), "--output", str(output)])
    return Page(
        title=_title(runs),
        lead=_lead(runs),
        sections=[section for section in sections if section.parts],
        again=[command],
        setting=setting(runs),
    )


def _title(runs: Sequence[RunRecord]) -> str:
    *names, last = [run.label for run in runs]
    if len(names) > 2:
        return f"{len(runs)} runs"
    return f"{', '.join(names)} and {last}" if names else last


def _lead(runs: Sequence[RunRecord]) -> list[Notice | Prose]:
    lead: list[Notice | Prose] = []
    apart = _other_losses(runs)
    warnings = [*apart, *_lacking(runs)]
    if warnings:
        lead.append(Notice("warning", warnings))
    lines = [] if apart else _lowest(runs)
    if len(runs) > 1:
        lines.append(
            "One run each: a difference may be one of chance. `moe-dist study` compares settings over seeds, with "
            "intervals."
        )
    return [*lead, Prose(lines)] if lines else lead


def _lowest(runs: Sequence[RunRecord]) -> list[str]:
    """Where the last validation losses stand; nothing without one."""
    last = {run.label: float(run.values("validation_loss")[-1]) for run in runs if "validation_loss" in run.curves}
    if not last:
        return []
    best, *rest = sorted(last, key=lambda label: last[label])
    others = ", ".join(f"{label} +{last[label] - last[best]:.4f}" for label in rest[:_NEXT])
    others += f" and {len(rest) - _NEXT} more above" if len(rest) > _NEXT else ""
    what = "The lowest last validation loss is" if rest else "The last validation loss is"
    return [f"{what} **{last[best]:.4f} {runs[0].unit}**, of {best}" + (f"; {others}." if others else ".")]


def _other_losses(runs: Sequence[RunRecord]) -> list[str]:
    """Why losses of these runs do not compare."""
    found = []
    if len({run.unit for run in runs}) > 1:
        found.append("Some runs are language models and some are classifiers: their losses do not compare.")
    for keys, of, what in (
        (("data.name", "data.tokens.validation", "data.texts.validation"), "environment", "on other data"),
        (
            ("data.kind", "data.paths", "data.blend", "data.tokenizer", "model.vocab_size", "run.eval_sequences"),
            "config",
            "on other texts or tokens",
        ),
    ):
        known = [getattr(run, of) for run in runs if getattr(run, of)]
        differing = [key for key in keys if len({str(each.get(key)) for each in known}) > 1]
        if differing:
            named = ", ".join(f"`{key}`" for key in differing)
            found.append(f"The runs were evaluated {what} ({named} differ): their losses do not compare.")
    return found


def _lacking(runs: Sequence[RunRecord]) -> list[str]:
    found = []
    for run in runs:
        if run.state != "finished":
            found.append(f"{run.label} has not finished ({run.state}, step {run.last:,}).")
        if run.unreadable:
            found.append(f"{run.unreadable:,} lines of {run.label}'s metrics.jsonl cannot be read, and are left out.")
        if not run.environment:
            found.append(f"{run.label} has no environment.json that can be read: versions and machine are unknown.")
    return found


def _losses(runs: Sequence[RunRecord]) -> list[Part]:
    found: list[Figure | None] = []
    for unit in dict.fromkeys(run.unit for run in runs):
        some = [run for run in runs if run.unit == unit]
        texts = unit == "nats/text"
        end = "-texts" if texts else ""
        panels = [Panel("loss", f"Training ({unit})"), Panel("validation_loss", f"Validation ({unit})", few=True)]
        caption = f"{_BINS} Validation drops nothing."
        found.append(curves(f"loss{end}", "Training and validation loss", caption, some, panels))
        capped = [Panel("validation_loss_capped", f"Validation, capped ({unit})", few=True)]
        caption = "Validation under the capacity limit of `run.eval_capacity_factor`."
        found.append(curves(f"loss-capped{end}", "Validation loss under a capacity limit", caption, some, capped))
        scores = [
            Panel("validation_accuracy", "Validation accuracy (%)", 100.0, few=True),
            Panel("validation_macro_f1", "Validation macro-F1", few=True),
        ]
        found.append(curves(f"scores{end}", "Accuracy and F1", "Of each evaluation.", some, scores))
    return _there(found)


def _routing(runs: Sequence[RunRecord]) -> list[Part]:
    with_experts = [run for run in runs if run.load or "drop_rate" in run.curves]
    if not with_experts:
        return []
    panels = [
        Panel("drop_rate", "Assignments dropped (%)", 100.0, from_zero=True),
        Panel("load_max_over_mean", "Fullest expert over the mean"),
    ]
    caption = f"The fullest expert is that of the worst layer, before drops; 1 is an even share. {_BINS}"
    dense = [run.label for run in runs if run not in with_experts]
    note = [Prose([f"Without experts, so not in these figures: {', '.join(dense)}."])] if dense else []
    figures = [curves("drops", "Drops and load", caption, runs, panels), load_map(runs)]
    return [*note, *_there(figures)]


def _speed(runs: Sequence[RunRecord]) -> list[Part]:
    panels = [
        Panel("step_seconds", "Time of a step (ms)", 1e3, from_zero=True),
        Panel("tokens_per_second", "Tokens a second", from_zero=True),
    ]
    return _there([curves("speed", "Step time and tokens a second", _BINS, runs, panels)])


def _differences(runs: Sequence[RunRecord]) -> list[Part]:
    if len(runs) == 1:
        return []
    tables = [
        differences("configuration", "Configuration", runs, lambda run: run.config),
        differences("environment", "Versions and machine", runs, lambda run: run.environment),
    ]
    same = [
        f"{what} of all runs are the same."
        for table, what in zip(tables, ("Configurations", "Versions and machines"), strict=True)
        if table is None
    ]
    found: list[Part] = [Prose(same)] if same else []
    return [*found, *_there(tables)]


def _there(parts: Sequence[Figure | Table | None]) -> list[Part]:
    return [part for part in parts if part is not None]
