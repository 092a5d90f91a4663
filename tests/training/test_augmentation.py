"""Tests of crop_flip against a loop over images."""

import pickle

import pytest
import torch

import fmn_ref as fmn

FORMATS = [torch.contiguous_format, torch.channels_last]
SHAPES = [(7, 3, 8, 8), (5, 1, 9, 6), (1, 4, 5, 7), (3, 2, 1, 1), (0, 3, 8, 8)]


def images(shape, dtype=torch.float32, memory_format=torch.contiguous_format):
    """Images whose values are all different and not 0."""
    x = torch.arange(torch.Size(shape).numel()).reshape(shape) + 1
    return x.to(dtype).contiguous(memory_format=memory_format)


def augmented(x, padding, flip=True, seed=0):
    torch.manual_seed(seed)
    return fmn.crop_flip(padding, flip)(x)


def one_by_one(x, padding, flip=True, seed=0):
    """Slow twin of crop_flip: the same draws, then one image at a time."""
    torch.manual_seed(seed)
    n, _, height, width = x.shape
    top, left = torch.randint(0, 2 * padding + 1, (2, n)).tolist()
    mirrored = (torch.rand(n) < 0.5).tolist() if flip else [False] * n
    out = torch.empty_like(x)
    for i in range(n):
        padded = torch.nn.functional.pad(x[i], (padding,) * 4)
        crop = padded[:, top[i] : top[i] + height, left[i] : left[i] + width]
        out[i] = crop.flip(2) if mirrored[i] else crop
    return out


@pytest.mark.parametrize("flip", [True, False])
@pytest.mark.parametrize("padding", [0, 1, 4])
@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_slow_twin(shape, dtype, memory_format, padding, flip):
    x = images(shape, dtype, memory_format)
    before = x.clone()
    for seed in range(3):
        out = augmented(x, padding, flip, seed)
        drawn = torch.rand(1)
        assert torch.equal(out, one_by_one(x, padding, flip, seed))
        assert drawn == torch.rand(1)  # both use equally many random numbers
        assert out.dtype == dtype
    assert torch.equal(x, before)


@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
def test_keeps_the_memory_format(memory_format):
    out = augmented(images((4, 3, 8, 8), memory_format=memory_format), 2)
    assert out.stride() == torch.empty(4, 3, 8, 8).contiguous(memory_format=memory_format).stride()


def test_strided_input():
    x = images((6, 3, 9, 16))[::2, :, 1:, ::2]
    assert torch.equal(augmented(x, 2), one_by_one(x, 2))


def test_every_image_has_its_own_draw():
    """Copies of one image get every shift, mirrored and not, about equally often."""
    x = images((1, 1, 5, 5)).expand(4000, 1, 5, 5)
    out = augmented(x, 1)
    kinds, counts = out.flatten(1).unique(dim=0, return_counts=True)
    assert len(kinds) == 3 * 3 * 2
    assert counts.min() > 4000 / 18 * 0.7
    assert counts.max() < 4000 / 18 * 1.3


def test_a_seed_repeats_it():
    x = images((64, 3, 8, 8))
    assert torch.equal(augmented(x, 2, seed=1), augmented(x, 2, seed=1))
    assert not torch.equal(augmented(x, 2, seed=1), augmented(x, 2, seed=2))
    augment = fmn.crop_flip(2)
    assert not torch.equal(augment(x), augment(x))


def test_without_padding_and_flip_nothing_changes():
    x = images((5, 3, 8, 8))
    out = augmented(x, 0, False)
    assert torch.equal(out, x)
    assert out.data_ptr() != x.data_ptr()


def test_never_waits_for_the_device():
    """Works on meta tensors, which have no values to read back."""
    assert fmn.crop_flip(4)(torch.empty(8, 3, 32, 32, device="meta")).shape == (8, 3, 32, 32)


def test_compiles_to_one_graph():
    x = images((6, 3, 8, 8))
    compiled = torch.compile(fmn.crop_flip(2), backend="eager", fullgraph=True)
    torch.manual_seed(0)
    assert torch.equal(compiled(x), one_by_one(x, 2))


def test_gradients_go_back_to_where_values_came_from():
    x = images((4, 2, 6, 6)).requires_grad_()
    out = augmented(x, 2)
    out.sum().backward()
    seen = torch.isin(x.detach(), out.detach())
    assert torch.equal(x.grad, seen.float())


def test_pickles():
    x = images((9, 3, 8, 8))
    augment = pickle.loads(pickle.dumps(fmn.crop_flip(3, flip=False)))
    torch.manual_seed(0)
    assert torch.equal(augment(x), one_by_one(x, 3, flip=False))


def test_says_what_is_wrong():
    for padding in (1.5, "4", True):
        with pytest.raises(TypeError, match="padding"):
            fmn.crop_flip(padding)
    with pytest.raises(ValueError, match="padding"):
        fmn.crop_flip(-1)
    for shape in ((3, 32, 32), (2, 784)):
        with pytest.raises(ValueError, match=r"augment: expected images \(B, C, H, W\), got shape \(\d+, "):
            fmn.crop_flip(4)(torch.zeros(shape))
