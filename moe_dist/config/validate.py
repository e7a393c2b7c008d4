"""Every rule of the configuration, between its fields and the number of ranks, collected from `rules/`.

`validate` runs before anything is allocated and reports all broken rules at once, one line each: the values, the rule,
what to change.
"""

from moe_dist.config.rules.attention import attention_rules, flash_attn_rules, routed_rules
from moe_dist.config.rules.batch import BatchShape, batch_rules, batch_shape
from moe_dist.config.rules.graph import graph_rules
from moe_dist.config.rules.memory import memory_rules
from moe_dist.config.rules.model import model_rules, position_rules
from moe_dist.config.rules.moe import moe_rules
from moe_dist.config.rules.parallel import parallel_rules
from moe_dist.config.rules.parts import refuse
from moe_dist.config.rules.run import engine_rules, guard_rules, optim_rules, run_rules, train_rules
from moe_dist.config.rules.switch import switch_rules
from moe_dist.config.rules.task import task_rules
from moe_dist.config.schema import Config


def validate(config: Config, world_size: int, memory: int | None = None) -> BatchShape:
    """Checks a configuration against `world_size` ranks. Raises one ValueError with a line for every broken rule.

    memory: bytes that a rank has, where the run starts on this machine; None where it may start on another.
    """
    model, parallel, train = config.model, config.parallel, config.train
    attention, num_layers = model.attention, model.num_layers
    tp = parallel.tp
    dp = world_size // tp if tp >= 1 and world_size >= 1 and world_size % tp == 0 else None
    refuse(
        [
            *model_rules(model),
            *position_rules(model, train.seq_len),
            *attention_rules(attention, num_layers),
            *routed_rules(attention, train.seq_len),
            *flash_attn_rules(config),
            *switch_rules(attention, parallel, num_layers=num_layers),
            *moe_rules(model.moe, parallel, d_ff=model.d_ff, num_layers=num_layers),
            *parallel_rules(parallel, model, train.seq_len, world_size),
            *engine_rules(config.engine),
            *graph_rules(config),
            *optim_rules(config.optim, config.engine),
            *task_rules(config),
            *train_rules(train),
            *run_rules(config.run, train.steps),
            *guard_rules(config.guard, config.engine),
            *(batch_rules(train, dp) if dp is not None else ()),
        ]
    )
    assert dp is not None, "a tp that does not divide the world is a problem above"
    shape = batch_shape(train, dp)
    if memory is not None:
        refuse(memory_rules(config, shape, memory))
    return shape
