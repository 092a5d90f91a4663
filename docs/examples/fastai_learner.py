"""fastai: a Callback records every validation of Learner.fit, but not lr_find and get_preds.

pip install "fmn_ref[demo]" fastai
python docs/examples/fastai_learner.py runs/fastai
"""

import sys

import torch
from fastai.basics import Callback, DataLoaders, Learner, to_detach
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import TensorDataset

import fmn_ref as fmn

EPOCHS = 30


class Forgetting(Callback):
    remove_on_fetch = True  # not in get_preds

    def __init__(self, run_dir: str) -> None:
        self.run_dir = run_dir

    def before_fit(self) -> None:
        self.run = not hasattr(self.learn, "lr_finder")
        if self.run:
            self.history = fmn.Recorder(self.run_dir, self.learn.model)

    def before_validate(self) -> None:
        self.seen = []

    def after_pred(self) -> None:
        if not self.training:
            self.seen.append((to_detach(self.pred), to_detach(self.y)))

    def after_validate(self) -> None:
        self.history.record(self.epoch, *map(torch.cat, zip(*self.seen, strict=True)))


def main(run_dir: str) -> None:
    torch.manual_seed(0)
    x, y = load_digits(return_X_y=True)
    noisy = fmn.symmetric_noise(y[:800], 0.4, 10, seed=0)
    x, y = torch.tensor(x / 16, dtype=torch.float32), torch.tensor(y)
    train, val = TensorDataset(x[:800], torch.tensor(noisy)), TensorDataset(x[800:1100], y[800:1100])
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))

    recording = Forgetting(run_dir)
    data = DataLoaders.from_dsets(train, val, bs=50)
    loss = nn.CrossEntropyLoss()
    learner = Learner(data, model, loss_func=loss, cbs=recording)
    learner.fit(EPOCHS, 1e-2)

    run = recording.history.run
    plan = fmn.fuse(run.probabilities(val), y[800:1100], correct=run.history, method="auto")
    fused = fmn.FusedModel(plan, run)
    with torch.no_grad():
        final, mixed = (100 * fmn.correctness(net.eval()(x[1100:]), y[1100:]).mean() for net in (model, fused))
    peak = fmn.forget_fraction(run.history).max()
    print(f"peak F_e {peak:.3f}; test accuracy: final {final:.1f} %, fused {mixed:.1f} %")


if __name__ == "__main__":
    main(sys.argv[1])
