"""Our mesh in the words that DeepSpeed asks for: an `mpu`, and process groups."""

import torch.distributed as dist

from moe_dist.parallel.mesh import Group, Mesh


class ModelParallelUnit:
    """Our mesh in the words of Megatron's `mpu`, as DeepSpeed asks for it.

    Given also at tp = 1: DeepSpeed keeps the last one it saw in a global.
    """

    def __init__(self, mesh: Mesh) -> None:
        self.tp, self.dp = mesh.tp, mesh.dp
        self.tp_group, self.dp_group = process_group(mesh.tp), process_group(mesh.dp)

    def get_model_parallel_rank(self) -> int:
        return self.tp.rank

    def get_model_parallel_world_size(self) -> int:
        return self.tp.size

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        return self.tp_group

    def get_data_parallel_rank(self) -> int:
        return self.dp.rank

    def get_data_parallel_world_size(self) -> int:
        return self.dp.size

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return self.dp_group

    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    get_tensor_model_parallel_group = get_model_parallel_group

    def get_tensor_model_parallel_src_rank(self) -> int:
        return self.tp.ranks[0]


def process_group(group: Group) -> dist.ProcessGroup:
    """DeepSpeed wants a real group even for one rank; only that rank has to make it."""
    if group.process_group is not None:
        return group.process_group
    return dist.new_group([dist.get_rank()], use_local_synchronization=True)
