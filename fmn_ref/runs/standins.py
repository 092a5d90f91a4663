"""Stand-ins for harmless classes that other programs put beside the tensors of a checkpoint.

An object of such a class is made without its code: its content is dropped, except that of dicts and numbers. A class
that is not listed here is refused. torch is imported inside the functions.
"""

from __future__ import annotations

import pickle
import re
from collections import OrderedDict
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np


class Dropped:
    """Object whose content was dropped."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Dropped:
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...


class NumberType:
    """Stand-in for numpy.dtype that accepts the types of numbers only."""

    def __init__(self, name: Any, *flags: Any) -> None:
        if not isinstance(name, str) or not re.fullmatch("b1|[iu][1248]|f[248]", name):
            raise pickle.UnpicklingError("it contains a NumPy type that is no number")
        self.name, self.order = name, "="

    def __setstate__(self, state: Any) -> None:
        if state[1] not in ("<", ">", "|", "="):
            raise pickle.UnpicklingError("it contains a NumPy type of unknown byte order")
        self.order = state[1]


class Number:
    """Stand-in for NumPy's function that makes a scalar of a type and bytes; returns a plain number."""

    def __new__(cls, dtype: Any, data: Any) -> Any:
        return np.frombuffer(data, dtype.order + dtype.name).item()

    def __setstate__(self, state: Any) -> None:  # without this, a pickle could set attributes of the class
        raise pickle.UnpicklingError("it sets the state of a number")


def new_dict(*arguments: Any) -> dict[Any, Any]:
    """Stand-in for classes that are called to make a dict, such as defaultdict."""
    return {}


_PATHS = ("Path", "PurePath", "PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath")
_NODES = ("Any", "Boolean", "Bytes", "Enum", "Float", "Integer", "Path", "String", "Union", "Value")
_DROPPED = ["argparse.Namespace", "types.SimpleNamespace", "typing.Any", "uuid.UUID"]
_DROPPED += [f"datetime.{name}" for name in ("datetime", "date", "time", "timedelta", "timezone")]
_DROPPED += [f"builtins.{name}" for name in ("bool", "bytes", "dict", "float", "int", "list", "object", "str", "tuple")]
_DROPPED += [f"{module}.{name}" for module in ("pathlib", "pathlib._local") for name in _PATHS]
_DROPPED += [f"numpy.{core}.multiarray._reconstruct" for core in ("core", "_core")] + ["numpy.ndarray"]
_DROPPED += ["omegaconf.dictconfig.DictConfig", "omegaconf.listconfig.ListConfig", "omegaconf.base.SCMode"]
_DROPPED += ["omegaconf.base.Metadata", "omegaconf.base.ContainerMetadata", "omegaconf.base.Node"]
_DROPPED += [f"omegaconf.nodes.{name}Node" for name in _NODES]
_DROPPED += ["mmengine.logging.history_buffer.HistoryBuffer", "mmcv.utils.config.ConfigDict"]
_DICTS = [f"{package}.utilities.parsing.AttributeDict" for package in ("lightning.pytorch", "pytorch_lightning")]
_DICTS += [f"{package}.utilities.data.AttributeDict" for package in ("lightning.fabric", "lightning_fabric")]
_DICTS += ["mmengine.config.config.ConfigDict", "addict.addict.Dict", "easydict.EasyDict", "yacs.config.CfgNode"]
STANDINS: dict[str, Any] = {
    **dict.fromkeys(_DROPPED, Dropped),
    **dict.fromkeys(_DICTS, OrderedDict),  # torch fills no other kind of dict
    "collections.defaultdict": new_dict,
    "numpy.dtype": NumberType,
    "numpy.core.multiarray.scalar": Number,
    "numpy._core.multiarray.scalar": Number,
}
DROPPED = frozenset(name.rpartition(".")[0].encode() + b"\n" + name.rpartition(".")[2].encode() for name in _DROPPED)


def allowed() -> AbstractContextManager[Any]:
    """Let torch.load make the stand-ins; before torch 2.6 it cannot, and refuses their classes."""
    import torch

    if torch.__version__ < "2.6":
        return nullcontext()
    known: list[Any] = [(standin, name) for name, standin in STANDINS.items()]
    return torch.serialization.safe_globals(known)
