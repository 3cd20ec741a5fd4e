"""Data sets as sharded Parquet under one root: a folder or an object store.

A stage is a folder named by what it holds and a hash of the configuration that made it (``samples-3f2a…``); inside, one
partition a subject (``subject=01/train``). A shard appears atomically, carries in its metadata what it was made from
(names and sizes of its input files), and is listed with its size in the partition's ``_SUCCESS`` once all are there.
So a finished partition is recognised by one look, a killed one goes on from its last whole shard, and a shard whose input
has changed, or that was deleted or cut short, is made again. Pages carry checksums, so a damaged shard is an error.

Arrays are FixedSizeBinary cells with shape and dtype in the column's metadata, viewed without a copy.
"""
from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from nsdray.config import digest

INPUTS = b"nsdray.inputs"
PARTIAL = ".partial"
ROWS_PER_GROUP = 64  # a Parquet row group: the unit in which training streams are shuffled and shared among workers

Inputs = dict[str, Any]
"""What a shard was made from, e.g. {"betas_session01.hdf5": size in bytes}."""


def resolve_root(root: str | None) -> str:
    """The store's root: the argument, else $NSDRAY_ROOT, else ~/nsdray-data; local paths are made absolute."""
    root = root or os.environ.get("NSDRAY_ROOT") or "~/nsdray-data"
    return root if "://" in root else str(Path(root).expanduser().resolve())


def redacted(text: str) -> str:
    """Text in which the credentials of addresses are replaced by ***: what may be printed and logged."""
    text = re.sub(r"://[^\s?#@/]*:[^\s?#]*@|://[^\s?#@/]+@", "://***@", text)
    return re.sub(r"(?i)([?&](?:sig|[^=&\s]*(?:key|secret|token|password|credential|signature)[^=&\s]*)=)[^&\s]+", r"\1***", text)


def subject_folder(subject: int) -> str:
    """"subject=01" for subject 1."""
    return f"subject={subject:02d}"


def array_column(array: np.ndarray) -> tuple[pa.Array, dict[str, str]]:
    """An array (n, ...) as n FixedSizeBinary cells (no copy), and the field metadata that `view_column` needs."""
    array = np.ascontiguousarray(array)
    n_bytes = array.dtype.itemsize * int(np.prod(array.shape[1:], dtype=np.int64))
    cells = pa.FixedSizeBinaryArray.from_buffers(pa.binary(n_bytes), len(array), [None, pa.py_buffer(array)])
    return cells, {"shape": json.dumps(list(array.shape[1:])), "dtype": array.dtype.str}


def table(columns: dict[str, Any]) -> pa.Table:
    """A table from arrays: (n, ...) arrays of two or more dimensions become array cells, the rest plain columns."""
    fields, arrays = [], []
    for name, values in columns.items():
        if isinstance(values, np.ndarray) and values.ndim > 1:
            cells, metadata = array_column(values)
            fields.append(pa.field(name, cells.type, nullable=False, metadata=metadata))
        else:
            cells = pa.array(values)
            fields.append(pa.field(name, cells.type, nullable=False))
        arrays.append(cells)
    return pa.Table.from_arrays(arrays, schema=pa.schema(fields))


def view_column(data: pa.Table, name: str) -> np.ndarray:
    """A column as a NumPy array; array cells come back as (n, *shape), read-only and without a copy where possible."""
    column, metadata = data.column(name), data.schema.field(name).metadata or {}
    if b"shape" not in metadata:
        return column.to_numpy()
    shape, dtype = json.loads(metadata[b"shape"]), np.dtype(metadata[b"dtype"].decode())
    views = []
    for chunk in column.chunks:
        size = chunk.type.byte_width // dtype.itemsize
        flat = np.frombuffer(chunk.buffers()[1], dtype, len(chunk) * size, chunk.offset * chunk.type.byte_width)
        views.append(flat.reshape(len(chunk), *shape))
    if len(views) == 1:
        return views[0]
    return np.concatenate(views) if views else np.empty((0, *shape), dtype)


