"""`moe-dist study export`: the ledger and the measurements of a study as tables, for other tools.

ledger: a row for each attempt that ended; what is nested has dotted names (axes.model.moe.top_k, versions.torch), a
list is JSON. measurements: tidy, one number a row,

    point | an axis each | seed | fraction | step | layer | kind | measure | index | value

where layer, kind and index are null of the whole model and of single numbers; a number that is null has no row. A
column of an axis, and of the ledger, is of one type: booleans, integers of 64 bits, numbers, or text as YAML spells it.

Parquet needs pyarrow (the extra `study`); JSONL nothing. A point is written before the next is read, in Parquet as a
row group of its own, so that memory does not grow with the study. Only points that the ledger calls finished have
measurements.

Legend: N rows.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Literal, Protocol, Self

import numpy as np

from moe_dist.config.extras import install
from moe_dist.disk import replacing
from moe_dist.study.design.grid import Point, Study, show
from moe_dist.study.ledger.columns import Columns, read_columns
from moe_dist.study.ledger.ledger import Ledger
from moe_dist.study.ledger.measurements import FILE

Format = Literal["parquet", "jsonl"]
Kind = Literal["bool", "int", "float", "text"]
"""Of the values of a column; each may be null."""
Schema = Mapping[str, Kind]
_PLACE: Schema = {"fraction": "float", "step": "int", "layer": "int", "kind": "text"}
_MEASURED: Schema = {"measure": "text", "index": "int", "value": "float"}
_TOO_LARGE = 2**63  # for a column of integers; FLOPs of a run may be


@dataclass(frozen=True)
class Block:
    """`length` rows. columns: what each has; same: what all of them have."""

    length: int
    columns: Mapping[str, Sequence[Any] | np.ndarray]
    same: Mapping[str, Any]


class Writer(Protocol):
    """Writes blocks to a file; a context, which completes the file when it is left."""

    def __init__(self, file: BinaryIO, schema: Schema) -> None: ...

    def write(self, blocks: Sequence[Block]) -> None:
        """Of at least one row in all."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None: ...


def export(study: Study, form: Format, folder: Path) -> list[Path]:
    """Writes ledger.FORM and measurements.FORM into `folder`, each as a whole or not at all; returns their paths.

    Raises ValueError where no point has finished, a file cannot be read, or pyarrow is missing.
    """
    writer = _parquet() if form == "parquet" else JsonLines
    ledger = Ledger(study.ledger)
    records, latest, seeds = ledger.records(), ledger.latest(), {point.name: point.seed for point in study.points}
    points = [point for point in study.points if latest.get(point.name, {}).get("status") == "finished"]
    if not points:
        raise ValueError(f"{study.ledger}: no point has finished yet; start `moe-dist study run` first")
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.{form}" for name in ("ledger", "measurements")]
    _write_ledger(writer, paths[0], [dict(_flat(_numbered(record, seeds))) for record in records])
    _write_measurements(writer, paths[1], points)
    return paths


def tidy(measured: Columns) -> Iterator[Block]:
    """One block for each measure, fraction after fraction, layer after layer."""
    fraction_N, step_N = measured.model["fraction"], measured.model["step"].astype(np.int64)
    for name, value_N in measured.model.items():
        if name not in ("fraction", "step"):
            yield _block(fraction_N, step_N, value_N, {"layer": None, "kind": None, "measure": name, "index": None})
    for kind, arrays in measured.layers.items():
        for name, values in arrays.items():
            if name == "layer":
                continue
            size = values.shape
            spread = [array.reshape(-1, *[1] * (values.ndim - 1)) for array in (fraction_N, step_N)]
            layer = arrays["layer"].reshape(-1, *[1] * (values.ndim - 2))
            columns = {"layer": np.broadcast_to(layer, size)}
            same: dict[str, Any] = {"kind": kind, "measure": name}
            if values.ndim == 3:
                columns["index"] = np.broadcast_to(np.arange(size[2]), size)
            else:
                same["index"] = None
            fraction, step = (np.broadcast_to(array, size) for array in spread)
            yield _block(fraction, step, values, same, **columns)


def _block(
    fraction: np.ndarray, step: np.ndarray, values: np.ndarray, same: Mapping[str, Any], **columns: np.ndarray
) -> Block:
    known = np.isfinite(values)
    whole = {"fraction": fraction, "step": step, **columns, "value": values.astype(np.float64)}
    return Block(int(known.sum()), {name: array[known] for name, array in whole.items()}, same)


