"""What an engine keeps of a rank's parameters: weights, masters, gradients and moments, to the byte.

a: bytes of a number that is computed with. n: elements of the rank, n_g of one of the optimizer's groups, which d_g
ranks hold alike (dp, or edp for experts); ZeRO-1 and 2 lay a group end to end and fill it up to a multiple of 2 d_g,
q_g each, ZeRO-3 cuts every tensor into d_g equal parts, p in sum (engine/deepspeed_state.py).

| engine     | weights | masters (fp32)  | gradients before the update        | moments      |
|------------|---------|-----------------|------------------------------------|--------------|
| native     | a n     | 4 n in bf16     | 4 n                                | 8 n          |
| ZeRO-0     | 4 n     |                 | 4 n                                | 8 n          |
| ZeRO-1, 2  | a d q   | 4 q             | of the tensors that q touches, 4   | 8 q          |
| bf16, 1    | a d q   | 4 q             | 4 d q, and 2 n of the last backward | 8 q         |
| bf16, 2    | a d q   | 4 q             | 4 q                                | 8 q          |
| ZeRO-3     | a p     | 4 p             | 4 p                                | 8 p          |

That is of what is trained. A frozen parameter (train.freeze) has its weight alone: a n, in bf16 with a copy in fp32,
4 n; under ZeRO-3 its part of both. FLOPs, and the traffic of ZeRO-3, are counted as if it were trained.

Every tensor that Adam knows has a count of its steps, 4 bytes: all parameters, under ZeRO one for each group.

What passes: a native engine makes the gradients that ranks exchange bucket by bucket, as the first of each comes.
ZeRO-1 and 2 copy gradients into a bucket of a fixed size, or one of two where they leave during backward, exchange a
copy of it, and join the partition for Adam, whose loop on CPU makes two copies of what it updates, and whose kernel on
a GPU one. ZeRO-3 has a bucket all the time, and weights gathered: as DeepSpeed keeps what is used again within a
billion elements, those of a smaller model all at once.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from moe_dist.config import Config
from moe_dist.engine.base import compute_dtype
from moe_dist.engine.exchange import zero_bucket
from moe_dist.moe.experts import expert_widths
from moe_dist.parallel.mesh import Layout
from moe_dist.plan.held import Held

WHOLE = 500_000_000
"""Elements that DeepSpeed's stage 0, and its optimizer of bf16, exchange at a time."""
SUB_GROUP = 1_000_000_000
"""Elements of a group that ZeRO-3 updates at once."""
GATHERED = 1_000_000_000
"""Elements of gathered weights that ZeRO-3 keeps for their next use."""
_ALIGNED = 2


