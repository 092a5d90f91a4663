"""The kind of a file, told by its first bytes and not by its name, for messages about a file in the wrong place."""

from __future__ import annotations

import re
import zipfile
from typing import NamedTuple

from .. import _files
from . import arrays

_MAKES_PROBS = "`fmn-ref predict` writes the probabilities of a run's checkpoints"
_TEXT = bytes({7, 8, 9, 10, 12, 13, 27, *range(0x20, 0x100)} - {0x7F})


class Content(NamedTuple):
    """A kind of content, and words about it: what it is, and which command reads it."""

    kind: str
    words: str


def content_of(path: _files.AnyPath) -> Content | None:
    """Tell what a file contains; None for a folder, a missing file and unknown content. Nothing of it is loaded."""
    try:
        with _files.opened(path) as file:
            head = file.read(64)
        if head.startswith(b"PK\3\4"):
            return _zip_content(path)
        if head[:1] == b"{":
            return _json_content(head)
    except Exception:  # zipfile raises several kinds for a damaged archive
        return None
    if head.startswith(b"\x93NUMPY"):
        return Content("npy", "an .npy file")
    if head.startswith(b"FMNHIST\0"):
        return Content("history", "a correctness history, which `fmn-ref metric` reads")
    if head.startswith(b"\x89HDF\r\n"):
        return Content("checkpoint", f"an HDF5 file, perhaps the weights of a Keras network; {_MAKES_PROBS}")
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 1 << 32:
        return Content("checkpoint", f"a safetensors checkpoint; {_MAKES_PROBS}")
    if head[:1] == b"\x80" and head[1:2] in b"\2\3\4\5":
        return Content("pickle", "a pickle, which is never loaded, since it may run code; save arrays with numpy.save")
    return Content("text", "a text file") if head and not head.translate(None, _TEXT) else None


def _zip_content(path: _files.AnyPath) -> Content | None:
    with _files.opened(path) as file, zipfile.ZipFile(file) as archive:
        names = archive.namelist()
    if any(name.rpartition("/")[2] == "data.pkl" for name in names):
        return Content("checkpoint", f"a checkpoint of torch; {_MAKES_PROBS}")
    if "model.weights.h5" in names:
        return Content("checkpoint", f"a Keras network; {_MAKES_PROBS}")
    if not all(name.endswith(".npy") for name in names):
        return None
    found = set(arrays.npz_names(path))
    if found & {"correct", "predictions"} and not found & {"probs", "logits", "scores"}:
        return Content("correctness", "an .npz file of correctness or predictions, which `fmn-ref metric` reads")
    return Content("npz", f"an .npz file with {', '.join(sorted(found))}")


def _json_content(head: bytes) -> Content:
    """Tell a JSON file of the package by its format, which it begins with."""
    found = re.match(rb'\{\s*"format":\s*"fmn_ref\.(plan|run)"', head)
    if found is None:
        return Content("json", "a JSON file")
    if found[1] == b"plan":
        return Content("plan", "a fusion plan, which `fmn-ref apply` reads")
    return Content("run", "the description of a run; give its folder")
