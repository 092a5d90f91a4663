"""Train, fuse and save the plan in the folder given: the process that test_resume kills."""

import sys
from pathlib import Path

import torch
from networks import RECIPE, make_data, make_model

import fmn_ref as fmn

torch.set_num_threads(1)
folder = Path(sys.argv[1])
train_set, val, _ = make_data()
torch.manual_seed(1)
model = make_model()
_ = fmn.train, fmn.distill  # everything is loaded: from here on it may be killed
print("ready", flush=True)
run = fmn.train(model, train_set, val, epochs=60, run_dir=folder, **RECIPE)
fmn.fuse(run.probabilities(val), val[1], correct=run.history).save(folder / "plan.json")
student = fmn.distill(make_model(), model, train_set, epochs=10, run_dir=folder / "student", **RECIPE)
torch.save([p.detach() for p in student.parameters()], folder / "student.pt")
