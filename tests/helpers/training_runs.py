"""Small training runs for the tests, ways to interrupt them, and a comparison of weights."""

import contextlib

import pytest
import torch
from networks import RECIPE, make_data, make_model

import fmn_ref as fmn
from fmn_ref.runs import checkpoints


def fresh(seed=1):
    """Make a new network, whose weights depend on the seed only."""
    torch.manual_seed(seed)
    return make_model()


def trained(folder, epochs=4, init_seed=1, **options):
    """Train a new network on the data of `make_data` with RECIPE; `options` override it."""
    train_set, val, _ = make_data()
    return fmn.train(fresh(init_seed), train_set, val, epochs=epochs, run_dir=folder, **RECIPE | options)


def same_weights(a, b):
    """Tell whether two modules, or their state_dicts, hold equal tensors."""
    states = [m if isinstance(m, dict) else m.state_dict() for m in (a, b)]
    return all(torch.equal(x, y) for x, y in zip(*(s.values() for s in states), strict=True))


@contextlib.contextmanager
def interrupted_at(name, nth=1):
    """Interrupt the training inside the `with` before it writes the file `name` for the `nth` time."""
    save, calls = checkpoints.save, []

    def interrupt(content, path):
        calls.append(path.name)
        if path.name == name and calls.count(name) == nth:
            raise KeyboardInterrupt
        save(content, path)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):  # noqa: PT012
        patch.setattr(checkpoints, "save", interrupt)
        yield
