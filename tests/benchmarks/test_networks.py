"""The experiments' networks."""

import copy
from functools import partial

import pytest
import torch
from torch.nn import functional as F

from fmn_ref.benchmarks.experiments import networks

NETWORKS = {
    "mlp": networks.mlp,
    "small_cnn": networks.small_cnn,
    "small_vit": networks.small_vit,
    "small_convnext": networks.small_convnext,
    "resnet18": lambda n_channels, size, n_classes: networks.resnet18(n_channels, n_classes, width=8),
}


@pytest.fixture(params=NETWORKS)
def network(request):
    torch.manual_seed(0)
    return NETWORKS[request.param]


def n_parameters(model):
    return sum(p.numel() for p in model.parameters())


def batch(n, n_channels=1, size=8, n_classes=10):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, n_channels, size, size, generator=generator)
    return x, torch.randint(0, n_classes, (n,), generator=generator)


@pytest.mark.parametrize(("n_channels", "size", "n_classes"), [(1, 8, 10), (1, 28, 10), (3, 32, 100), (3, 64, 200)])
def test_shapes(network, n_channels, size, n_classes):
    model = network(n_channels, size, n_classes).eval()
    x, _ = batch(2, n_channels, size)
    with torch.no_grad():
        logits = model(x)
        assert logits.shape == (2, n_classes)
        assert logits.isfinite().all()
        torch.testing.assert_close(model(x.contiguous(memory_format=torch.channels_last)), logits, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(model(x[:1]), logits[:1], rtol=1e-3, atol=1e-4)  # samples do not mix


def test_the_gradient_reaches_every_parameter(network):
    model = network(3, 32, 10)
    x, y = batch(4, 3, 32)
    F.cross_entropy(model(x), y).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


def test_it_learns_random_labels(network):
    model = network(1, 8, 10)
    x, y = batch(32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(20):
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_weights_can_be_stored_and_exchanged(network, tmp_path):
    """Checkpoints and fused models call load_state_dict, deepcopy and functional_call."""
    model, other = network(1, 8, 10).eval(), network(1, 8, 10).eval()
    x, _ = batch(4)
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    weights = torch.load(tmp_path / "weights.pt", weights_only=True)
    with torch.no_grad():
        expected = model(x)
        assert not torch.equal(other(x), expected)
        assert torch.equal(torch.func.functional_call(other, weights, (x,)), expected)
        assert torch.equal(copy.deepcopy(model)(x), expected)
    # With gradients, torch's transformer layers take another path, which gives other bits.
    torch.testing.assert_close(torch.func.functional_call(other, weights, (x,)), model(x))
    other.load_state_dict(weights)
    assert torch.equal(other(x), model(x))


def test_runs_in_bfloat16(network):
    model = network(1, 8, 10)
    x, y = batch(4)
    with torch.autocast("cpu", torch.bfloat16):
        F.cross_entropy(model(x), y).backward()
        with torch.no_grad():
            assert model.eval()(x).isfinite().all()


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (partial(networks.resnet18, 3, 100), 11_220_132),  # the CIFAR ResNet-18
        (partial(networks.resnet18, 3, 10), 11_173_962),
        (partial(networks.small_cnn, 3, 32, 100), 643_716),  # committed results were made with these
        (partial(networks.small_cnn, 1, 28, 10), 206_970),
        (partial(networks.small_cnn, 1, 8, 10), 71_802),
    ],
)
def test_numbers_of_parameters(make, expected):
    assert n_parameters(make()) == expected


def test_new_networks_are_small():
    """They have about as many parameters as the CNN, so that a CPU can train them on CIFAR-100."""
    for make in (networks.mlp, networks.small_vit, networks.small_convnext):
        assert 300_000 < n_parameters(make(3, 32, 100)) < 1_000_000