def _write_ledger(writer: type[Writer], path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    names = dict.fromkeys(chain.from_iterable(rows))
    schema = {name: kind_of(row.get(name) for row in rows) for name in names}
    columns = {name: [as_kind(row.get(name), kind) for row in rows] for name, kind in schema.items()}
    with replacing(path) as file, writer(file, schema) as table:
        table.write([Block(len(rows), columns, {})])


def _write_measurements(writer: type[Writer], path: Path, points: Sequence[Point]) -> None:
    keys = dict.fromkeys(chain.from_iterable(point.axes for point in points))
    axes = {key: kind_of(point.axes.get(key) for point in points) for key in keys}
    schema: Schema = {"point": "text", **axes, "seed": "int", **_PLACE, **_MEASURED}
    with replacing(path) as file, writer(file, schema) as table:
        for point in points:
            own = {key: as_kind(point.axes.get(key), kind) for key, kind in axes.items()}
            same = {"point": point.name, **own, "seed": point.seed}
            blocks = [replace(block, same={**same, **block.same}) for block in tidy(_measured(point))]
            if any(block.length for block in blocks):
                table.write(blocks)


def _measured(point: Point) -> Columns:
    path = point.folder / FILE
    try:
        return read_columns(path)
    except FileNotFoundError:
        raise ValueError(
            f"{path} is missing, which an older version did not write: take the point's line out of the ledger, and "
            "`moe-dist study run` measures it again"
        ) from None


def _numbered(record: Mapping[str, Any], seeds: Mapping[str, int]) -> dict[str, Any]:
    """With the seed's number as the study has it now; as it was of a point that the study no longer has."""
    return {**record, "seed": seeds.get(record["point"], record.get("seed"))}


def _flat(record: Mapping[str, Any], home: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in record.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{home}{name}.")
        else:
            yield home + name, json.dumps(value) if isinstance(value, list) else value


def kind_of(values: Iterable[Any]) -> Kind:
    """The narrowest kind that all of the values are, nulls aside."""
    known = [value for value in values if value is not None]
    types = {type(value) for value in known}
    if types == {int} and all(-_TOO_LARGE <= value < _TOO_LARGE for value in known):
        return "int"
    if types <= {int, float}:
        return "float"
    return "bool" if types == {bool} else "text"


def as_kind(value: Any, kind: Kind) -> Any:
    """A value of a column of that kind, as `kind_of` found it."""
    if value is None or kind in ("bool", "int"):
        return value
    return float(value) if kind == "float" else show(value)


class JsonLines:
    """One JSON object a line."""

    def __init__(self, file: BinaryIO, schema: Schema) -> None:
        self._file, self._names = file, list(schema)

    def write(self, blocks: Sequence[Block]) -> None:
        for block in blocks:
            columns = {name: np.asarray(c, object).tolist() for name, c in block.columns.items()}
            for number in range(block.length):
                row = {name: columns[name][number] if name in columns else block.same[name] for name in self._names}
                self._file.write(json.dumps(row, allow_nan=False).encode() + b"\n")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None: ...


def _parquet() -> type[Writer]:
    """Raises ValueError where pyarrow is missing."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise ValueError(
            f"Parquet is written by pyarrow, which is not installed: {install('study')}; or export with --jsonl"
        ) from None
    types = {"bool": pa.bool_(), "int": pa.int64(), "float": pa.float64(), "text": pa.string()}

    class Parquet:
        """Each `write` is one row group."""

        def __init__(self, file: BinaryIO, schema: Schema) -> None:
            self._schema = pa.schema([(name, types[kind]) for name, kind in schema.items()])
            self._writer = pq.ParquetWriter(file, self._schema, compression="zstd")

        def write(self, blocks: Sequence[Block]) -> None:
            table = pa.concat_tables([self._table(block) for block in blocks])
            self._writer.write_table(table, row_group_size=table.num_rows)

        def _table(self, block: Block) -> pa.Table:
            arrays = [
                pa.array(block.columns[field.name], field.type)
                if field.name in block.columns
                else pa.repeat(pa.scalar(block.same[field.name], field.type), block.length)
                for field in self._schema
            ]
            return pa.Table.from_arrays(arrays, schema=self._schema)

        def __enter__(self) -> Self:
            return self

        def __exit__(
            self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
        ) -> None:
            self._writer.close()

    return Parquet
