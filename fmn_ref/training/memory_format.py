"""Memory format of a network's images and convolution weights: channels_last where it can be, else contiguous.

Convolutions run faster in channels_last. It is a format of 4-D tensors only, and a network that calls `view` on its
activations fails in it. `either_format` therefore tries again in the contiguous format.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import chain
from typing import TypeVar

import torch
from torch import Tensor, nn

T = TypeVar("T")


def set_channels_last(model: nn.Module) -> None:
    """Convert the network's 4-D tensors, in place; the others have no such format."""
    for t in _tensors_4d(model):
        t.data = t.data.to(memory_format=torch.channels_last)


def set_contiguous(model: nn.Module) -> bool:
    """Convert the network's 4-D tensors back, in place; return whether there was one to convert."""
    changed = False
    for t in _tensors_4d(model):
        plain = t.data.clone(memory_format=torch.contiguous_format)
        if t.stride() != plain.stride():  # with one channel, is_contiguous() is true for both formats
            t.data, changed = plain, True
    return changed


def _tensors_4d(model: nn.Module) -> Iterable[Tensor]:
    tensors = chain(model.parameters(), model.buffers())
    return [t for t in tensors if not nn.parameter.is_lazy(t) and t.ndim == 4 and t.layout is torch.strided]


def either_format(call: Callable[[], T], *convert: Callable[[], bool]) -> T:
    """Call a function that runs a network; if it fails, in `view` for example, convert to contiguous and call again.

    Parameters
    ----------
    call : callable() -> result
    *convert : callable() -> bool
        Each converts something, and returns whether there was something to convert. If none was, the error is raised.
    """
    try:
        return call()
    except RuntimeError:
        converted = [convert_one() for convert_one in convert]
        if not any(converted):
            raise
    return call()
