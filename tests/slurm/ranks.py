"""A program for the tasks of a step: joins the others and writes down who it found itself to be: FOLDER/STEP-RANK."""

import json
import os
import socket
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from moe_dist.parallel.launch import rank_from_environment, start, stop
from moe_dist.parallel.mesh import create_mesh


def main(folder: Path) -> None:
    step = int(os.environ["SLURM_STEP_ID"])
    rank = rank_from_environment(os.environ)
    start(rank, "cpu")
    mesh = create_mesh(ep=rank.world, tp=1)
    found = torch.zeros(100)
    found[10 * step + rank.rank] = 1
    dist.all_reduce(found)  # of this step alone
    told = {
        "local": (rank.local_rank, rank.local_world),
        "ep_node": mesh.ep_node.ranks,
        "met": found.nonzero().flatten().tolist(),
        "node": os.environ["SLURMD_NODENAME"],
        "host": socket.gethostname(),
        "met_at": os.environ["MASTER_ADDR"],
    }
    stop()
    (folder / f"{step}-{rank.rank}").write_text(json.dumps(told), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
