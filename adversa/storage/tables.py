"""How each noun lies on disk: Parquet parts with a fixed schema, written whole or not at all."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from adversa.curate.filter import Verdict
from adversa.storage.files import replace_bytes
from adversa.storage.path import StoragePath, asking, source
from adversa.types import Example, GenerationRequest, HardCase, SyntheticImage, UserError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

MOST_PIXELS = (
    1 << 26
    # of a picture in a table: far more than any that adversa writes (sheets of samples are the
    # largest)
)

# Small row groups, so that one image can be read without decoding thousands of neighbours.
ROW_GROUP = 256
# looks into parts on an object store: each waits tens of milliseconds for two answers or three
AT_ONCE = 16
T = TypeVar("T")

_text, _int, _real = pa.string(), pa.int64(), pa.float64()
_ARROW = {  # annotation of a dataclass -> type of its column
    "str": _text,
    "int": _int,
    "float": _real,
    "bool": pa.bool_(),
    "bytes": pa.binary(),
    "dict[str, str]": pa.map_(_text, _text),
}


def _schema(noun: type) -> pa.Schema:
    """A column for each field of a dataclass."""
    fields = dataclasses.fields(noun)
    return pa.schema({f.name: _ARROW[str(f.type).removesuffix(" | None")] for f in fields})


EXAMPLES = _schema(Example)
HARD_CASES = _schema(HardCase)
REQUESTS = _schema(GenerationRequest)
SYNTHETIC = _schema(SyntheticImage)
VERDICTS = _schema(Verdict)
LEVELS = pa.schema({"example": _text, "sigma_start": _real, "agreement": _real})
# Of real images, once a run: embeddings of two classifiers of different architecture, and each
# verifier's p[label]. Of `test`, which is not opened yet, the classifier's alone, for the near-copy
# check: no label, no verifier.
FEATURES = pa.schema(
    {
        "id": _text,
        "label": _int,
        "group": _text,
        "classifier": pa.list_(pa.float32()),
        "judge": pa.list_(pa.float32()),
        "agreement": pa.list_(pa.float32()),
    }
)
# A row with b for each pair; one without for each image whose pairs were looked for.
TWINS = pa.schema({"a": _text, "b": _text, "similarity": _real})
MIX = pa.schema({"id": _text, "kind": _text, "label": _int, "weight": _real})
# One row an image and a classifier. `logits` has one entry a class, `embedding` is empty where it
# was not asked for.
PREDICTIONS = pa.schema(
    {
        "id": _text,
        "arm": _text,
        "seed": _int,
        "label": _int,
        "group": _text,
        "logits": pa.list_(pa.float32()),
        "embedding": pa.list_(pa.float32()),
    }
)


def latents_schema(views: int, channels: int, side: int) -> pa.Schema:
    """Of the latents of `views` symmetries of each image, as the codec gives them: `latent` is
    float16 [views, C, side, side].
    """
    return pa.schema(
        {
            "id": _text,
            "label": _int,
            "latent": pa.fixed_shape_tensor(pa.float16(), (views, channels, side, side)),
        }
    )


def latents_table(ids: Sequence[str], labels: Sequence[int], latents: np.ndarray) -> pa.Table:
    """float16 [N, views, C, side, side] to rows of latents_schema."""
    assert latents.dtype == np.float16 and latents.ndim == 5, (latents.dtype, latents.shape)
    schema = latents_schema(latents.shape[1], latents.shape[2], latents.shape[3])
    kind = schema.field("latent").type
    flat = pa.FixedSizeListArray.from_arrays(
        pa.array(latents.reshape(-1)), int(np.prod(latents.shape[1:]))
    )
    return pa.table(
        [list(ids), pa.array(labels, pa.int64()), pa.ExtensionArray.from_storage(kind, flat)],
        schema=schema,
    )


def decode_latents(column: pa.ChunkedArray) -> np.ndarray:
    """A column of latents to float16 [N, views, C, side, side]."""
    latents: np.ndarray = column.combine_chunks().to_numpy_ndarray()
    return latents


def part_name(index: int) -> str:
    return f"part-{index:05d}.parquet"


def write_parts(
    folder: StoragePath,
    rows: Iterable[DataclassInstance],
    size: int,
    schema: pa.Schema,
    first: int = 0,
) -> int:
    """How many rows were written, `size` a part from part `first` on; one part is in memory at a
    time.
    """
    rows, total = iter(rows), 0
    while chunk := list(itertools.islice(rows, size)):
        write_part(folder / part_name(first + total // size), to_table(chunk, schema))
        total += len(chunk)
    return total


def to_table(rows: Iterable[DataclassInstance], schema: pa.Schema) -> pa.Table:
    """Dataclasses (of the noun the schema is for) to a table."""
    return pa.Table.from_pylist(
        [{f.name: getattr(r, f.name) for f in dataclasses.fields(r)} for r in rows], schema=schema
    )


def write_part(path: StoragePath, table: pa.Table) -> None:
    """Commit one part, whole or not at all: a failed write leaves nothing behind."""
    buffer = pa.BufferOutputStream()
    pq.write_table(table, buffer, row_group_size=ROW_GROUP, compression="zstd")
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_bytes(path, memoryview(buffer.getvalue()))


def parts(folder: StoragePath) -> list[StoragePath]:
    """The committed parts of a folder, in the order of their numbers."""
    found = (p for p in folder.glob("*.parquet") if not p.name.startswith("."))
    return sorted(found, key=lambda p: (len(p.name), p.name))  # part-100000 comes after part-99999


def each(look: Callable[[StoragePath], T], paths: Sequence[StoragePath]) -> list[T]:
    """What `look` gives of each path, in order; on an object store AT_ONCE of them wait for their
    answers at the same time.
    """
    if not paths or isinstance(paths[0], Path):
        return [look(p) for p in paths]
    looks = [partial(copy_context().run, look, p) for p in paths]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return [waiting.result() for waiting in [pool.submit(call) for call in looks]]


def read_part(
    path: StoragePath, columns: Sequence[str] | None = None, filters: Any = None
) -> pa.Table:
    """The rows of one part; filters: of pyarrow.parquet.read_table."""
    with _reading(path), asking(path):
        table = pq.read_table(
            source(path), columns=list(columns) if columns else None, filters=filters
        )
        _check_types(table.schema, path)
        return table


def count(path: StoragePath) -> int:
    """The rows of one part, from its end alone."""
    with _reading(path), asking(path):
        rows: int = pq.read_metadata(source(path)).num_rows
        return rows


@contextlib.contextmanager
def opened(path: StoragePath, data: bytes | None = None) -> Iterator[pq.ParquetFile]:
    """A part to read from group by group. data: all of it, where it has been read."""
    with (
        _reading(path),
        asking(path),
        pq.ParquetFile(
            pa.BufferReader(data) if data is not None else source(path),
            pre_buffer=not isinstance(path, Path),
        ) as file,
    ):
        _check_types(file.schema_arrow, path)
        yield file


@contextlib.contextmanager
def _reading(path: StoragePath) -> Iterator[None]:
    """UserError for a part that is no Parquet, or is torn; a file that is missing stays what it
    is.
    """
    try:
        yield
    except (pa.ArrowException, OSError, ValueError) as e:
        if isinstance(e, UserError) or getattr(e, "errno", None) is not None:
            raise
        raise UserError(
            f"{path} is damaged, or no Parquet file ({' '.join(str(e).split())[:200]}); "
            "delete it, or make it anew"
        ) from None


PLAIN = frozenset({"arrow.fixed_shape_tensor"})  # the extension types that adversa writes


def _check_types(schema: pa.Schema, path: StoragePath) -> None:
    """UserError for a column of a type that a library adds to Arrow: Ray's `arrow_pickled_object`
    unpickles each value it shows.
    """
    for field in schema:
        if strange := [
            t
            for t in _types(field.type)
            if isinstance(t, pa.BaseExtensionType) and t.extension_name not in PLAIN
        ]:
            raise UserError(
                f"{path}: column {field.name!r} is of type {strange[0].extension_name}, "
                "which adversa never writes; not read"
            )


def _types(kind: pa.DataType) -> Iterator[pa.DataType]:
    yield kind
    if isinstance(kind, pa.BaseExtensionType):
        yield from _types(kind.storage_type)
    elif pa.types.is_dictionary(kind):
        yield from _types(kind.value_type)
    else:
        for i in range(kind.num_fields):
            yield from _types(kind.field(i).type)


def batches(
    path: StoragePath, columns: Sequence[str] | None = None, size: int = ROW_GROUP
) -> Iterator[pa.RecordBatch]:
    """The rows of one part, `size` at a time."""
    with opened(path) as file:
        yield from file.iter_batches(size, columns=list(columns) if columns else None)


def read(
    folder: StoragePath, columns: Sequence[str] | None = None, schema: pa.Schema | None = None
) -> pa.Table:
    """All rows of a folder, parts in order. An empty folder gives an empty table of `schema`
    (required then).
    """
    tables = each(lambda p: read_part(p, columns), parts(folder))
    if tables:
        return pa.concat_tables(tables)
    if schema is None:
        raise FileNotFoundError(f"no parquet parts in {folder}")
    return schema.empty_table().select(list(columns)) if columns else schema.empty_table()


def encode_png(image: np.ndarray) -> bytes:
    """uint8 [H, W, 3] or [H, W] to PNG (lossless)."""
    assert image.dtype == np.uint8, image.dtype
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG", compress_level=4)
    return buffer.getvalue()


def decode_png(data: bytes) -> np.ndarray:
    """The inverse of `encode_png`. UserError for what is no PNG (of other formats one starts a
    program), or would fill memory.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=("PNG",))
        if image.width * image.height > MOST_PIXELS:
            raise UserError(
                f"a picture of {image.width} x {image.height} pixels in a run's table: "
                "adversa writes none so large"
            )
        return np.asarray(image)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as e:
        if isinstance(e, UserError):
            raise
        raise UserError(
            "a picture in a run's table is no PNG that can be read "
            f"({' '.join(str(e).split())[:100]})"
        ) from None


def decode_images(column: pa.ChunkedArray | Sequence[bytes]) -> np.ndarray:
    """A column of PNGs of one size to uint8 [N, H, W, 3] (or [N, H, W] for masks)."""
    data = column.to_pylist() if isinstance(column, pa.ChunkedArray | pa.Array) else column
    return np.stack([decode_png(d) for d in data])
