"""timm: make a run of the checkpoints that its train.py saved. Use --checkpoint-hist 1000; the default keeps ten.

pip install "fmn_ref[numba]" timm
python docs/examples/timm_checkpoints.py output/train/RUN runs/timm --data-dir IMAGES
"""

import argparse
from collections.abc import Iterable
from pathlib import Path

import timm
import torch
from torch import nn

import fmn_ref as fmn


def record_checkpoints(
    folder: Path, run_dir: str, model: nn.Module, loader: Iterable[tuple[torch.Tensor, ...]]
) -> fmn.Run:
    return fmn.from_checkpoints(folder, model, loader, run_dir)  # key="state_dict_ema" takes the averaged weights


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("run_dir")
    parser.add_argument("--data-dir", required=True)
    args = parser.parse_args()
    with torch.serialization.safe_globals([argparse.Namespace]):
        made = torch.load(args.folder / "last.pth.tar", map_location="cpu", weights_only=True)["args"]
    model = timm.create_model(made.model, num_classes=made.num_classes)
    config = timm.data.resolve_data_config(vars(made), model=model)
    images = timm.data.create_dataset(made.dataset, args.data_dir, split=made.val_split)
    loader = timm.data.create_loader(
        images, config["input_size"], 64, use_prefetcher=False, mean=config["mean"], std=config["std"]
    )
    run = record_checkpoints(args.folder, args.run_dir, model, loader)
    probs = run.probabilities(loader)
    print(fmn.fuse(probs, probs.labels, correct=run.history, method="auto"))


if __name__ == "__main__":
    main()
