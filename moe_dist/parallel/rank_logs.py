"""What ranks write to standard error, in a file for each as well.

    MOE_DIST_RANK_LOGS=FOLDER: FOLDER/rank-00003.err, and the same lines, after [rank 3], where the launcher writes

Libraries write there, and a process that dies of a signal: what logs/rank-00003.log of a run does not hear of.
"""

import os
from dataclasses import replace

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, LogsDest

PREFIX = "TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE", "[rank ${rank}] "
"""The variable from which torchrun takes what precedes a line, and that."""


class RankLogs(DefaultLogsSpecs):
    """Of a launcher's ranks, into `folder`, which must be there."""

    def __init__(self, folder: str) -> None:
        super().__init__()
        self.folder = folder

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        """envs: of each local rank, its variables."""
        files = {local: os.path.join(self.folder, f"rank-{int(of['RANK']):05d}.err") for local, of in envs.items()}
        return replace(super().reify(envs), stderrs=files, tee_stderrs=files)
