"""Small training runs for the tests, and a comparison of weights."""

import torch
from networks import RECIPE, make_data, make_model

import fmn_ref as fmn


def fresh(seed=1):
    """A new network, whose weights depend on the seed only."""
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
