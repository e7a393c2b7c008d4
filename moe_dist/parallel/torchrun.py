"""torchrun for ranks that are all on this machine, with nothing open to the network.

    python -m moe_dist.parallel.torchrun --nproc_per_node 2 -m moe_dist.cli train CONFIG

Takes the flags of torchrun, but for those of the rendezvous. `torchrun --standalone` keeps two stores that listen on
every interface, and whoever reaches them can write what ranks read. Here the launcher meets itself in a file, and the
ranks meet at a port of the loopback interface, which rank 0 opens (`launch.py`).
"""

import os
import sys
import tempfile
from collections.abc import Sequence

from torch.distributed import run


def main(args: Sequence[str]) -> None:
    """Returns when all ranks have ended well; else raises or exits as torchrun does."""
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # the launcher opens no store for the ranks
    with tempfile.TemporaryDirectory(prefix="moe_dist-") as folder:
        meet = ["--nnodes", "1", "--local_addr", "127.0.0.1", "--rdzv_backend", "c10d"]
        meet += ["--rdzv_endpoint", os.path.join(folder, "rendezvous"), "--rdzv_conf", "store_type=file"]
        run.main([*meet, *args])


if __name__ == "__main__":
    main(sys.argv[1:])
