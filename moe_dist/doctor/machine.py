"""GPUs, processor, memory and disks, by what the system tells."""

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from moe_dist.config.rules.memory import host_memory, in_units
from moe_dist.doctor.findings import Findings, NoAnswer, said_by, within

_INSTRUCTIONS = (
    "sse4_2",
    "avx",
    "avx2",
    "fma",
    "avx512f",
    "avx512_bf16",
    "avx_vnni",
    "amx_bf16",
    "asimd",
    "sve",
    "bf16",
)
_SECONDS = 5.0
_SHARED_MEMORY = 2**30
_LITTLE_DISK = 2**30
_HOME = Path(os.path.expanduser("~"))
_GPU_FILES = ("/dev/nvidiactl", "/dev/kfd")
_ASK_TORCH = """
import json, torch
cuda = torch.cuda.is_available()
each = [torch.cuda.get_device_properties(at) for at in range(torch.cuda.device_count())] if cuda else []
nccl = torch.cuda.nccl.version() if cuda and torch.distributed.is_nccl_available() else None
print(json.dumps({"built": torch.version.cuda or torch.version.hip, "nccl": nccl and ".".join(map(str, nccl)),
    "gpus": [[one.name, one.total_memory, f"{one.major}.{one.minor}"] for one in each]}))
"""


def look_at_gpus(found: Findings, seconds: float) -> str:
    """Returns the device that training would choose: cuda or cpu."""
    driver = said_by(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], _SECONDS)
    if not any(Path(each).exists() for each in _GPU_FILES) and not driver:
        found.facts["gpus"] = {"gpus": "none"}
        return "cpu"
    facts = {"driver": driver.splitlines()[0] if driver else "nvidia-smi tells nothing"}
    found.facts["gpus"] = facts
    told = said_by([sys.executable, "-c", _ASK_TORCH], seconds)
    if told is None:
        facts["gpus"] = "torch tells nothing of them"
        found.broken.append(
            f"a GPU is here, but torch failed or said nothing about it in {seconds:g} s: see nvidia-smi and dmesg; "
            "--device cpu trains without it"
        )
        return "cpu"
    said = json.loads(told.splitlines()[-1])
    facts |= {"torch was built for": said["built"] or "cpu alone", "nccl": said["nccl"] or "absent"}
    facts |= {
        f"gpu {at}": f"{name}, {in_units(memory)}, capability {capability}"
        for at, (name, memory, capability) in enumerate(said["gpus"])
    }
    if said["gpus"]:
        if said["nccl"] is None:
            found.broken.append(
                "this torch has no NCCL, by which ranks on GPUs talk: install torch from its CUDA index"
            )
        return "cuda"
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if hidden is not None and hidden.strip() in ("", "-1"):
        found.notes.append(f"CUDA_VISIBLE_DEVICES={hidden} hides the GPUs: unset it to train on them")
    else:
        why = "was built without CUDA" if not said["built"] else f"was built for CUDA {said['built']} and finds none"
        found.broken.append(
            f"a GPU is here, but torch {why}: install the torch that fits driver {facts['driver']}; "
            "--device cpu trains without it"
        )
    return "cpu"


def look_at_processor(found: Findings) -> None:
    info = _pairs(Path("/proc/cpuinfo"))
    flags = set(info.get("flags", info.get("Features", "")).split())
    usable, there = len(os.sched_getaffinity(0)), os.cpu_count()
    found.facts["cpu"] = {
        "model": info.get("model name", "unknown"),
        "cores": f"{usable} of {there} may be used" + _quota(),
        "instructions": " ".join(name for name in _INSTRUCTIONS if name in flags) or "unknown",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "not set: a rank takes its share of the cores"),
    }
    threads = os.environ.get("OMP_NUM_THREADS", "")
    if threads.isdecimal() and int(threads) > usable:
        found.notes.append(f"OMP_NUM_THREADS={threads} is more than the {usable} cores that may be used: lower it")


def _quota() -> str:
    """Of the control group, where it grants less than whole cores."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
    except (OSError, ValueError):
        return ""
    return "" if quota == "max" else f", {int(quota) / int(period):.1f} of them at a time"


def look_at_memory(found: Findings, shared: Path = Path("/dev/shm")) -> None:
    """shared: where memory that processes share lies."""
    told = _pairs(Path("/proc/meminfo"))
    facts = {"usable": in_units(host_memory())}
    for name, words in (("MemAvailable", "available now"), ("SwapTotal", "swap")):
        if name in told:
            facts[words] = in_units(1024 * int(told[name].split()[0]))
    found.facts["memory"] = facts
    room = Room.of(shared)
    facts[f"shared ({shared})"] = str(room)
    if room.problem or not room.writable:
        found.broken.append(
            f"{shared} cannot be used ({room.problem or 'not writable'}), and processes meet there: mount it; in a "
            "container give --ipc=host"
        )
    elif room.free < _SHARED_MEMORY:
        found.notes.append(
            f"{shared} has {in_units(room.free)} free: too small for NCCL between the GPUs of a machine, and for what "
            "processes hand each other; in a container give --ipc=host or --shm-size=8g"
        )


def look_at_disks(found: Findings) -> None:
    places = {"here": Path.cwd(), "temporary files": Path(tempfile.gettempdir()), "home": _HOME}
    rooms = {name: Room.of(path) for name, path in places.items()}
    found.facts["disk"] = {f"{name} ({_short(path)})": str(rooms[name]) for name, path in places.items()}
    for name in ("here", "temporary files"):
        room, path = rooms[name], _short(places[name])
        if room.problem:
            found.broken.append(f"the disk of {path} cannot be used: {room.problem}; work elsewhere, or set TMPDIR")
        elif not room.writable:
            found.notes.append(f"{path} cannot be written: give --run.root a folder that can, and set TMPDIR")
        elif room.free < _LITTLE_DISK:
            found.notes.append(f"{path} has {in_units(room.free)} free: checkpoints may not fit; set --run.root")


@dataclass(frozen=True, slots=True)
class Room:
    """What a disk has, in bytes. problem: why nothing is known of it."""

    free: int = 0
    total: int = 0
    writable: bool = False
    problem: str = ""

    @staticmethod
    def of(path: Path) -> "Room":
        try:
            usage, writable = within(_SECONDS, lambda: (shutil.disk_usage(path), os.access(path, os.W_OK)))
        except (NoAnswer, OSError) as error:
            return Room(problem=str(error))
        return Room(usage.free, usage.total, writable)

    def __str__(self) -> str:
        return self.problem or f"{in_units(self.free)} free of {in_units(self.total)}"


def _short(path: Path) -> str:
    """Without the name of the user, as it may be published."""
    return f"~/{path.relative_to(_HOME)}".removesuffix("/.") if path.is_relative_to(_HOME) else str(path)


def _pairs(path: Path) -> Mapping[str, str]:
    """The first value of each name in a file of `name: value` lines; nothing where there is no file."""
    found: dict[str, str] = {}
    try:
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            name, _, value = line.partition(":")
            found.setdefault(name.strip(), value.strip())
    except OSError:
        pass
    return found
