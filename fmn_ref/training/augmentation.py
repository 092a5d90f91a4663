"""Random crops and flips of image batches, on their device, without a loop over images."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import _check


def crop_flip(padding: int, flip: bool = True) -> Callable[[Tensor], Tensor]:
    """Make an augmentation for small images: random crop after zero padding, and random horizontal flip.

    Parameters
    ----------
    padding : int >= 0
        Zeros that are added on each side. The crop has the image's size, at a uniformly drawn position. CIFAR: 4.
    flip : bool, default True
        Mirror each image with probability 1/2.

    Returns
    -------
    callable
        Maps images (B, C, H, W) of any dtype to new images of the same shape, dtype, device and memory format; for
        `augment` of `train` and `distill`. Each image is drawn separately, from the device's global torch generator.

    Raises
    ------
    TypeError, ValueError
        `padding` is not an integer >= 0. When the result is called: the batch does not have four dimensions.

    Examples
    --------
    >>> import torch
    >>> crop_flip(4)(torch.zeros(2, 3, 32, 32)).shape
    torch.Size([2, 3, 32, 32])

    References
    ----------
    He et al. 2016, "Deep Residual Learning for Image Recognition", Section 4.2.
    """
    return partial(_augment, padding=_check.number(padding, 0, 2**31, "padding", int), flip=flip)


def _augment(images: Tensor, padding: int, flip: bool) -> Tensor:
    if images.ndim != 4:
        raise ValueError(f"augment: expected images (B, C, H, W), got shape {tuple(images.shape)}")
    channels_last = not images.is_contiguous() and images.is_contiguous(memory_format=torch.channels_last)
    # In memory, each pixel is a row of `depth` values: C planes of depth 1, or (channels last) one plane of depth C.
    planes = images.permute(0, 2, 3, 1)[:, None] if channels_last else images[..., None]
    n, n_planes, height, width, depth = planes.shape
    padded_height, padded_length = height + 2 * padding, (width + 2 * padding) * depth
    padded = F.pad(planes, (0, 0, *[padding] * 4)).reshape(n * n_planes * padded_height, padded_length)

    arange = partial(torch.arange, device=images.device)
    top, left = torch.randint(0, 2 * padding + 1, (2, n, 1), device=images.device)
    columns = left + arange(width)  # (B, W)
    if flip:
        mirrored = torch.rand(n, 1, device=images.device) < 0.5
        columns = torch.where(mirrored, columns.flip(1), columns)
    # Copy whole image rows, then values within each row: faster than one index per pixel, with fewer indices.
    rows = (arange(n * n_planes) * padded_height).view(n, n_planes, 1) + (top + arange(height))[:, None]
    values = (columns[:, :, None] * depth + arange(depth)).view(n, 1, 1, width * depth)
    chosen = padded.index_select(0, rows.flatten()).view(n, n_planes, height, padded_length)
    out = chosen.gather(3, values.expand(n, n_planes, height, width * depth)).view(planes.shape)
    return out[:, 0].permute(0, 3, 1, 2) if channels_last else out[..., 0]
