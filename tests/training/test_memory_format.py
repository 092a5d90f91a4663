"""Networks that are not for 4-D tensors, or fail in channels_last format: the format never decides whether they run."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from networks import RECIPE
from torch import nn
from training_runs import same_weights

import fmn_ref as fmn
from fmn_ref.training import memory_format

PLAN = fmn.FusionPlan.from_weights({0: 1.0, 1: 1.0}, 2)


class Pooled(nn.Module):
    """A convolution, the mean over space, and a linear layer."""

    def __init__(self, conv):
        super().__init__()
        self.conv, self.head = conv, nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.conv(x).flatten(2).mean(2))


class Views(nn.Module):
    """The network of many tutorials: it calls `view`, which channels_last activations refuse."""

    def __init__(self, channels=2):
        super().__init__()
        self.conv1, self.norm = nn.Conv2d(channels, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.drop, self.conv2, self.head = nn.Dropout(0.3), nn.Conv2d(4, 8, 3, padding=1), nn.Linear(32, 3)

    def forward(self, x):
        x = F.max_pool2d(self.drop(self.norm(self.conv1(x)).relu()), 2)
        return self.head(F.max_pool2d(self.conv2(x).relu(), 2).view(-1, 32))


class Words(nn.Module):
    """Text, with a 4-D parameter of attention that it views."""

    def __init__(self):
        super().__init__()
        self.words, self.bias, self.head = nn.Embedding(20, 6), nn.Parameter(torch.zeros(1, 2, 5, 3)), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.words(x).mean(1)) + self.bias.view(-1)[:3]


class Volumes(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv3d(1, 4, 3), nn.BatchNorm3d(4), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.norm(self.conv(x)).mean((2, 3, 4)))


CASES = {
    "Conv3d": (Volumes, lambda: torch.randn(48, 1, 5, 6, 6)),
    "ConvTranspose3d": (lambda: Pooled(nn.ConvTranspose3d(1, 4, 3)), lambda: torch.randn(48, 1, 3, 4, 4)),
    "Conv1d": (lambda: Pooled(nn.Conv1d(2, 4, 3)), lambda: torch.randn(48, 2, 9)),
    "Conv2d": (lambda: Pooled(nn.Conv2d(2, 4, 3)), lambda: torch.randn(48, 2, 6, 6)),
    "complex Conv2d": (lambda: ComplexImages(), lambda: torch.randn(48, 2, 6, 6)),
    "Conv2d and view": (Views, lambda: torch.randn(48, 2, 8, 8)),
    "Conv2d of one channel and view": (lambda: Views(1), lambda: torch.randn(48, 1, 8, 8)),
    "text": (Words, lambda: torch.randint(0, 20, (48, 7))),
}


class ComplexImages(Pooled):
    def __init__(self):
        super().__init__(nn.Conv2d(2, 4, 3, dtype=torch.cfloat))

    def forward(self, x):
        return self.head(self.conv(x.to(torch.cfloat)).abs().flatten(2).mean(2))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore:Complex modules are a new feature")
def test_any_network_trains_and_is_evaluated(tmp_path, case):
    make, inputs = CASES[case]
    torch.manual_seed(0)
    x, y, runs = inputs(), torch.arange(48) % 3, []
    for channels_last in (True, False):
        torch.manual_seed(1)
        options = RECIPE | {"channels_last": channels_last, "lr": 0.01}
        runs.append(fmn.train(make(), (x, y), (x, y), epochs=2, run_dir=tmp_path / str(channels_last), **options))
    for a, b in zip(*(run.model.parameters() for run in runs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    fresh = fmn.Run.open(runs[0].run_dir, make())
    probs = fresh.probabilities((x, y))
    np.testing.assert_array_equal(np.stack([p.argmax(1) for p in probs]) == y.numpy(), fresh.history.correct())
    fused = fmn.FusedModel(PLAN, fresh)
    np.testing.assert_allclose(fused(x).exp().detach(), (probs[0] + probs[1]) / 2, atol=1e-5)
    assert fmn.averaged_model(fresh, {0: 1.0, 1: 1.0}, (x, y))(x).shape == (48, 3)
    fmn.distill(make(), fmn.FusedModel(PLAN, fresh), (x, y), epochs=1, ema_decay=0.9, progress=False)


def test_a_network_that_views_trains_to_the_same_bits_as_without_channels_last(tmp_path):
    """The attempt that fails draws no random number and changes no running statistic; neither does a resumed one's."""
    x, y = torch.randn(48, 2, 8, 8), torch.arange(48) % 3
    runs = []
    for name, epochs in (("plain", [3]), ("tried", [3]), ("resumed", [1, 3])):
        for end in epochs:
            torch.manual_seed(1)
            options = RECIPE | {"channels_last": name != "plain", "schedule": "constant"}
            folder = tmp_path / f"{name} {epochs}"
            if end < 3:
                _train_and_stop(folder, (x, y), end, options)
            else:
                runs.append(fmn.train(Views(), (x, y), (x, y), epochs=3, run_dir=folder, **options))
    assert same_weights(runs[0].model, runs[1].model)
    assert same_weights(runs[0].model, runs[2].model)


def _train_and_stop(folder, samples, epoch, options):
    """Stop a training of three epochs at the beginning of one."""
    calls = []

    def augment(inputs):
        calls.append(1)
        if len(calls) > 2 * epoch:
            raise KeyboardInterrupt
        return inputs

    with pytest.raises(KeyboardInterrupt):
        fmn.train(Views(), samples, samples, epochs=3, run_dir=folder, augment=augment, **options)


def test_an_error_that_is_not_of_the_format_is_raised_as_it_is():
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Linear(7, 3))
    memory_format.set_channels_last(model)
    with pytest.raises(RuntimeError, match="mat1 and mat2 shapes cannot be multiplied"):
        memory_format.either_format(lambda: model(torch.zeros(5, 2, 6, 6)), lambda: memory_format.set_contiguous(model))


def test_a_teacher_in_channels_last_that_views_is_predicted():
    x, y = torch.randn(48, 1, 8, 8), torch.arange(48) % 3
    teacher = Views(1)
    expected = teacher.eval()(x)
    teacher.to(memory_format=torch.channels_last)
    found, _ = fmn.training.data.predict(teacher, (x, y))
    torch.testing.assert_close(found, expected.softmax(1), rtol=1e-4, atol=1e-5)
