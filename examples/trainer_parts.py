"""The trainer's parts as a library: a decoder and its engine stepped by hand, a whole run and its numbers, `verify`."""

import json
import tempfile
from pathlib import Path

import torch

from moe_dist.config.parse import parse_dict
from moe_dist.config.validate import validate
from moe_dist.engine.make import make_engine
from moe_dist.kernels.random import RandomKey
from moe_dist.models.backends import resolve_backends
from moe_dist.models.decoder import Decoder
from moe_dist.parallel.mesh import single_process_mesh
from moe_dist.step import StepContext
from moe_dist.train.command import train
from moe_dist.train.schedule import learning_rate
from moe_dist.verify.cases import LayoutCase, Options, Setting
from moe_dist.verify.command import verify

CONFIG = {
    "model": {"d_model": 32, "num_layers": 2, "num_heads": 4, "d_ff": 64, "moe": {"num_experts": 4}},
    "optim": {"lr": 1e-2, "warmup_steps": 2},
    "train": {"steps": 6, "seq_len": 32, "global_batch": 8},
    "run": {"name": "small", "eval_sequences": 8, "tensorboard": False},
}


def by_hand() -> list[float]:
    """What a run does, without its data, checkpoints and logs."""
    config = parse_dict(CONFIG, "this file")
    shape, mesh = validate(config, world_size=1), single_process_mesh()
    model = Decoder(resolve_backends(config.model, ep=1), mesh, config.train.seed)
    engine = make_engine(model, mesh, config.engine, config.optim, shape.micro_batch, shape.accumulation)
    key, losses = RandomKey.of(config.train.seed, "train"), []
    ids = (torch.arange(shape.seq_len + 1) * 7 + torch.arange(shape.global_batch)[:, None]) % config.model.vocab_size
    for step in range(config.train.steps):
        output = engine.micro_step(ids[:, :-1], ids[:, 1:], StepContext(key.fold(step, 0), step=step))
        norm = engine.update(learning_rate(step, config.train.steps, config.optim))
        losses.append(float(output.nll))
        dropped = 1 - float(sum(s.kept_E.sum() for s in output.stats) / sum(s.load_E.sum() for s in output.stats))
        print(f"step {step + 1}: loss {losses[-1]:.3f}, gradient norm {norm:.2f}, {dropped:.1%} dropped")
    return losses


def a_run(folder: Path) -> list[dict]:
    """`moe-dist train` from Python; then the lines of its metrics.jsonl, a dict for each step."""
    config = parse_dict(CONFIG, "this file")
    config.run.root = str(folder)
    assert train(config, "never", device="cpu") == 0
    return [json.loads(line) for line in (config.run.folder / "metrics.jsonl").read_text().splitlines()]


def main() -> None:
    by_hand()
    with tempfile.TemporaryDirectory() as folder:
        records = a_run(Path(folder))
    last = records[-1]
    print(f"{len(records)} records; the last: loss {last['loss']:.3f}, validation {last['validation_loss']:.3f}")
    print(f"load of the first layer's experts: {last['layers'][0]['load']}")

    # The same losses, gradients and dropped tokens with experts or heads cut over two ranks as on one; 0: all agree.
    layouts = (LayoutCase(ep="2"), LayoutCase(tp="2"))
    assert verify(Options((Setting(drops="random"),), layouts, steps=2), ranks=2, device="cpu") == 0


if __name__ == "__main__":
    main()
