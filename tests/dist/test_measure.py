"""`moe-dist plan --measure` on real ranks, with sizes that take moments."""

from pathlib import Path
from unittest import mock

import pytest
import torch

from moe_dist.parallel.mesh import Layout
from moe_dist.plan import measure
from moe_dist.plan.hardware import Hardware, dump_hardware, load_hardware
from moe_dist.plan.time import exchange_seconds
from moe_dist.plan.transfer import Collective, Transfer
from tests.dist.helpers import run_checks

SMALL = {
    "_GRIDS": {"cpu": ((4, 16), (8, 32))},
    "_COPIES": {"cpu": (2**12, 2**16)},
    "_MESSAGES": (2**8, 2**12),
    "_ENOUGH": 1e-4,
    "_TIMES": 1,
}


def measured(ranks_per_node: int) -> Hardware:
    with mock.patch.multiple(measure, **SMALL):
        return measure.measured(torch.device("cpu"), torch.distributed.get_world_size(), ranks_per_node, "small")


def check_one_node() -> None:
    """Bytes on the wire between two ranks: all of an all-reduce, half of the others' whole."""
    found = measured(2)
    assert found.between is None and found.source == "measured" and found.ranks_per_node == 2
    assert found.inside is not None and found.inside.bandwidth > 0
    wire = {name: [size for size, _ in curve.seconds] for name, curve in found.inside.curves.items()}
    halves = [128.0, 2048.0]
    assert wire == {"all_reduce": [256.0, 4096.0], "all_to_all": halves, "all_gather": halves, "reduce_scatter": halves}
    assert {curve.ranks for curve in found.inside.curves.values()} == {2}
    # Read back at a measured size, a call takes what was measured, whatever is asked for it.
    for collective, handed in (("all_reduce", 4096), ("all_to_all", 4096), ("all_gather", 2048)):
        name: Collective = collective  # type: ignore[assignment]
        transfer = Transfer(name, "ep", (0, 1), "forward", "rows", calls=3, bytes=3 * handed)
        told = exchange_seconds(transfer, Layout(2, ep=2), found)
        assert told == pytest.approx(3 * found.inside.curves[collective].seconds[-1][1])


def check_the_file(folder: str) -> None:
    """All ranks have the same numbers, and the file has them too."""
    found = measured(2)
    path = Path(folder, f"{torch.distributed.get_rank()}.yaml")
    path.write_text(dump_hardware(found))
    assert load_hardware(str(path)) == found
    torch.distributed.barrier()
    both = [load_hardware(str(Path(folder, f"{rank}.yaml"))) for rank in range(2)]
    assert both[0].products == both[1].products and both[0].inside == both[1].inside
    assert {(rows, side) for rows, side, _ in found.products["fp32"].rates} == {(4, 8), (16, 8), (4, 32), (16, 32)}
    assert found.products["bf16"].peak == max(rate for *_, rate in found.products["bf16"].rates)
    assert 0 < found.products["fp32"].attention <= 1
    assert found.host.micro_step >= 0 and found.host.step > 0


def check_two_nodes() -> None:
    """One rank on each: nothing inside, and what leaves a node is what leaves its rank."""
    found = measured(1)
    assert found.inside is None and found.between is not None
    assert [size for size, _ in found.between.curves["all_reduce"].seconds] == [256.0, 4096.0]


def check_uneven_nodes() -> None:
    with pytest.raises(ValueError, match="2 ranks lie unevenly on nodes of 3"):
        measured(3)


def test_what_two_ranks_measure(tmp_path: Path) -> None:
    run_checks(2, [check_one_node, check_two_nodes, check_uneven_nodes])
    run_checks(2, [check_the_file], str(tmp_path))