class Store:
    """A root folder or object-store prefix, through pyarrow's file systems.

    root: a path, or an address such as ``s3://bucket/folder``. Credentials and the endpoint come from the environment
    (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_ENDPOINT_URL, …) or the machine's role; those in the address
    (``s3://key:secret@bucket/folder?endpoint_override=http%3A%2F%2Fhost%3A9000``) are used, and never shown.
    """

    def __init__(self, root: str):
        if "://" in root:
            try:
                self.fs, self.base = fs.FileSystem.from_uri(root)
            except (pa.ArrowInvalid, OSError) as error:
                raise ValueError(f"{redacted(root)} cannot be used as a root: {redacted(str(error))}") from None
            address = urlsplit(root)
            self.root = urlunsplit(address._replace(netloc=address.netloc.rpartition("@")[2]))
        else:
            self.fs, self.base = fs.LocalFileSystem(use_mmap=True), root
            self.root = root

    @property
    def is_local(self) -> bool:
        return isinstance(self.fs, fs.LocalFileSystem)

    def stage(self, name: str, config: dict[str, Any]) -> Stage:
        """The stage of this name and configuration; nothing is written yet."""
        return Stage(self, name, config)

    def uri(self, path: str) -> str:
        """Full address of a path relative to the root."""
        address, question, options = self.root.partition("?")
        return f"{address.rstrip('/')}/{path}{question}{options}"

    def path(self, name: str) -> str:
        """What the file system calls a file or folder below the root. ValueError if it were not below it."""
        if name.startswith("/") or ".." in name.split("/"):
            raise ValueError(f"{name!r} is no name below {self.root}: it must be relative, without \"..\"")
        return f"{self.base}/{name}"

    def storage(self, name: str) -> tuple[str, fs.FileSystem | None]:
        """A file or folder as Ray wants to know it: its path, and the file system unless it is the local one."""
        return self.path(name), None if self.is_local else self.fs

    def sizes(self, folder: str) -> dict[str, int]:
        """Names and sizes of the whole files right below a folder; empty if it is not there."""
        return {info.base_name: info.size for info in self._files(folder) if not info.base_name.endswith(PARTIAL)}

    def _files(self, folder: str) -> list[fs.FileInfo]:
        infos = self.fs.get_file_info(fs.FileSelector(self.path(folder), allow_not_found=True))
        return [info for info in infos if info.type == fs.FileType.File]

    def delete(self, path: str) -> None:
        """Delete a file, if it is there."""
        with contextlib.suppress(FileNotFoundError):
            self.fs.delete_file(self.path(path))

    def sweep(self, folder: str, seconds: float = 3600.0) -> None:
        """Delete what killed writers left in a folder, once it is an hour old."""
        for info in self._files(folder):
            if info.base_name.endswith(PARTIAL) and time.time() - info.mtime_ns / 1e9 > seconds:
                self.delete(f"{folder}/{info.base_name}")

    def read_bytes(self, path: str) -> bytes:
        with self.fs.open_input_stream(self.path(path)) as stream:
            return stream.read()

    def write_bytes(self, path: str, data: bytes) -> None:
        with self.writing(path) as stream:
            stream.write(data)

    def write_tensors(self, path: str, arrays: dict[str, np.ndarray]) -> None:
        """Write float arrays as a safetensors file, straight from their memory (`safetensors.numpy.save` makes two copies)."""
        header, end, arrays = {}, 0, {name: np.ascontiguousarray(array) for name, array in arrays.items()}
        for name, array in arrays.items():
            kind = {"float16": "F16", "float32": "F32", "float64": "F64"}[array.dtype.name]
            header[name] = {"dtype": kind, "shape": array.shape, "data_offsets": [end, end + array.nbytes]}
            end += array.nbytes
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with self.writing(path) as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            for array in arrays.values():
                stream.write(memoryview(array).cast("B"))

    @contextlib.contextmanager
    def writing(self, path: str) -> Iterator[pa.NativeFile]:
        """An output stream whose file appears whole or not at all: renamed on a file system, put at once on an object store."""
        full = self.path(path)
        if not self.is_local:
            buffer = pa.BufferOutputStream()
            yield buffer
            with self.fs.open_output_stream(full) as stream:
                stream.write(buffer.getvalue())
            return
        partial = f"{full}.{uuid.uuid4().hex}{PARTIAL}"
        try:
            self.fs.create_dir(os.path.dirname(full), recursive=True)
            with self.fs.open_output_stream(partial) as stream:
                yield stream
            os.replace(partial, full)
        except BaseException as error:
            Path(partial).unlink(missing_ok=True)
            if is_out_of_space(error):
                raise out_of_space(full) from error
            raise


def is_unreadable_now(error: BaseException) -> bool:
    """Whether a disk, a network or a server is in trouble. What Parquet finds wrong in a file has neither number nor server."""
    return isinstance(error, OSError) and (error.errno is not None or "AWS Error" in str(error))


def is_out_of_space(error: BaseException) -> bool:
    return isinstance(error, OSError) and error.errno == errno.ENOSPC


def out_of_space(path: str) -> OSError:
    """The error of a full disk, with what to do."""
    return OSError(
        errno.ENOSPC,
        f"no space left while writing {path}. Free some, or choose another --store.root; "
        "finished shards are kept and the next start goes on from them",
    )


