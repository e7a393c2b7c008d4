"""The command: ranks, table, verdict."""

import argparse
import os
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from moe_dist.parallel.launch import rank_from_environment, spawn, start, stop
from moe_dist.process import output_never_fatal
from moe_dist.verify.cases import Options, Setting
from moe_dist.verify.compare import Meshes, Reference, Report, compare_layout, train_reference

_AGREED = "agreed"


def verify_as_asked(own: argparse.Namespace) -> int:
    """`moe-dist verify`. own: of verify_arguments. Returns the exit code, as `verify` does."""
    return verify(own.options, own.ranks, own.device)


def verify(options: Options, ranks: int = 4, device: str = "cpu") -> int:
    """ranks: to start, where this is none of several already. device: "cpu" or "cuda". Returns the exit code: 0 all
    agree, 1 a difference."""
    rank = rank_from_environment(os.environ)
    if rank.world > 1:
        chosen = start(rank, device, share_gpus=True)
        with output_never_fatal():  # the exit code is the verdict
            agreed = run_cases(options, chosen)
        stop()
        return 0 if agreed else 1
    with tempfile.TemporaryDirectory(prefix="moe_dist-") as folder:
        verdict = Path(folder) / "verdict"
        spawn(_worker, ranks, options, device, str(verdict), device=device)
        return 0 if verdict.read_text(encoding="utf-8") == _AGREED else 1


def _worker(options: Options, device: str, verdict: str) -> None:
    """A spawned rank; rank 0 leaves the verdict in a file."""
    chosen = torch.device(device, torch.cuda.current_device()) if device == "cuda" else torch.device(device)
    with output_never_fatal():
        agreed = run_cases(options, chosen)
    if dist.get_rank() == 0:
        Path(verdict).write_text(_AGREED if agreed else "differences", encoding="utf-8")


def run_cases(options: Options, device: torch.device) -> bool:
    """All cases on the ranks that are running; True when everything agreed. The table is printed by rank 0."""
    world, began = dist.get_world_size(), time.monotonic()
    terminal = Console().is_terminal
    console = Console(quiet=dist.get_rank() != 0, width=None if terminal else 120)
    agreed, compared, meshes = True, 0, Meshes()
    for setting in options.settings:
        reference = _shared_reference(setting, options, device)
        table = _table(setting, reference, options)
        for layout in (layout for layout in options.layouts if not setting.wide or layout.zero == "native"):
            try:
                report = compare_layout(setting, layout, reference, options, device, meshes)
            except ValueError as refused:
                table.add_row(str(layout), *[""] * 5, f"refused: {refused}")
                continue
            good = report.agrees(options)
            agreed, compared = agreed and good, compared + 1
            table.add_row(
                str(layout), *_cells(report), "ok" if good else f"[bold red]DIFFERS[/] ({report.worst_parameter})"
            )
        console.print(table)
    verdict = "all agree" if agreed and compared else "DIFFERENCES FOUND" if compared else "NOTHING COMPARED"
    seconds = time.monotonic() - began
    console.print(
        f"{compared} runs on {world} ranks against a single process, {options.steps} steps each: "
        f"{verdict} ({seconds:.0f}s)"
    )
    return agreed and compared > 0


def _shared_reference(setting: Setting, options: Options, device: torch.device) -> Reference:
    """Rank 0 trains it alone; everybody gets it."""
    box = [train_reference(setting, options, device, dist.get_world_size()) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(box, src=0)
    assert box[0] is not None
    return box[0]


def _table(setting: Setting, reference: Reference, options: Options) -> Table:
    decisions = sum(kept.numel() for kept in reference.tape.kept.values())
    title = f"{setting}: {reference.tape.dropped()} of {decisions} assignments dropped"
    table = Table(title=title, title_justify="left")
    for name, limit in (
        ("layout", ""),
        ("loss", f"<= {options.loss_tolerance:.0e}"),
        ("gradients", f"<= {options.grad_tolerance:.0e}"),
        ("norm", f"<= {options.norm_tolerance:.0e}"),
        ("dropped sets", "equal"),
        ("near ties", ""),
        ("", ""),
    ):
        table.add_column(f"{name}\n{limit}", no_wrap=name == "layout")
    return table


def _cells(report: Report) -> list[str]:
    same = report.routed == report.dropped == 0
    sets = "equal" if same else f"{report.routed} routed, {report.dropped} dropped otherwise"
    return [f"{report.loss:.1e}", f"{report.grad:.1e}", f"{report.norm:.1e}", sets, str(report.near_ties)]
