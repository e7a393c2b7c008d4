"""What a resumed run does otherwise than the one that wrote its checkpoint: one line for each setting that matters.

Not here: what `train.resume` refuses to change, and where things lie or are logged.
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from moe_dist.config import Config
from moe_dist.config.schema import OptimConfig
from moe_dist.train.agreement import leaves
from moe_dist.train.schedule import learning_rate

_SCHEDULE = (
    "train.steps",
    *(f"optim.{name}" for name in "lr schedule warmup_steps min_lr_ratio decay_fraction".split()),
)
_SHARED = "other tokens share a forward pass, and compete for capacity"
_EFFECTS = {
    "train.accumulation": _SHARED,
    "train.micro_batch": _SHARED,
    "engine.precision": "masters and moments stay fp32; what is computed from them is rounded otherwise",
    "engine.grad_clip": "gradients are clipped at another norm",
    "train.init_from": "a run that is resumed does not read it",
    "train.freeze": "what is frozen from here on loses its moments; those of what is not any more begin at zero",
    "optim.": "used from here on; the moments go on as they are",
    "engine.": "the same numbers, held and moved otherwise",
    "parallel.": "the same numbers, held and moved otherwise",
}
"""By the name of a setting, or what it begins with; the first that fits."""


def changes(before: Mapping[str, Any], config: Config, step: int) -> Iterator[str]:
    """before: the configuration in the checkpoint of step `step`; empty where it holds none."""
    there, here = leaves(before), leaves(asdict(config))
    changed = [name for name in here if name in there and not _same(there[name], here[name])]
    for name in changed:
        effect = next((effect for start, effect in _EFFECTS.items() if name.startswith(start)), None)
        if name in _SCHEDULE:
            effect = "another schedule of the learning rate"
        if effect is not None:
            yield f"changed   {name}={here[name]}, was {there[name]}: {effect}"
    if set(changed) & set(_SCHEDULE) and 0 < step < config.train.steps:
        optim = OptimConfig(**{name: there.get(f"optim.{name}", value) for name, value in asdict(config.optim).items()})
        last = learning_rate(step - 1, max(step, there.get("train.steps", step)), optim)
        then = learning_rate(step, config.train.steps, config.optim)
        yield f"changed   the learning rate goes from {last:.1e} in step {step} to {then:.1e} in step {step + 1}"


def _same(there: Any, here: Any) -> bool:
    """there: as read from JSON, where tuples are lists."""
    return there == (list(here) if isinstance(here, tuple) else here)
