"""Networks of the experiments. Each call makes a new network, with weights from torch's global generator."""

from __future__ import annotations

from itertools import pairwise
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def mlp(n_channels: int, size: int, n_classes: int, hidden: int = 256, depth: int = 2) -> nn.Module:
    """Multilayer perceptron with `depth` hidden layers and ReLU."""
    widths = [n_channels * size**2, *[hidden] * depth]
    layers: list[nn.Module] = [nn.Flatten()]
    for n_in, n_out in pairwise(widths):
        layers += [nn.Linear(n_in, n_out), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(widths[-1], n_classes))


def _channels_last(*layers: nn.Module) -> nn.Module:
    network = nn.Sequential(*layers)
    return cast(nn.Module, network.to(memory_format=torch.channels_last))  # type: ignore[call-overload]


def _block(n_in: int, n_out: int, stride: int = 1) -> list[nn.Module]:
    return [nn.Conv2d(n_in, n_out, 3, stride, 1, bias=False), nn.BatchNorm2d(n_out), nn.ReLU()]


def small_cnn(n_channels: int, size: int, n_classes: int) -> nn.Module:
    """CNN for images of 8 (digits), 28 (MNIST) or 32 pixels (CIFAR). It can memorise 10 000 wrong labels."""
    if size <= 8:
        blocks = [*_block(n_channels, 16), *_block(16, 32), nn.MaxPool2d(2)]
        features, hidden = 32 * (size // 2) ** 2, 128
    elif size <= 28:
        blocks = [*_block(n_channels, 16, 2), *_block(16, 32), nn.MaxPool2d(2)]
        features, hidden = 32 * (size // 4) ** 2, 128
    else:
        blocks = [*_block(n_channels, 32, 2), *_block(32, 64), nn.MaxPool2d(2), *_block(64, 128), nn.MaxPool2d(2)]
        features, hidden = 128 * (size // 8) ** 2, 256
    head = [nn.Flatten(), nn.Linear(features, hidden), nn.ReLU(), nn.Linear(hidden, n_classes)]
    return _channels_last(*blocks, *head)


class Residual(nn.Module):
    """Two 3 x 3 convolutions beside a shortcut (He et al. 2016)."""

    def __init__(self, n_in: int, n_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(n_in, n_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(n_out)
        self.conv2 = nn.Conv2d(n_out, n_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(n_out)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or n_in != n_out:
            self.shortcut = nn.Sequential(nn.Conv2d(n_in, n_out, 1, stride, bias=False), nn.BatchNorm2d(n_out))

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(out + self.shortcut(x))


def resnet18(n_channels: int, n_classes: int, width: int = 64) -> nn.Module:
    """ResNet-18 whose stem suits small images: 3 x 3, no pooling.

    With 100 classes it has 0.7, 2.8 and 11.2 M parameters for a width of 16, 32 and 64.
    """
    layers: list[nn.Module] = _block(n_channels, width)
    n_in = width
    for stage, stride in enumerate((1, 2, 2, 2)):
        n_out = width * 2**stage
        layers += [Residual(n_in, n_out, stride), Residual(n_out, n_out, 1)]
        n_in = n_out
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(n_in, n_classes)]
    return _channels_last(*layers, *head)


class VisionTransformer(nn.Module):
    """Transformer over patches: learned positions, pre-norm layers, mean over the tokens."""

    def __init__(
        self, n_channels: int, size: int, n_classes: int, patch: int, width: int, depth: int, heads: int
    ) -> None:
        super().__init__()
        self.patches = nn.Conv2d(n_channels, width, patch, patch)
        self.position = nn.Parameter(0.02 * torch.randn((size // patch) ** 2, width))
        self.layers = nn.Sequential(
            *[
                nn.TransformerEncoderLayer(width, heads, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
                for _ in range(depth)
            ]
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, n_classes)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2) + self.position  # (B, patches, width)
        return cast(Tensor, self.head(self.norm(self.layers(tokens)).mean(1)))


def small_vit(
    n_channels: int, size: int, n_classes: int, patch: int = 4, width: int = 96, depth: int = 4, heads: int = 4
) -> nn.Module:
    """Vision Transformer (Dosovitskiy et al. 2021), 0.5 M parameters. `size` must be a multiple of `patch`."""
    return VisionTransformer(n_channels, size, n_classes, patch, width, depth, heads)


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of each pixel of (B, C, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvNextBlock(nn.Module):
    """Depthwise 7 x 7, LayerNorm and two pointwise layers beside the identity, scaled per channel."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 7, 1, 3, groups=width)
        self.pointwise = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )
        self.scale = nn.Parameter(torch.full((width,), 0.1))  # the paper's 1e-6 suits much deeper networks

    def forward(self, x: Tensor) -> Tensor:
        out = self.pointwise(self.depthwise(x).permute(0, 2, 3, 1))  # (B, H, W, C): pointwise layers are linear
        return cast(Tensor, x + (self.scale * out).permute(0, 3, 1, 2))


def small_convnext(
    n_channels: int, size: int, n_classes: int, width: int = 32, depths: tuple[int, ...] = (2, 2, 2)
) -> nn.Module:
    """ConvNeXt (Liu et al. 2022), 0.4 M parameters, or 1.6 M for a width of 64.

    Each stage halves the image's size and doubles the width.
    """
    stem = 2 if size >= 32 else 1
    layers: list[nn.Module] = [nn.Conv2d(n_channels, width, stem, stem), ChannelNorm(width)]
    for stage, depth in enumerate(depths):
        if stage > 0:
            layers += [ChannelNorm(width), nn.Conv2d(width, 2 * width, 2, 2)]
            width *= 2
        layers += [ConvNextBlock(width) for _ in range(depth)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LayerNorm(width), nn.Linear(width, n_classes)]
    return _channels_last(*layers, *head)
