"""Fixtures that every test can use. Functions stand in tests/helpers."""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from inputs import BACKENDS
from networks import make_data
from training_runs import trained

import fmn_ref as fmn
from fmn_ref.kernels import backend

# A slow machine and an unlucky draw are no faults of the code: neither deadlines nor health checks.
settings.register_profile("fmn_ref", deadline=None, suppress_health_check=list(HealthCheck), print_blob=True)
settings.load_profile("fmn_ref")


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _one_thread_again():
    """A benchmark sets its own number, and trainings on another number have other bits."""
    yield
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _same_draws():
    """torch draws the same numbers in a test, whichever tests ran before it."""
    torch.manual_seed(20260101)


@pytest.fixture
def rng():
    return np.random.default_rng(20260101)


@pytest.fixture
def use_backend(monkeypatch):
    """A function that forces a backend by name, until the test ends."""

    def use(name):
        monkeypatch.setenv("FMN_BACKEND", name)
        backend.choose_again()

    yield use
    backend.choose_again()


@pytest.fixture(params=BACKENDS)
def each_backend(request, use_backend):
    """The name of the backend in use; the test runs once per backend."""
    use_backend(request.param)
    return request.param


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """A finished training of 12 epochs, for tests that only read it."""
    return trained(tmp_path_factory.mktemp("run"), epochs=12, init_seed=2)


@pytest.fixture(scope="session")
def unbroken(tmp_path_factory):
    """A finished training of 6 epochs, to compare with interrupted ones."""
    return trained(tmp_path_factory.mktemp("unbroken"), epochs=6)


@pytest.fixture(scope="session")
def plan(run):
    """The fusion of `run`, which has members."""
    _, val, _ = make_data()
    plan = fmn.fuse(run.probabilities(val), val[1], correct=run.history)
    assert plan.members  # otherwise the tests that use it would show little
    return plan


@pytest.fixture(scope="session")
def teacher(plan, run):
    return fmn.FusedModel(plan, run)
