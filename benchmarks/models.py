"""Networks of the experiments. Each is made anew by a call; weights come from torch's generator."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def _block(n_in: int, n_out: int, stride: int = 1) -> list[nn.Module]:
    return [nn.Conv2d(n_in, n_out, 3, stride, 1, bias=False), nn.BatchNorm2d(n_out), nn.ReLU()]


def small_cnn(n_channels: int, size: int, n_classes: int) -> nn.Module:
    """For images of 8 (digits), 28 (MNIST) or 32 pixels (CIFAR): enough weights to memorise 10 000 wrong labels."""
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
    return nn.Sequential(*blocks, *head).to(memory_format=torch.channels_last)


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
    """ResNet-18 with the stem for small images: 3 x 3, no pooling."""
    layers: list[nn.Module] = _block(n_channels, width)
    n_in = width
    for stage, stride in enumerate((1, 2, 2, 2)):
        n_out = width * 2**stage
        layers += [Residual(n_in, n_out, stride), Residual(n_out, n_out, 1)]
        n_in = n_out
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(n_in, n_classes)]
    return nn.Sequential(*layers, *head).to(memory_format=torch.channels_last)
