"""Write one file of every format with the installed package: `python write.py tests/golden/RELEASE`.

Run it once for a release that changes a format. Never write a folder again: the files show what a release wrote.
Names that an early release lacks are left out.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn

import fmn_ref as fmn
from fmn_ref.runs import checkpoints

HERE = Path(__file__).parent
OPTIONS = {"epochs": 3, "lr": 0.5, "batch_size": 8, "seed": 3, "progress": False}


def make_model():
    model = nn.Linear(3, 4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.linspace(-0.5, 0.5, parameter.numel()).view_as(parameter))
    return model


def read_data():
    """(inputs, labels) to train, to validate."""
    with np.load(HERE / "data.npz") as file:
        x, y = torch.from_numpy(file["x"]), torch.from_numpy(file["y"])
    return (x[:24], y[:24]), (x[24:], y[24:])


class Interrupted(Exception):
    """Ends a training as a kill would."""


def interrupted_run(folder):
    """Train until the second epoch's state is on disk, and stop."""
    save, seen = checkpoints.save, []

    def saving(content, path, *args, **options):
        save(content, path, *args, **options)
        seen.append(path.name)
        if seen.count("resume.pt") == 2:
            raise Interrupted

    checkpoints.save = saving
    try:
        fmn.train(make_model(), *read_data(), run_dir=folder, **OPTIONS)
    except Interrupted:
        (folder / ".lock").unlink(missing_ok=True)
    finally:
        checkpoints.save = save


def write(folder):
    """Write the files, each where a user's would stand."""
    train_data, val_data = read_data()
    run = fmn.train(make_model(), train_data, val_data, run_dir=folder / "run", **OPTIONS)
    interrupted_run(folder / "interrupted")
    probs = np.asarray(run.probabilities(val_data)[:])
    plan = fmn.FusionPlan.from_weights({0: 0.25, 2: 0.75}, 3)
    plan.save(folder / "run" / "plan.json")
    others = np.random.default_rng(5).dirichlet(np.ones(4), (3, 24))  # the first of them predicts all labels
    fmn.fuse(others, others[0].argmax(1), window=0).save(folder / "chosen.json")
    teacher = fmn.FusedModel(plan, run)
    options = OPTIONS | {"epochs": 1, "targets": "cached", "targets_dir": folder / "targets"}
    fmn.distill(make_model(), teacher, train_data, **options)
    table = fmn.compare_probabilities(probs[:, :12], val_data[1][:12], probs[:, 12:], val_data[1][12:])
    (folder / "run" / "comparison.json").write_text(table.to_json())
    if hasattr(fmn, "from_checkpoints"):
        fmn.FusionPlan.from_weights({0: 0.5, 2: 1.5}, 3, combine="geometric").save(folder / "pool.json")
        teacher.save(folder / "fused")
        source = str(folder / "run" / "checkpoints" / "*.pt")
        fmn.from_checkpoints(source, make_model(), val_data, folder / "imported", keep_predictions=True)
    for lock in folder.rglob(".lock"):
        lock.unlink()
    for file in folder.rglob("*.ref.json"):
        file.write_text(file.read_text().replace(str(folder.absolute()), "/made/there"))


if __name__ == "__main__":
    write(Path(sys.argv[1]))
