"""TensorBoard's view of metrics.jsonl. It is a view: where it fails, that is told once, and the run goes on without."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SYSTEM = frozenset(
    "tokens_per_second step_seconds tflops mfu tflops_executed mfu_executed memory_bytes timing kept_seconds".split()
)
"""What a repeated run need not repeat."""
_MOE = frozenset(
    "drop_rate unserved_rate over_budget_rows load_max_over_mean balance_loss z_loss router_entropy "
    "dispatch_rows_bytes dispatch_bytes".split()
)
_HISTOGRAMS = (
    "load",
    "dropped_by_expert",
    "dropped_by_place",
    "dropped_by_micro_step_place",
    "dropped_by_frequency",
    "load_by_frequency",
    "over_budget_by_pool",
)


class Board:
    """Event files in `folder`, from `begin` on until something fails. histogram_every: steps between histograms of
    load and drops. say: takes a line for the person who watches."""

    def __init__(self, folder: Path, histogram_every: int, say: Callable[[str], None]) -> None:
        self._folder = folder
        self._histogram_every = histogram_every
        self._say = say
        self._writer: Any = None

    def begin(self, last_step: int | None) -> None:
        """last_step: what was logged after it is hidden; None hides nothing."""
        from torch.utils.tensorboard import SummaryWriter  # here: the import takes seconds

        with self._told():
            purge_step = None if last_step is None else last_step + 1  # the first step to hide
            self._writer = SummaryWriter(self._folder, purge_step=purge_step, flush_secs=10)

    def log(self, record: dict[str, Any]) -> None:
        """A record of metrics.jsonl."""
        if self._writer is not None:
            with self._told():
                self._log(record)

    def flush(self) -> None:
        if self._writer is not None:
            with self._told():
                self._writer.flush()

    def close(self) -> None:
        if self._writer is not None:
            with self._told():
                self._writer.close()
        self._writer = None

    def _log(self, record: dict[str, Any]) -> None:
        step = record["step"]
        for tag, value in board_scalars(record):
            self._writer.add_scalar(tag, value, step)
        for tag, value in timing_scalars(record.get("timing", {})):
            self._writer.add_scalar(tag, value, record["timing"]["step"])
        if step % self._histogram_every == 0:
            for layer in record.get("layers", []):
                for name in _HISTOGRAMS:
                    self._log_bars(f"{_tag(layer)}/{name}", layer[name], step)

    def _log_bars(self, tag: str, heights: list[int], step: int) -> None:
        """A bar for each expert, place, class or pool, as high as its count."""
        self._writer.add_histogram_raw(
            tag,
            min=0,
            max=len(heights),
            num=sum(heights),
            sum=sum(index * height for index, height in enumerate(heights)),
            sum_squares=sum(index**2 * height for index, height in enumerate(heights)),
            bucket_limits=list(range(1, len(heights) + 1)),
            bucket_counts=heights,
            global_step=step,
        )

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Errors of all kinds: a thread of the library writes, and hands on what it met."""
        try:
            yield
        except Exception as error:
            self._writer = None
            self._say(f"warning: {self._folder} is no longer written ({error}); metrics.jsonl has everything")


def board_scalars(record: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """The TensorBoard tag and value of each number in a record."""
    for name, value in record.items():
        if name == "step" or not isinstance(value, int | float):
            continue
        split, _, what = name.partition("_")
        if split in ("validation", "test"):
            yield f"{split}/{what}", value
        elif name in SYSTEM:
            yield f"system/{name}", value
        else:
            yield f"{'moe' if name in _MOE else 'train'}/{name}", value
    for path, loss in record.get("validation_loss_by_corpus", {}).items():
        yield f"validation/loss_by_corpus/{path}", loss
    for layer in record.get("layers", []):
        for name in ("drop_rate", "load_max_over_mean", "entropy"):
            yield f"{_tag(layer)}/{name}", layer[name]
        yield f"{_tag(layer)}/over_budget_rows", sum(layer["over_budget_by_pool"])


def timing_scalars(timing: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """Of `timing` in a record: seconds of each part; of the slowest rank its number, and by how much it is slower than
    the median in parts of its own."""
    for name, value in timing.items():
        if name == "slowest":
            yield "time/slowest_rank", value["rank"]
            if value["median_own"]:
                yield "time/slowest_over_median", value["own"] / value["median_own"]
        elif name != "step":
            yield f"time/{name}", value


def _tag(row: dict[str, Any]) -> str:
    """Of a row of `layers`: a block can have experts in its feed-forward and in its attention."""
    return f"moe/{'attention' if row['kind'] == 'attention' else 'layer'}_{row['layer']}"
