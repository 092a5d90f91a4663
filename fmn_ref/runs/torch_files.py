"""Read files of torch.save without running code: from 1.6 on (zip archives), and older ones on request.

torch is imported inside the functions.
"""

from __future__ import annotations

import contextlib
import os
import re
from contextlib import AbstractContextManager
from typing import Any

from .. import _files
from . import archive, standins
from .folder import AnyPath

KERAS = (".weights.h5", ".keras", ".h5")  # endings of the files of Keras
HDF5 = b"\x89HDF\r\n\x1a\n"  # first bytes of such a file, but .keras
OF_KERAS = "files of Keras are there, for from_checkpoints and probabilities of fmn_ref.integrations.keras"


def load(path: AnyPath, scan: bool = False, foreign: bool = False, mapped: bool = False) -> Any:
    """Load a file that `checkpoints.save` or torch.save wrote, to the CPU.

    Parameters
    ----------
    path : path
    scan : bool, default False
        Look into all that the file contains first. Needed if more than the tensors of a state_dict is used of it.
    foreign : bool, default False
        Accept files from before torch 1.6 too, and harmless classes beside the tensors: their objects are dropped
        (see `standins`).
    mapped : bool, default False
        Map the tensors to the file instead of reading them, but for files from before torch 1.6, and those with names
        that are no UTF-8, which torch cannot map.

    Raises
    ------
    FileNotFoundError
    ValueError
        The file is truncated or damaged (a checksum does not match), is no checkpoint, or holds more than tensors and
        plain values. The message names the file and the cause.
    """
    import torch

    absolute = _files.absolute(path)
    mapped = mapped and os.fsencode(absolute).decode(errors="ignore") == str(absolute)
    with _files.reading(path, "a readable checkpoint of tensors") as file:
        head = file.read(8)
        if head == HDF5 or absolute.suffix == ".keras":
            raise ValueError(f"{path}: not a file of torch; {OF_KERAS}")
        if foreign and not head.startswith(b"PK\3\4"):
            mapped = False
            archive.check_legacy(file, standins.DROPPED)
        else:
            scanned = scan or torch.__version__ < "2.13"  # later versions compare the sizes of tensors
            archive.check(file, scanned, standins.DROPPED if foreign else frozenset())
        file.seek(0)
        allowed: AbstractContextManager[Any] = standins.allowed() if foreign else contextlib.nullcontext()
        try:
            with allowed:
                return torch.load(absolute if mapped else file, map_location="cpu", weights_only=True, mmap=mapped)
        except MemoryError:
            raise
        except Exception as error:
            kind = MemoryError if "allocate memory" in str(error) else ValueError  # torch raises a RuntimeError
            raise kind(reason(error) + _hint(error, foreign)) from error


def reason(error: Exception) -> str:
    """Say what went wrong, without torch's advice to run the code in a file."""
    text = _files.cause(error).rpartition("WeightsUnpickler error: ")[2]
    return re.sub(r"\x1b\[\d*m", "", text.partition(" Please use ")[0])


def _hint(error: Exception, foreign: bool) -> str:
    """What to do with a file that holds other objects than tensors."""
    if "Unsupported global" not in str(error):
        return ""
    if not foreign:
        return " A state_dict alone is expected here; fmn_ref.from_checkpoints reads files that hold more."
    line = "torch.save(torch.load(OLD, weights_only=False).state_dict(), NEW)"
    return f" If this is a pickled network that you trust, re-save it where its code is installed: {line}"
