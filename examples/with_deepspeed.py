"""DeepSpeed, ZeRO stage 1: torchrun --nproc_per_node 2 examples/with_deepspeed.py

Every rank has the whole layer, and a part of the optimizer's state. (Experts cut over ranks under ZeRO are what the
trainer's own engine is for: engine.name=deepspeed.)
"""

import os

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
import torch.distributed as dist
from own_model import ROWS, STEPS, Model, batch, compare, optimizer_of, train

# On CPU it would compile an operation for inference, which takes a minute.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def main() -> None:
    deepspeed.init_distributed("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    model = Model()
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimizer_of(model),
        config={
            "train_batch_size": ROWS,
            "train_micro_batch_size_per_gpu": ROWS // ranks,
            "zero_optimization": {"stage": 1},
            "zero_allow_untested_optimizer": True,
            "gradient_clipping": 0.0,  # left out, it is 1
            "steps_per_print": 10**9,
        },
    )
    losses = []
    for step in range(STEPS):
        loss = engine(batch(step).chunk(ranks)[rank])
        engine.backward(loss)
        engine.step()
        mean = loss.detach() / ranks
        dist.all_reduce(mean)
        losses.append(float(mean))
    if rank == 0:
        compare("DeepSpeed", losses, train(Model(), parts=ranks))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
