"""Three real ranks of which one leaves out a collective, under the watchdog."""

from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from moe_dist.parallel.collectives import all_gather, all_reduce
from moe_dist.parallel.mesh import create_mesh
from moe_dist.parallel.trail import Trail
from moe_dist.train.exit_codes import STALLED
from moe_dist.train.health.watchdog import Watchdog
from moe_dist.train.record.status import read_status
from tests.dist.nursery import RankError, on_ranks

STALL = 5.0


def hangs(run: str) -> None:
    """Steps of an all-reduce and an all-gather; rank 2 passes over the all-reduce of the third. The all-gather has a
    process group of its own, so that the two wait for ever: in one, gloo could take them for each other."""
    trail = Trail()
    mesh = create_mesh(ep=3, tp=1, trail=trail)
    own = replace(mesh.world, process_group=dist.new_group([0, 1, 2]))
    with Watchdog(Path(run), mesh.rank, 3, trail, STALL):
        for step in range(1, 10):
            trail.enter("backward", step)
            if (step, mesh.rank) != (3, 2):
                all_reduce(torch.ones(4), mesh.world)
            trail.enter("update")
            all_gather(torch.ones(2), own)


def test_the_collective_that_one_rank_left_out_is_named(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    try:
        on_ranks(hangs, 3, str(tmp_path))
    except RankError as error:
        assert f"{STALLED}" in str(error), error
    else:
        raise AssertionError("three ranks that cannot meet have met")
    status = read_status(tmp_path)
    assert status["code"] == STALLED
    wrong = "collective 5 of ranks 0 to 2: ranks 0, 1 entered all_reduce [4] (backward of step 3); rank 2 entered "
    assert status["reason"].endswith(wrong + "all_gather (update of step 3)"), status
    told = (tmp_path / "logs" / "collectives.log").read_text()
    assert told.count("all_reduce 5 of ranks 0 to 2 of [4], 16 bytes; backward of step 3") == 2
    assert told.count("all_gather 5 of ranks 0 to 2 of [2], 8 bytes; update of step 3") == 1
