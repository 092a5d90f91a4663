"""Read folders of torch.distributed.checkpoint by torch's own reader, but without running code.

Torch's reader unpickles the folder's .metadata and everything that is no tensor. Here the pickle may name the classes
of the metadata only, and tensors alone are read. torch is imported inside the functions.
"""

from __future__ import annotations

import io
import math
import pickle
import warnings
from pathlib import Path
from typing import Any, NoReturn

from .. import _files
from . import archive
from .pickles import scan
from .torch_files import reason

METADATA = ".metadata"
_CLASSES = ["Metadata", "MetadataIndex", "TensorStorageMetadata", "BytesStorageMetadata", "TensorProperties"]
_CLASSES += ["ChunkStorageMetadata", "StorageMeta", "_MEM_FORMAT_ENCODING"]
_ALLOWED = {f"torch.distributed.checkpoint.metadata.{name}" for name in _CLASSES}
_ALLOWED |= {f"torch.distributed.checkpoint.filesystem.{name}" for name in ("_StorageInfo", "_StoragePrefix")}
_ALLOWED |= {"torch.Size", "torch.serialization._get_layout", "collections.OrderedDict", "builtins.set"}
_ALLOWED |= {f"pathlib.{name}" for name in ("PosixPath", "PurePosixPath")}


class _Unpickler(pickle.Unpickler):
    """Unpickler of the metadata; refuses to import or call anything else."""

    def find_class(self, module: str, name: str) -> Any:
        import torch

        found = vars(torch).get(name)  # getattr may import a part of torch, which the file would name
        if module == "torch" and isinstance(found, torch.dtype):
            return found
        if f"{module}.{name}" not in _ALLOWED:
            raise pickle.UnpicklingError(f"it refers to {module}.{name}, which no checkpoint of tensors needs")
        return super().find_class(module, name)

    def persistent_load(self, pid: Any) -> NoReturn:
        raise pickle.UnpicklingError("it refers to something outside the file")


def files_of(folder: Path) -> list[Path]:
    """List the files of the checkpoint."""
    return [folder / METADATA, *sorted(folder.glob("*.distcp"))]


def read_metadata(folder: Path) -> Any:
    """Read the folder's metadata; ValueError where it is damaged, or names a file outside the folder."""
    with _files.reading(folder / METADATA, "the metadata of a distributed checkpoint") as file:
        data = file.read()
        scan(data)
        found = _Unpickler(io.BytesIO(data)).load()
        paths = {folder / str(info.relative_path) for info in found.storage_data.values()}
        for path in sorted(paths):
            if path.parent != folder or path.is_symlink() or not path.is_file():
                raise ValueError(f"its file {path.name!r} is not in the folder")
        known = sum(path.stat().st_size for path in paths)
        for name, entry in tensors_of(found).items():
            if sum(math.prod(chunk.sizes) for chunk in entry.chunks) != math.prod(entry.size):
                raise ValueError(f"parts of {name} are missing")
            if math.prod(entry.size) * entry.properties.dtype.itemsize > known:
                raise ValueError(f"{name} is larger than the files")
        return found


def tensors_of(metadata: Any) -> dict[str, Any]:
    """Entries of the tensors, by name."""
    return {name: entry for name, entry in metadata.state_dict_metadata.items() if hasattr(entry, "size")}


def outline(folder: Path) -> dict[str, Any]:
    """Build the nested dicts that were saved, with a meta tensor in place of each tensor and nothing else."""
    import torch

    metadata, tree = read_metadata(folder), dict[str, Any]()
    for name, entry in tensors_of(metadata).items():
        *above, last = (metadata.planner_data or {}).get(name, (name,))
        place = tree
        for key in above:
            place = place.setdefault(str(key), {})
        place[str(last)] = torch.empty(entry.size, dtype=entry.properties.dtype, device="meta")
        place[str(last)].fmn_name = name
    return tree


def _check_parts(folder: Path, names: set[str]) -> None:
    """Check the archive of each part of the tensors, which torch's reader does not."""
    for index, info in read_metadata(folder).storage_data.items():
        if index.fqn in names and not getattr(info, "transform_descriptors", None):
            with _files.opened(folder / str(info.relative_path)) as file:
                file.seek(info.offset)
                part = io.BytesIO(file.read(info.length))
            with _files.naming(folder / str(info.relative_path), f"a readable file of {index.fqn}"):
                archive.check(part)


def read_tensors(folder: Path, outlined: dict[str, Any]) -> dict[str, Any]:
    """Read the tensors of a part of the outline."""
    import torch
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.state_dict_loader import load

    class Reader(FileSystemReader):
        def read_metadata(self, *args: Any, **kwargs: Any) -> Any:
            return read_metadata(folder)

    meta = {key: t for key, t in outlined.items() if isinstance(t, torch.Tensor)}
    found = {t.fmn_name: torch.zeros(t.shape, dtype=t.dtype) for t in meta.values()}  # type: ignore[attr-defined]
    with _files.naming(folder, "a readable distributed checkpoint"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that there is one process
        _check_parts(folder, set(found))
        try:
            load(found, storage_reader=Reader(folder), no_dist=True)
        except CheckpointException as error:  # no Exception, but an interruption as well
            failure, _ = next(iter(error.failures.values()))
            raise ValueError(reason(failure)) if isinstance(failure, Exception) else failure from None
    return {key: found[t.fmn_name] for key, t in meta.items()}  # type: ignore[attr-defined]
