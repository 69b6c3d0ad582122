"""Write tables as `datasets` does, with pyarrow alone."""

import json
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from fastdit.data import open_source

IMAGE = pa.struct({"bytes": pa.binary(), "path": pa.string()})
NAMES = ("bag", "boot", "coat")


def shipped(n: int) -> tuple[list[bytes], list[int]]:
    """Return `n` shipped images of the first three classes, sorted by class, and their labels."""
    source = open_source("fashion_mnist")
    chosen = [(int(source.labels[i]), source.read(i).tobytes()) for i in range(200) if source.labels[i] < 3][:n]
    chosen.sort(key=lambda sample: sample[0])
    return [image for _, image in chosen], [label for label, _ in chosen]


def table(
    images: Sequence[bytes | None], features: dict | None = None, image: str = "image", **columns: pa.Array | list
) -> pa.Table:
    """Return a table of images and other columns, with the metadata that `datasets` writes if `features` is given."""
    stored = pa.array([{"bytes": one, "path": None} for one in images], IMAGE)
    made = pa.table({image: stored, **columns})
    if features is None:
        return made
    features = {image: {"_type": "Image"}} | features
    return made.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})


def class_label(names: Sequence[str] = NAMES) -> dict:
    return {"names": list(names), "_type": "ClassLabel"}


def labeled(n: int = 12) -> pa.Table:
    """Return a table of shipped images with a ClassLabel feature."""
    images, labels = shipped(n)
    return table(images, {"label": class_label()}, label=labels)


def write_parquet(path: Path, rows: pa.Table, group: int = 5, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(rows, path, row_group_size=group, **options)
    return path


def write_arrow(path: Path, rows: pa.Table, chunk: int = 5, options: pa.ipc.IpcWriteOptions | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, rows.schema, options=options) as writer:
        writer.write_table(rows, max_chunksize=chunk)
    return path


def save_to_disk(folder: Path, rows: pa.Table, parts: int = 2) -> Path:
    """Write what `Dataset.save_to_disk` does."""
    each = -(-len(rows) // parts)
    names = [f"data-{k:05d}-of-{parts:05d}.arrow" for k in range(parts)]
    for k, name in enumerate(names):
        write_arrow(folder / name, rows.slice(k * each, each))
    (folder / "dataset_info.json").write_text(json.dumps({"features": {}}))
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    return folder


def on_the_hub(folder: Path, rows: pa.Table, *splits: str, parts: int = 2) -> Path:
    """Write parquet files in the hub's layout, and return the folder."""
    each = -(-len(rows) // parts)
    for split in splits:
        for k in range(parts):
            write_parquet(folder / "data" / f"{split}-{k:05d}-of-{parts:05d}.parquet", rows.slice(k * each, each))
    (folder / "README.md").write_text("# a set")
    return folder


def class_folders(root: Path, images: Sequence[bytes], labels: Sequence[int]) -> Path:
    """Write the images to class folders, whose order is the same if the labels are sorted."""
    for i, (image, label) in enumerate(zip(images, labels)):
        path = root / NAMES[label] / f"{i:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image)
    return root
