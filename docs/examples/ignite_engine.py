"""PyTorch Ignite: a handler of the trainer's EPOCH_COMPLETED records the evaluator's predictions.

pip install "fmn_ref[demo]" pytorch-ignite
python docs/examples/ignite_engine.py runs/ignite
"""

import sys

import torch
from ignite.engine import Events, create_supervised_evaluator, create_supervised_trainer
from ignite.handlers import EpochOutputStore
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fmn_ref as fmn

EPOCHS = 30


def main(run_dir: str) -> None:
    torch.manual_seed(0)
    x, y = load_digits(return_X_y=True)
    noisy = fmn.symmetric_noise(y[:800], 0.4, 10, seed=0)
    x, y = torch.tensor(x / 16, dtype=torch.float32), torch.tensor(y)
    train_loader = DataLoader(TensorDataset(x[:800], torch.tensor(noisy)), batch_size=50, shuffle=True)
    val_loader = DataLoader(TensorDataset(x[800:1100], y[800:1100]), batch_size=100)
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))
    trainer = create_supervised_trainer(model, torch.optim.Adam(model.parameters(), 1e-2), nn.CrossEntropyLoss())

    evaluator = create_supervised_evaluator(model)
    outputs = EpochOutputStore()
    outputs.attach(evaluator)
    recorder = fmn.Recorder(run_dir, model)

    @trainer.on(Events.EPOCH_COMPLETED)
    def record() -> None:
        evaluator.run(val_loader)
        scores, labels = map(torch.cat, zip(*outputs.data, strict=True))
        recorder.record(trainer.state.epoch - 1, scores, labels)

    trainer.run(train_loader, max_epochs=EPOCHS)
    run = recorder.run
    plan = fmn.fuse(run.probabilities((x[800:1100], y[800:1100])), y[800:1100], correct=run.history, method="auto")
    fused = fmn.FusedModel(plan, run)
    with torch.no_grad():
        final, mixed = (100 * fmn.correctness(net.eval()(x[1100:]), y[1100:]).mean() for net in (model, fused))
    print(f"peak F_e {recorder.peak_forget_fraction:.3f}; test accuracy: final {final:.1f} %, fused {mixed:.1f} %")


if __name__ == "__main__":
    main(sys.argv[1])
