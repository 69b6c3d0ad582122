"""Number the samples of a Hugging Face data set, which lie in tables with a column of images and one of labels.

Any image can be read at any time from Arrow files, which are mapped into memory. A parquet file must be decoded a row
group at a time. So a small set is decoded once, at opening, and of a large one the last few row groups are kept. That
suits reading in order, as encoding does. A shuffled run decodes a row group for nearly every image of a large set, and
`fastdit-data convert` writes shards for it.

Images a second, shuffled and in order, of 20,000 files of 3 kB (1 thread, AMD EPYC, pyarrow 26, snappy):
    shards                                          52,000    37,000
    Arrow                                           37,000    43,000
    parquet, small set                              40,000    44,000
    parquet, large set, row groups of 100 images     1,700    36,000
    parquet, large set, row groups of 1000 images      520    47,000
With files of 110 kB, row groups of 100 give 110 and 4,400, and shards 7,200 and 7,200.
"""

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fastdit.data.find_tables import left_out
from fastdit.data.tar_archives import Report, refuse
from fastdit.errors import UserError

if TYPE_CHECKING:
    from fastdit.data.table_files import Images, Table

_DECODED_BYTES = 1 << 29  # of a parquet set that is kept in memory as a whole
_KEPT = 4  # row groups of a larger set that are kept


