"""`moe-dist doctor`: look at everything, print what was found, and say whether training can run here."""

import argparse
import json
import sys
from dataclasses import asdict

from moe_dist.doctor.findings import Findings, NoAnswer, answer_of
from moe_dist.doctor.machine import look_at_disks, look_at_gpus, look_at_memory, look_at_processor
from moe_dist.doctor.network import look_at_environment, look_at_network, look_at_slurm
from moe_dist.doctor.software import look_at_backends, look_at_software

FIT, BROKEN = 0, 1


def doctor(own: argparse.Namespace) -> int:
    """own: of doctor_arguments. Returns the exit code: 0 training can run here, 1 something needed is broken."""
    found = look(own.seconds)
    if own.json:
        print(json.dumps(asdict(found), indent=1, ensure_ascii=False))
    else:
        print(as_text(found))
    return BROKEN if found.broken else FIT


def look(seconds: float) -> Findings:
    """seconds: that a check may take."""
    found = Findings()
    look_at_software(found)
    device = look_at_gpus(found, seconds)
    look_at_processor(found)
    look_at_memory(found)
    look_at_disks(found)
    look_at_slurm(found)
    look_at_network(found)
    try:
        import torch
    except (ImportError, OSError) as error:
        said = " ".join(str(error).split())
        found.broken.append(f"torch cannot be imported ({said}): install it anew, launch/install.sh does")
    else:
        found.facts["cpu"]["torch computes with"] = torch.backends.cpu.get_cpu_capability()
        look_at_backends(found, device)
        look_at_pair(found, seconds)
    look_at_environment(found)
    return found


def look_at_pair(found: Findings, seconds: float) -> None:
    """Two processes and an all-reduce."""
    name = "two processes over gloo"
    try:
        answer = answer_of([sys.executable, "-m", "moe_dist.doctor.pair", str(seconds)], seconds)
    except NoAnswer as error:
        said = str(error)
    else:
        if answer.code == 0:
            found.facts["checks"] = {name: f"an all-reduce, from start to end {answer.out} s"}
            return
        said = (answer.error.splitlines() or [f"exit code {answer.code}"])[-1]
    found.facts["checks"] = {name: f"FAILED: {said}"}
    found.broken.append(
        f"two processes cannot add up a number over gloo ({said}): see that the loopback interface lo is up and the "
        "folder for temporary files can be written"
    )


def as_text(found: Findings) -> str:
    """The verdict first."""
    verdict = "training can run here" if not found.broken else f"{len(found.broken)} broken, see the lines below"
    lines = [f"moe-dist doctor: {verdict}"]
    lines += [f"  broken  {line}" for line in found.broken] + [f"  note    {line}" for line in found.notes]
    for section, facts in found.facts.items():
        width = max(map(len, facts), default=0)
        lines += ["", section, *(f"  {name:{width}}  {value}" for name, value in facts.items())]
    return "\n".join(lines)
