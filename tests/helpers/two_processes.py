"""Train, fuse and distil in the processes that torchrun started: FOLDER [KILL], where rank 1 dies in epoch KILL."""

import os
import signal
import sys
from pathlib import Path

import torch
from networks import RECIPE, make_data, make_model
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler
from training_runs import fresh

import fmn_ref as fmn

torch.set_num_threads(1)
torch.distributed.init_process_group("gloo")
folder, kill = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else None
train_set, val, _ = make_data()
val = val[0][:-3], val[1][:-3]  # a number that two processes cannot share evenly: the sampler repeats a sample
model = fresh()
batches = 0


def augment(x):
    global batches
    batches += 1
    if torch.distributed.get_rank() == 1 and kill is not None and batches == 8 * kill + 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return x + 0.01 * torch.randn_like(x)


run = fmn.train(model, train_set, val, epochs=8, run_dir=folder / "run", augment=augment, **RECIPE)
probs = run.probabilities(val, split=True)
plan = fmn.fuse(probs, val[1], correct=run.history)
if torch.distributed.get_rank() == 0:
    plan.save(folder / "plan.json")
student = fmn.distill(
    make_model(),
    fmn.FusedModel(plan, run),
    train_set,
    epochs=4,
    run_dir=folder / "student",
    val_data=val,
    **RECIPE | {"progress": True},  # every process predicts for the bar, although rank 0 alone shows it
)
loader = DataLoader(TensorDataset(*val), 50, sampler=DistributedSampler(TensorDataset(*val), shuffle=False))
from_loader = run.probabilities(loader, split=True)
from_loader[0]  # a second pass must find the samples of the first
again = from_loader[-1]
if torch.distributed.get_rank() == 0:
    torch.save([student.state_dict(), torch.tensor(probs[-1]), torch.tensor(again)], folder / "results.pt")
torch.distributed.barrier()  # or one ends while the other still talks to it
torch.distributed.destroy_process_group()
