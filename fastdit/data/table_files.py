"""Read tables with pyarrow: parquet files, and Arrow files as `datasets` saves them.

A table is a sequence of chunks of rows, which are the row groups of a parquet file or the record batches of an Arrow
file. Files are read from memory maps. An Arrow file is not compressed, so its images are views of the map. A row group
of a parquet file must be decoded as a whole.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fastdit.data.shards import map_file
from fastdit.errors import UserError
from fastdit.files import stand_in

_AGAIN = "copy or download it again"
_MAGIC = b"PAR1"  # at both ends of a parquet file
_RANDOM_ACCESS = b"ARROW1"  # first bytes of Arrow's file format; the stream format has none


class Images(NamedTuple):
    """Hold the encoded images of a chunk of n rows.

    Args:
        data: the bytes of the images, uint8 (size,).
        offsets: where each image begins, and where the last one ends, int32 or int64 (n + 1,).
        null: whether a row has no image, bool (n,); None if all have one.
    """

    data: np.ndarray
    offsets: np.ndarray
    null: np.ndarray | None


class ArrowTable:
    """Read an Arrow file.

    Attributes:
        schema: names, types and metadata of the columns.
        sizes: the number of rows of each chunk.
    """

    def __init__(self, path: Path, data: np.ndarray):
        """Read the headers of the file at `path`, whose bytes are `data`, uint8 (size,)."""
        self.path, self._data = path, data
        buffer = pa.py_buffer(data)
        with _explained(path):
            if data[:6].tobytes() == _RANDOM_ACCESS:
                reader = pa.ipc.open_file(buffer)
                self._batches = [reader.get_batch(k) for k in range(reader.num_record_batches)]
            else:
                reader = pa.ipc.open_stream(buffer)
                self._batches = list(reader)
                if data[-4:].any():  # every writer ends a stream with zeros
                    raise pa.ArrowInvalid("no end-of-stream mark")
            for batch in self._batches:
                batch.validate()
        self.schema: pa.Schema = reader.schema
        self.sizes = [batch.num_rows for batch in self._batches]

    def column(self, name: str) -> pa.ChunkedArray:
        """Return a column of all rows."""
        return pa.chunked_array([batch.column(name) for batch in self._batches], self.schema.field(name).type)

    def images(self, chunk: int, name: str) -> Images:
        """Return the images in column `name` of a chunk. Raises UserError if the file is compressed."""
        images = _images(self._batches[chunk].column(name))
        begin, address = self._data.ctypes.data, images.data.ctypes.data
        if len(images.data) and not begin <= address < begin + len(self._data):
            raise UserError(f"{self.path}: is compressed, and Arrow files are read in place; save it uncompressed")
        return images

    def nulls(self, chunk: int, name: str) -> int | None:
        """Return the number of rows of a chunk without an image."""
        null = self.images(chunk, name).null
        return 0 if null is None else int(null.sum())

    def decoded_bytes(self, chunk: int, name: str) -> int:
        """Return the memory that the images of a chunk take, beside the memory map."""
        return 0


class ParquetTable:
    """Read a parquet file. Attributes and methods are those of ArrowTable."""

    def __init__(self, path: Path, data: np.ndarray):
        self.path = path
        with _explained(path):
            # Without threads and buffers ahead, which a forked worker would lack.
            buffer = pa.BufferReader(pa.py_buffer(data))
            self._file = pq.ParquetFile(buffer, pre_buffer=False, page_checksum_verification=True)
        self.schema = self._file.schema_arrow
        metadata = self._file.metadata
        self.sizes = [metadata.row_group(k).num_rows for k in range(metadata.num_row_groups)]

    def column(self, name: str) -> pa.ChunkedArray:
        """Return a column of all rows. Raises UserError if it is damaged."""
        with _explained(self.path, f"its column {name}"):
            return self._file.read(columns=[name], use_threads=False).column(name)

    def images(self, chunk: int, name: str) -> Images:
        """Decode the images in column `name` of a row group. Raises UserError if they are damaged."""
        with _explained(self.path, f"row group {chunk}"):
            table = self._file.read_row_group(chunk, columns=[self._leaf(name)], use_threads=False)
            return _images(pa.concat_arrays([_binary(part) for part in table.column(name).chunks]))

    def nulls(self, chunk: int, name: str) -> int | None:
        """Return the number of rows of a row group without an image, or None if the file does not tell."""
        statistics = self._chunk(chunk, name).statistics
        return statistics.null_count if statistics is not None and statistics.has_null_count else None

    def decoded_bytes(self, chunk: int, name: str) -> int:
        """Return the memory that the images of a row group take when it is decoded."""
        return self._chunk(chunk, name).total_uncompressed_size

    def _leaf(self, name: str) -> str:
        """Return the path of the column of bytes within column `name`."""
        return f"{name}.bytes" if pa.types.is_struct(self.schema.field(name).type) else name

    def _chunk(self, chunk: int, name: str) -> pq.ColumnChunkMetaData:
        """Return the metadata of a row group's images."""
        group = self._file.metadata.row_group(chunk)
        columns = (group.column(k) for k in range(group.num_columns))
        return next(column for column in columns if column.path_in_schema == self._leaf(name))


Table = ArrowTable | ParquetTable


def open_table(path: Path) -> Table:
    """Open an Arrow or parquet file. Raises UserError if it is neither, or if its headers are damaged."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; {_AGAIN}")
    data = map_file(path)
    if not len(data):
        raise UserError(f"{path}: is empty; {_AGAIN}")
    if problem := stand_in(data[:512].tobytes()):
        raise UserError(f"{path}: {problem}")
    if data[:4].tobytes() == _MAGIC:
        if data[-4:].tobytes() != _MAGIC:
            raise UserError(f"{path}: is truncated (its last bytes are not those of a parquet file); {_AGAIN}")
        return ParquetTable(path, data)
    if path.suffix.lower() == ".parquet":
        raise UserError(f"{path}: is no parquet file (it begins with {data[:4].tobytes()!r}); {_AGAIN}")
    return ArrowTable(path, data)


def _binary(array: pa.Array) -> pa.Array:
    """Return a column of images, (n,) structs with a field `bytes` or plain bytes, as bytes with 64-bit offsets."""
    if pa.types.is_struct(array.type):
        array = array.flatten()[array.type.get_field_index("bytes")]  # null where the struct is
    return array.cast(pa.large_binary())


def _images(array: pa.Array) -> Images:
    """Return the images in a column, without a copy of their bytes."""
    array = _binary(array)
    _, offsets, data = array.buffers()
    return Images(
        np.frombuffer(data, np.uint8) if data is not None else np.empty(0, np.uint8),
        np.frombuffer(offsets, np.int64)[array.offset : array.offset + len(array) + 1],
        array.is_null().to_numpy(zero_copy_only=False) if array.null_count else None,
    )


@contextmanager
def _explained(path: Path, part: str = "") -> Iterator[None]:
    """Raise a UserError that names the file, and the part of it, if pyarrow cannot read it."""
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:100]
        where = f"{path}: {part}" if part else str(path)
        raise UserError(f"{where} cannot be read, perhaps truncated or damaged ({reason}); {_AGAIN}") from None