@dataclass(frozen=True)
class Stage:
    """One stage's folder: shards, grouped into partitions."""

    store: Store
    name: str
    config: dict[str, Any]

    @property
    def hash(self) -> str:
        return digest(self.config)

    @property
    def folder(self) -> str:
        """Path relative to the store's root."""
        return f"{self.name}-{self.hash}"

    def uri(self, partition: str = "") -> str:
        return self.store.uri(f"{self.folder}/{partition}".rstrip("/"))

    def claim(self) -> None:
        """Write config.json, or check that the one that is there is ours."""
        path, text = f"{self.folder}/config.json", json.dumps(self.config, indent=1, sort_keys=True)
        if "config.json" not in self.store.sizes(self.folder):
            self.store.write_bytes(path, text.encode())
        found = json.loads(self.store.read_bytes(path))
        if found != json.loads(text):
            differing = sorted(k for k in found.keys() | self.config.keys() if found.get(k) != self.config.get(k))
            raise ValueError(
                f"{self.uri()} was made by another configuration (its config.json differs in {', '.join(differing)}). "
                "Move that folder away or choose another --store.root."
            )

    def missing(self, partition: str, wanted: dict[str, Inputs]) -> list[str]:
        """Shards of a partition that are not there, or not made from these inputs, in the order of wanted."""
        sizes, listed = self.store.sizes(f"{self.folder}/{partition}"), self.listed(partition)
        return [
            shard
            for shard, inputs in wanted.items()
            if shard not in sizes
            or (listed[shard] != [sizes[shard], inputs] if shard in listed else self._inputs(partition, shard) != inputs)
        ]

    def listed(self, partition: str) -> dict[str, list]:
        """Size and inputs of every shard that a finished partition has by its _SUCCESS; none if it is not finished."""
        try:
            return json.loads(self.store.read_bytes(f"{self.folder}/{partition}/_SUCCESS"))
        except FileNotFoundError:
            return {}

    def begin(self, partition: str, wanted: dict[str, Inputs]) -> list[str]:
        """As `missing`, for somebody who is going to make them: from here on the partition no longer counts as finished."""
        missing = self.missing(partition, wanted)
        if missing:
            self.store.delete(f"{self.folder}/{partition}/_SUCCESS")
            self.store.sweep(f"{self.folder}/{partition}")
        return missing

    def finish(self, partition: str, wanted: dict[str, Inputs]) -> None:
        """Mark a partition as finished; its shards must all be there. Does nothing if that has been done."""
        path, sizes = f"{self.folder}/{partition}/_SUCCESS", self.store.sizes(f"{self.folder}/{partition}")
        assert wanted.keys() <= sizes.keys(), f"{self.uri(partition)} lacks {sorted(wanted.keys() - sizes.keys())}"
        listing = {shard: [sizes[shard], inputs] for shard, inputs in wanted.items()}
        if "_SUCCESS" not in sizes or json.loads(self.store.read_bytes(path)) != listing:
            self.store.write_bytes(path, json.dumps(listing, indent=1).encode())

    def write(self, partition: str, shard: str, data: pa.Table, inputs: Inputs) -> None:
        """Write one Parquet shard atomically."""
        data = data.replace_schema_metadata({**(data.schema.metadata or {}), INPUTS: json.dumps(inputs)})
        with self.store.writing(f"{self.folder}/{partition}/{shard}") as stream:
            pq.write_table(
                data, stream, row_group_size=ROWS_PER_GROUP, compression="none", use_dictionary=False,
                write_statistics=False, write_page_checksum=True,
            )  # fmt: skip

    def read(
        self, partition: str, shard: str, columns: Sequence[str] | None = None, groups: Sequence[int] | None = None
    ) -> pa.Table:
        """Read a shard, or some of its columns and row groups (of ROWS_PER_GROUP rows)."""
        with self.opened(partition, shard) as file:
            groups = range(file.num_row_groups) if groups is None else groups
            return file.read_row_groups(list(groups), columns=None if columns is None else list(columns))

    @contextlib.contextmanager
    def opened(self, partition: str, shard: str) -> Iterator[pq.ParquetFile]:
        path = self.store.path(f"{self.folder}/{partition}/{shard}")
        try:
            with self.store.fs.open_input_file(path) as stream, pq.ParquetFile(stream, page_checksum_verification=True) as file:
                yield file
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{path} is not there. Run the job again; it makes what is missing.") from error
        except (pa.ArrowInvalid, OSError) as error:
            if is_unreadable_now(error):
                raise OSError(f"{path} cannot be read now ({error}). See to the disk or the network and start again; "
                              "nothing that is finished is lost.") from error  # fmt: skip
            raise ValueError(f"{path} is damaged ({error}). Delete it and run the job again; only it is made anew.") from error

    def _inputs(self, partition: str, shard: str) -> Inputs | None:
        if not shard.endswith(".parquet"):
            return None  # a plain file carries no inputs: it counts only when listed in _SUCCESS
        try:
            with self.opened(partition, shard) as file:
                return json.loads((file.schema_arrow.metadata or {}).get(INPUTS, b"null"))
        except ValueError:
            return None  # a damaged shard is made again


@contextlib.contextmanager
def local_folder(stage: Stage, partition: str) -> Iterator[Path]:
    """A partition's plain files as a local folder: the folder itself, or a temporary copy from an object store."""
    if stage.store.is_local:
        yield Path(stage.store.base) / stage.folder / partition
        return
    with tempfile.TemporaryDirectory() as folder:
        for name in stage.store.sizes(f"{stage.folder}/{partition}"):
            (Path(folder) / name).write_bytes(stage.store.read_bytes(f"{stage.folder}/{partition}/{name}"))
        yield Path(folder)
