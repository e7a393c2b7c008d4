"""Ranks agree to stop after the same step, whichever of them hears of it."""

import os
import signal

import torch
import torch.distributed as dist

from moe_dist.parallel.mesh import create_mesh
from moe_dist.train.health.signals import StopGuard
from tests.dist.helpers import run_checks


def check_all_agree_when_one_is_signalled() -> None:
    mesh, cpu = create_mesh(1, 1), torch.device("cpu")
    with StopGuard() as guard:
        assert guard.agreed(mesh.world, cpu) is None
        if dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGUSR2)
        assert guard.agreed(mesh.world, cpu) == "SIGUSR2"


def test_stop_guard() -> None:
    run_checks(2, [check_all_agree_when_one_is_signalled])
