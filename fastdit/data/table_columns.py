"""Choose the columns of a table that hold images and class labels, and read the labels.

`datasets` writes the features of the columns into the schema's metadata, as JSON under the key `huggingface`:
{"info": {"features": {"image": {"_type": "Image"}, "label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}}}
(its src/datasets/arrow_writer.py). Tables without such metadata are judged by types and names.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fastdit.data.table_files import Table
from fastdit.errors import UserError, a_few

_IMAGES = ("image", "img", "picture", "photo", "pixels", "jpg", "jpeg", "png", "webp")
_LABELS = ("label", "labels", "class", "classes", "cls", "target", "category", "y")
_LABEL_ENDS = ("_label", "_class", "_category", "_cls")
_NO_LABEL = -1  # what data sets on the hub write where a test split has no labels


class Labels(NamedTuple):
    """Hold the class labels of some tables.

    Args:
        labels: (n,) int64, in the order of the tables and their rows.
        missing: rows without a label, bool (n,).
        class_names: names of the classes in the order of their labels; empty if only the labels are known.
    """

    labels: np.ndarray
    missing: np.ndarray
    class_names: tuple[str, ...]


def choose_image_column(table: Table, chosen: str | None) -> str:
    """Return the name of the column of images: `chosen`, or the only one. Raises UserError."""
    types = {field.name: field.type for field in table.schema}
    _check_there(table, "image_column", chosen)
    found = [name for name, feature in _features(table).items() if feature.get("_type") == "Image" and name in types]
    found = found or [name for name, kind in types.items() if _has_bytes(kind)]
    found = found or [name for name, kind in types.items() if _is_binary(kind)]
    if len(found) > 1 and not any(_has_bytes(types[name]) for name in found):
        found = [name for name in found if name.lower() in _IMAGES] or found
    if chosen is not None:
        found = [chosen]
    if len(found) > 1:
        _refuse_several(table, "image_column", found)
    if found and (_has_bytes(types[found[0]]) or _is_binary(types[found[0]])):
        return found[0]

    # Say why there is none.
    texts = [name for name, kind in types.items() if _is_text(kind) and ("url" in name.lower() or name in _IMAGES)]
    if found or texts:
        kind = types[found[0]] if found else "text"
        raise UserError(
            f"{table.path}: column {(found or texts)[0]} holds no images but {kind}, such as addresses or paths, and "
            "fastdit downloads nothing; make a data set that holds the images' bytes (img2dataset writes shards)"
        )
    raise UserError(
        f"{table.path}: has no column of images (its columns: {a_few(types, 8)}); images are bytes, or a struct "
        "with the field bytes, as datasets writes its Image feature"
    )


def choose_label_column(table: Table, chosen: str | None, image: str) -> str | None:
    """Return the name of the column of labels: `chosen`, or the only one, or None if there is none.

    Raises UserError if several columns may be it, or if its type is no label's.
    """
    types = {field.name: field.type for field in table.schema if field.name != image}
    _check_there(table, "label_column", chosen)
    found = [name for name, feature in _features(table).items() if feature.get("_type") == "ClassLabel"]
    found = [name for name in found if name in types] or [
        name for name in types if name.lower() in _LABELS or name.lower().endswith(_LABEL_ENDS)
    ]
    if chosen is not None:
        found = [chosen]
    if not found:
        return None
    if len(found) > 1:
        _refuse_several(table, "label_column", found)
    kind = table.schema.field(found[0]).type
    if pa.types.is_nested(kind):
        raise UserError(
            f"{table.path}: column {found[0]} holds {kind}, several labels a sample; an image has one class here: "
            "choose another --data.label_column"
        )
    if not (_is_whole(kind) or _is_text(kind)):
        raise UserError(
            f"{table.path}: column {found[0]} holds {kind}; labels are whole numbers or text: choose another "
            "--data.label_column"
        )
    return found[0]


def read_labels(tables: Sequence[Table], column: str | None) -> Labels:
    """Return the labels of all rows of `tables`; all are missing without a column. Raises UserError.

    Text is numbered in sorted order. A null, or the number -1, is a missing label.
    """
    if column is None:
        n = sum(sum(table.sizes) for table in tables)
        return Labels(np.full(n, _NO_LABEL, np.int64), np.ones(n, bool), ())
    # Compare the tables, which may come from different sets.
    first = tables[0]
    names = _class_names(first, column)
    text = _is_text(first.schema.field(column).type)
    for table in tables:
        if _class_names(table, column) != names or _is_text(table.schema.field(column).type) != text:
            _refuse_difference(first.path, table.path, f"the classes or the type of column {column}")

    # Read them, and number text.
    parts = [table.column(column) for table in tables]
    if text:
        parts = [part.cast(pa.large_string()) for part in parts]
        found = {value for part in parts for value in part.unique().to_pylist() if value is not None}
        names = tuple(sorted(found))
        parts = [pc.index_in(part, value_set=pa.array(names, pa.large_string())) for part in parts]
    missing = np.concatenate([part.is_null().to_numpy() for part in parts])
    try:
        numbers = [part.cast(pa.int64()).fill_null(_NO_LABEL).to_numpy() for part in parts]
    except pa.ArrowInvalid:
        raise UserError(f"{first.path}: column {column} holds numbers beyond 64 bits; choose another") from None
    labels = np.concatenate(numbers).astype(np.int64)
    return Labels(labels, missing | (labels == _NO_LABEL), names)


def check_alike(tables: Sequence[Table], *columns: str) -> None:
    """Raise UserError unless all tables have `columns` of the types of the first table's."""
    for table in tables[1:]:
        for column in columns:
            at = table.schema.get_field_index(column)
            if at < 0 or table.schema.field(at).type != tables[0].schema.field(column).type:
                _refuse_difference(tables[0].path, table.path, f"the type of column {column}")