class TableSamples:
    """Number the rows of some tables in the order of the tables and of their rows.

    Attributes:
        class_names: names of the classes in the order of their labels; empty if only the labels are known.
        labels: class labels, (n,) int64.
        notes: lines for the start of a run.
    """

    is_latent = False

    def __init__(
        self,
        source: str,
        paths: Sequence[Path],
        *,
        image_column: str | None = None,
        label_column: str | None = None,
        unlabeled: bool = False,
        report: Report = refuse,
        verify: bool = False,
    ):
        """Read the headers and labels of the tables.

        Args:
            source: the path that the user gave.
            paths: the files of the tables.
            image_column, label_column: names of the columns; None takes the only one that may be meant.
            unlabeled: whether a set without any label is taken, as one class.
            report: called for each row without an image or a label, which is left out if it returns.
            verify: whether to decode all row groups, and to report those that are damaged.

        Raises UserError if pyarrow is missing, if a file cannot be read, or if the columns are not clear.
        """
        try:
            from fastdit.data import table_columns, table_files
        except ModuleNotFoundError as error:
            if error.name != "pyarrow":
                raise
            problem = "pyarrow reads it, which is not installed; pip install 'fastdit[parquet]'"
            raise UserError(f"{paths[0]}: {problem}") from None

        # Open the tables, and number their chunks and rows.
        self._tables: list[Table] = []
        for path in paths:
            try:
                self._tables.append(table_files.open_table(path))
            except UserError as error:
                report(error)
        places = [(t, k) for t, table in enumerate(self._tables) for k, size in enumerate(table.sizes) if size]
        if not places:
            raise UserError(f"{source}: its tables (such as {paths[0].name}) hold no rows that can be read")
        self._table, self._chunk = np.array(places).T
        self._starts = np.cumsum([0, *(self._tables[t].sizes[k] for t, k in places)])
        self._first_rows = np.cumsum([0, *(sum(table.sizes) for table in self._tables)])
        self._rows = np.arange(self._starts[-1])

        # Choose the columns, and read the labels.
        first = self._tables[0]
        self._column = table_columns.choose_image_column(first, image_column)
        column = table_columns.choose_label_column(first, label_column, self._column)
        table_columns.check_alike(self._tables, *filter(None, (self._column, column)))
        if column is None and not unlabeled:
            raise UserError(
                f"{first.path}: has no column of labels (its columns: {', '.join(first.schema.names[:8])}); name it "
                "with --data.label_column, or train without classes: --data.labels none --label_drop 0"
            )
        self.labels, missing, self.class_names = table_columns.read_labels(self._tables, column)
        self.notes: tuple[str, ...] = ()
        if unlabeled and missing.all():
            self.labels, self.class_names = np.zeros_like(self.labels), (Path(source).stem or "images",)
            missing[:] = False
            lack = f"column {column} is null or -1" if column else "no column of labels; --data.label_column names one"
            self.notes += (f"{source}: its images are taken as one class, since it has no labels ({lack})",)

        # Leave out rows without a label or an image.
        for row in np.flatnonzero(missing):
            problem = f"has no label (column {column} is null or -1, as in test splits on the hub)"
            report(UserError(f"{self.where(row)}: {problem}; take a labeled split, or remove the row"))
        decoded = sum(self._tables[t].decoded_bytes(k, self._column) for t, k in places)
        self._keep_all = decoded <= _DECODED_BYTES
        self._images: OrderedDict[int, Images] = OrderedDict()
        missing |= self._find_missing_images(report, verify or self._keep_all)
        self._rows = np.flatnonzero(~missing)
        self.labels = self.labels[self._rows]
        self.notes += self._describe(source, decoded, len(places))

    def read(self, i: int) -> np.ndarray:
        """Return the encoded bytes of image `i`, uint8 (size,). Raises UserError if they are missing or damaged."""
        chunk, row = self._locate(i)
        images = self._decoded(chunk)
        if images.null is not None and images.null[row]:
            raise self._no_image(i)
        return images.data[images.offsets[row] : images.offsets[row + 1]]

    def where(self, i: int) -> str:
        """Return the name of image `i` for error messages: the file, and the row in it, counted from 0."""
        t = int(self._table[self._locate(i)[0]])
        return f"{self._tables[t].path}: row {self._rows[i] - self._first_rows[t]}"

    def _locate(self, i: int) -> tuple[int, int]:
        """Return the chunk of image `i`, counted over all tables, and its row in that chunk."""
        row = self._rows[i]
        chunk = int(np.searchsorted(self._starts, row, side="right")) - 1
        return chunk, int(row - self._starts[chunk])

    def _decoded(self, chunk: int) -> "Images":
        """Return the images of a chunk, and keep them."""
        if chunk in self._images:
            self._images.move_to_end(chunk)
            return self._images[chunk]
        if not self._keep_all and len(self._images) >= _KEPT:
            self._images.popitem(last=False)
        self._images[chunk] = self._tables[self._table[chunk]].images(int(self._chunk[chunk]), self._column)
        return self._images[chunk]

    def _find_missing_images(self, report: Report, decode: bool) -> np.ndarray:
        """Report rows without an image, and chunks that cannot be decoded; return which rows these are, bool (n,).

        decode: whether to decode all chunks, instead of only those that are known to lack images.
        """
        missing = np.zeros(len(self._rows), bool)
        for chunk, (t, k) in enumerate(zip(self._table, self._chunk)):
            if not decode and not self._tables[t].nulls(int(k), self._column):
                continue
            rows = slice(self._starts[chunk], self._starts[chunk + 1])
            try:
                images = self._decoded(chunk)
            except UserError as error:
                report(error)
                missing[rows] = True
                continue
            if images.null is not None:
                missing[rows] = images.null
                for row in np.flatnonzero(images.null) + self._starts[chunk]:
                    report(self._no_image(row))
        return missing

    def _no_image(self, i: int) -> UserError:
        """Return the error about sample `i`, which has no image."""
        problem = f"column {self._column} holds no image (null, or only its path)"
        return UserError(f"{self.where(i)}: {problem}; remove the row, or save the set with its images in it")

    def _describe(self, source: str, decoded: int, groups: int) -> tuple[str, ...]:
        """Return lines about files that are not taken, and about row groups that make shuffled reading slow."""
        other = left_out(Path(source)) if Path(source).is_dir() else ""
        notes = (f"{source}: not taken: {other}",) if other else ()
        if self._keep_all:
            return notes
        return (
            *notes,
            f"{source}: a shuffled run decodes a row group of {decoded / groups / 1e6:.0f} MB for nearly every image; "
            f"write shards once, and train on those: fastdit-data convert {source} --out SHARDS",
        )
