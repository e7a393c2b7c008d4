"""Which fault comes next: a function of the seed and its number, and of how far the run is."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from moe_dist.chaos.fault import Fault, Phase
from moe_dist.config.schema import RunConfig

Kind = Literal["kill", "save", "stop", "hang", "corrupt", "fill", "delay", "flip", "term"]
_PHASES: tuple[Phase, ...] = ("data", "forward", "backward", "update")


@dataclass(frozen=True)
class Pace:
    """Seconds that a start takes to its first step, and that a step takes."""

    ready: float = 15.0
    step: float = 0.5

    def reach(self, save_every: int) -> int:
        """How many steps a start may get before its fault: as long as it takes to start, and two checkpoints at least,
        so that there is something to lose and that not all of the time is spent on starting."""
        return max(2 * save_every, int(self.ready / self.step))


def kinds(seed: int, number: int, world: int, copies: bool) -> tuple[Kind, random.Random]:
    """The kind of fault `number` (from 0), and what else is drawn for it. Each kind comes once before any comes again,
    in an order of the seed's; kills twice. world: ranks; only others can find one that is stopped. copies: whether a
    flipped bit can be found."""
    deck: list[Kind] = ["kill", "kill", "save", "save", "hang", "corrupt", "fill", "delay", "term"]
    deck += ["stop"] if world > 1 else []
    deck += ["flip"] if copies else []
    random.Random(f"{seed}/round {number // len(deck)}").shuffle(deck)
    return deck[number % len(deck)], random.Random(f"{seed}/fault {number}")


def draw(kind: Kind, by: random.Random, run: RunConfig, world: int, whole: Sequence[int], pace: Pace) -> list[Fault]:
    """The faults of one start, the last of which ends it.

    world: ranks. whole: steps of the checkpoints, of which the last is where the start begins.
    """
    begin, every, reach = whole[-1] if whole else 0, run.save_every, pace.reach(run.save_every)
    rank, step, phase = by.randrange(world), by.randint(begin + 1, begin + reach), by.choice(_PHASES)
    saves = list(range((begin // every + 1) * every, begin + reach + 1, every))
    save = by.choice(saves)
    there = [*whole, *saves[: saves.index(save)]][-run.keep_last :]
    write = f"write .step-{save:06d}/rank-{rank:05d}.safetensors"
    match kind:
        case "kill":
            return [Fault(kind="kill", rank=rank, after=by.uniform(0, 2 * pace.ready))]
        case "save":
            change = by.choice(changes(save, there, run.keep_last, world)) if rank == 0 else write
            later = by.choice([0.0, by.uniform(0, 0.02)])
            return [Fault(kind="kill", rank=rank, save=save, change=change, later=later)]
        case "corrupt":
            return [Fault(kind="kill", rank=rank, step=step, phase=phase)]
        case "fill":
            if by.random() < 0.5:
                return [Fault(kind="fill", rank=0, step=step, phase="update")]
            return [Fault(kind="fill", rank=rank, save=save, change=write)]
        case "delay":
            slow = Fault(kind="delay", rank=rank, step=step, phase=phase, seconds=by.uniform(0.5, 2.0))
            return [slow, Fault(kind="term", rank=rank, step=step + every, phase="data")]
        case "flip":
            return [Fault(kind="flip", rank=rank, step=step, phase="update")]
        case _:
            return [Fault(kind=kind, rank=rank, step=step, phase=phase)]


def changes(save: int, whole: Sequence[int], keep_last: int, world: int) -> list[str]:
    """What rank 0 changes in the folder of checkpoints when it saves step `save` beside `whole`, in order."""
    draft = f".step-{save:06d}"
    shard, manifest = f"write {draft}/rank-00000.safetensors", f"write {draft}/manifest.json"
    names = [f"mkdir {draft}", shard, manifest, f"flush {draft}", f"rename {draft}", "flush ."]
    if len(whole) >= keep_last and whole[0] < save:
        names += removal(f"step-{whole[0]:06d}", world)
    return names


def removal(name: str, world: int) -> list[str]:
    """What it changes there when it removes a checkpoint of `world` ranks; the files come in any order."""
    files = [f"remove {name}/rank-{rank:05d}.safetensors" for rank in range(world)]
    return [f"remove {name}/manifest.json", f"flush {name}", *files, f"rmdir {name}"]