def _features(table: Table) -> dict[str, dict]:
    """Return the features of the columns that `datasets` noted, or an empty dict."""
    try:
        features = json.loads(table.schema.metadata[b"huggingface"])["info"]["features"]
        return {name: feature for name, feature in features.items() if isinstance(feature, dict)}
    except (TypeError, KeyError, ValueError, AttributeError, RecursionError):
        return {}


def _class_names(table: Table, column: str) -> tuple[str, ...]:
    """Return the names that a ClassLabel feature gives its classes, or an empty tuple."""
    names = _features(table).get(column, {}).get("names")
    return tuple(map(str, names)) if isinstance(names, list) else ()


def _check_there(table: Table, flag: str, column: str | None) -> None:
    """Raise UserError if the column that a flag names is not in the table."""
    if column is not None and column not in table.schema.names:
        raise UserError(f"{table.path}: has no column {column} (but {a_few(table.schema.names, 8)}); set --data.{flag}")


def _refuse_several(table: Table, flag: str, columns: list[str]) -> NoReturn:
    """Raise UserError about columns of which the user must choose one."""
    kind = flag.partition("_")[0]
    raise UserError(
        f"{table.path}: {len(columns)} columns may hold the {kind}s ({a_few(columns, 8)}); choose one with "
        f"--data.{flag} {columns[0]}"
    )


def _refuse_difference(first: Path, other: Path, what: str) -> NoReturn:
    """Raise UserError about two tables that do not belong to one data set."""
    raise UserError(f"{other}: differs from {first.name} in {what}; point --data.source at tables of one data set")


def _has_bytes(kind: pa.DataType) -> bool:
    """Return whether a type is a struct with the images' bytes, as the Image feature is stored."""
    at = kind.get_field_index("bytes") if pa.types.is_struct(kind) else -1
    return at >= 0 and _is_binary(kind.field(at).type)


def _is_binary(kind: pa.DataType) -> bool:
    """Return whether a type is bytes of any length."""
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)


def _is_text(kind: pa.DataType) -> bool:
    """Return whether a type is text, also as pandas stores categories."""
    if pa.types.is_dictionary(kind):
        return _is_text(kind.value_type)
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _is_whole(kind: pa.DataType) -> bool:
    """Return whether a type is a whole number or a truth value, also as pandas stores categories."""
    if pa.types.is_dictionary(kind):
        return _is_whole(kind.value_type)
    return pa.types.is_integer(kind) or pa.types.is_boolean(kind)