@dataclass(frozen=True, slots=True)
class States:
    """Bytes on one rank from the end of the last backward pass to the update, and what comes and goes around that.

    accumulated: gradients that are there while the last micro-step runs. made: bytes of a gradient's element when it is
    made. each: of those that stay in place until the end of the backward pass. shared: bytes that hold all finished
    gradients from the first exchange on, where they do not stay in place. standing: workspace of the whole step.
    bucket: workspace of a backward pass. bucket_elements: None, or after how many finished ones there is an exchange
    within it, which takes `exchanged` bytes for each of them for a moment. lot: elements that are made together, of the
    `lots` that are; 0: each on its own. exchange: workspace after backward, with
    `joined` bytes of gradients. update: workspace of the update.
    """

    parameters: int
    gradients: int
    optimizer: int
    accumulated: int = 0
    made: int = 4
    each: int = 0
    shared: int = 0
    standing: int = 0
    bucket: int = 0
    bucket_elements: int | None = None
    exchanged: int = 0
    lot: int = 0
    lots: int = 0
    joined: int = 0
    exchange: int = 0
    update: int = 0

    def staying(self, done: int) -> int:
        """Bytes of gradients in place when `done` elements have theirs, and the next one comes."""
        if not self.lot:
            return self.accumulated + self.each * done
        begun = min(self.lots, (done // self.lot + 1) * self.lot)
        return self.accumulated + self.each * max(done, begun)

    @property
    def total(self) -> int:
        """Of what is there in full before an update."""
        return self.parameters + self.gradients + self.optimizer


def states(config: Config, layout: Layout, held: Held, rank: int = 0, *, device_type: str = "cuda") -> States:
    """Of the engine that the configuration names. held: of this rank."""
    engine = config.engine
    if engine.name == "native":
        return _native(config, layout, held)
    return (_zero0, _zero1, _zero2, _zero3)[engine.zero_stage](config, layout, held, rank, 1 + (device_type == "cpu"))


def _native(config: Config, layout: Layout, held: Held) -> States:
    low, mib = config.engine.precision == "bf16", config.engine.bucket_mib
    trained = held.trained
    n = trained.elements
    each, accumulates = compute_dtype(config.engine.precision).itemsize, _accumulates(config, layout)
    reduced = sum(count for count, ranks in ((trained.dense, layout.dp), (trained.expert, layout.edp)) if ranks > 1)
    lot = min(reduced, zero_bucket(config.engine) if mib is not None and not config.engine.cuda_graph else reduced)
    return States(
        parameters=held.elements * (each + (4 if low else 0)),
        gradients=4 * n,
        optimizer=8 * n + 4 * len(trained.tensors),
        accumulated=4 * n if accumulates else 0,
        made=each,
        each=0 if accumulates else 4,
        lot=0 if accumulates else lot,
        lots=reduced,
        joined=4 * n,
    )


def _zero0(config: Config, layout: Layout, held: Held, rank: int, copies: int) -> States:
    """DeepSpeed keeps parameters as they are; torch's AdamW updates tensor by tensor on CPU, all at once on a GPU."""
    trained, accumulates = held.trained, _accumulates(config, layout)
    n, largest = trained.elements, max(tensor.elements for tensor in trained.tensors)
    return States(
        parameters=4 * held.elements,
        gradients=4 * n,
        optimizer=8 * n + 4 * len(trained.tensors),
        accumulated=4 * n if accumulates else 0,
        each=0 if accumulates else 4,
        joined=4 * n,
        exchange=4 * max(min(trained.dense, WHOLE) * (layout.dp > 1), min(trained.expert, WHOLE) * (layout.edp > 1)),
        update=4 * (2 * largest if copies == 2 else n),
    )


def _zero1(config: Config, layout: Layout, held: Held, rank: int, copies: int) -> States:
    if config.engine.precision == "bf16":
        return _zero1_low(config, layout, held, copies)
    n, q, accumulates = held.trained.elements, list(_parts(held, layout)), _accumulates(config, layout)
    touched, overlap = 4 * _touched(held, layout, rank), config.engine.bucket_mib is not None
    bucket = zero_bucket(config.engine)
    return States(
        parameters=4 * (sum(count * ranks + count for count, ranks in q) + held.elements - n),
        gradients=touched,
        optimizer=8 * sum(count for count, _ in q) + 4 * len(q),
        accumulated=4 * n if accumulates else 0,
        each=0 if accumulates or overlap else 4,
        shared=touched if overlap and not accumulates else 0,
        bucket=4 * bucket * _buffers(config),
        bucket_elements=bucket if overlap else None,
        exchanged=4,
        joined=touched if overlap else 4 * max(0, n - bucket),
        exchange=4 * bucket * _buffers(config) + (4 * min(n, bucket) if overlap else max(4 * min(n, bucket), touched)),
        update=4 * (1 + copies) * max(count for count, _ in q),
    )


def _zero1_low(config: Config, layout: Layout, held: Held, copies: int) -> States:
    """DeepSpeed's BF16_Optimizer: all gradients in fp32 too, on every rank."""
    n, q = held.trained.elements, list(_parts(held, layout))
    whole = sum(count * ranks for count, ranks in q)
    dense = [count * ranks for (count, ranks), (expert, _) in zip(q, held.groups(), strict=True) if not expert]
    return States(
        parameters=2 * whole + 4 * sum(count for count, _ in q) + 6 * (held.elements - n),
        gradients=4 * whole + 2 * n,
        optimizer=8 * sum(count for count, _ in q) + 4 * len(q),
        made=2,
        accumulated=4 * whole + (2 * n if _accumulates(config, layout) else 0),
        each=0 if _accumulates(config, layout) else 2,
        joined=4 * whole + 2 * n,
        exchange=4 * sum(dense) if len(dense) > 1 and layout.dp > 1 and sum(dense) <= WHOLE else 0,
        update=4 * copies * max(count for count, _ in q),
    )


def _zero2(config: Config, layout: Layout, held: Held, rank: int, copies: int) -> States:
    n, q, low = held.trained.elements, list(_parts(held, layout)), config.engine.precision == "bf16"
    each = compute_dtype(config.engine.precision).itemsize
    owned = 4 * (sum(count for count, _ in q) if low else _touched(held, layout, rank))
    joined = 0 if low else 4 * max(count for count, _ in q)
    bucket = zero_bucket(config.engine)
    return States(
        parameters=sum(each * count * ranks + 4 * count for count, ranks in q)
        + (held.elements - n) * (each + (4 if low else 0)),
        gradients=owned,
        optimizer=8 * sum(count for count, _ in q) + 4 * len(q),
        accumulated=owned if _accumulates(config, layout) else 0,
        made=each,
        shared=0 if low and _accumulates(config, layout) else owned,
        bucket=each * bucket * _buffers(config),
        bucket_elements=bucket,
        exchanged=6 if low else 4,
        joined=owned,
        exchange=each * bucket * _buffers(config) + (6 if low else 4) * min(n, bucket),
        update=joined + 4 * copies * max(count for count, _ in q),
    )


def _zero3(config: Config, layout: Layout, held: Held, rank: int, copies: int) -> States:
    low, each = config.engine.precision == "bf16", compute_dtype(config.engine.precision).itemsize
    even = layout.expert_ranks == 1 or len(set(expert_widths(config.model.moe, config.model.d_ff))) <= 1
    parts = [[-(-size // _ranks(expert, layout)) for size in sizes] for expert, sizes in held.groups()]
    p, sub_groups = sum(map(sum, parts)), [sub for group in parts for sub in _sub_groups(group, even)]
    still = sum(-(-tensor.elements // _ranks(tensor.expert, layout)) for tensor in held.tensors if not tensor.trained)
    cut = [tensor.elements for tensor in held.tensors if _ranks(tensor.expert, layout) > 1]  # others lie there whole
    gathered = min(sum(cut), GATHERED) if even else max(cut, default=0)
    bucket = zero_bucket(config.engine)
    return States(
        parameters=(each + 4) * p + (each + (4 if low else 0)) * still,
        gradients=4 * p,
        optimizer=8 * p + 4 * len(sub_groups),
        accumulated=4 * p,
        made=each,
        standing=4 * bucket,
        bucket=each * gathered,
        bucket_elements=bucket,
        exchanged=8 if low else 4,
        joined=4 * p,
        exchange=each * gathered + (8 if low else 4) * min(held.trained.elements, bucket),
        update=4 * (1 + copies) * max(sub_groups),
    )


def _buffers(config: Config) -> int:
    """Buckets of stages 1 and 2: one is filled while the other is exchanged."""
    return 1 if config.engine.bucket_mib is None else 2


def _accumulates(config: Config, layout: Layout) -> bool:
    train = config.train
    if train.micro_batch is not None:
        return train.global_batch > train.micro_batch * layout.dp
    return (train.accumulation or 1) > 1


def _ranks(expert: bool, layout: Layout) -> int:
    return layout.edp if expert else layout.dp


def _parts(held: Held, layout: Layout) -> Iterator[tuple[int, int]]:
    """(elements of a rank's part, number of parts) of each group under ZeRO-1 and 2."""
    for expert, sizes in held.groups():
        ranks = _ranks(expert, layout)
        yield -(-sum(sizes) // (_ALIGNED * ranks)) * _ALIGNED, ranks


def _touched(held: Held, layout: Layout, rank: int) -> int:
    """Elements of the tensors of which `rank` has something in its parts, whole; and those that fill up a part."""
    total = 0
    for (expert, sizes), (part, _) in zip(held.groups(), _parts(held, layout), strict=True):
        place = layout.ranks("edp" if expert else "dp", rank).index(rank)
        first, last, start = place * part, (place + 1) * part, 0
        for size in sizes:
            if start < last and start + size > first:
                total += size
            start += size
        total += max(0, last - max(first, start))
    return total


def _sub_groups(sizes: list[int], even: bool) -> list[int]:
    """ZeRO-3 updates as many tensors at once as fill a sub-group."""
    found, current = [], 0
    for size in sizes:
        current += size
        if even and current >= SUB_GROUP:
            found.append(current)
            current = 0
    return found + ([current] if current else [])
