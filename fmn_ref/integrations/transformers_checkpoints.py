"""Hugging Face checkpoints: a run of those that a Trainer saved, and fused models as save_pretrained folders.

`fmn_ref.integrations.transformers` has the same functions beside the callback.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from .. import _check, _files
from ..fusion.plan import FusionPlan
from ..metrics.curves import correctness
from ..runs import adapters, checkpoints, foreign
from ..runs.folder import remove_checkpoint
from ..runs.recorder import Recorder
from ..runs.run import Run
from ..training import data
from ..training.copies import independent
from ..training.ensemble import FusedModel, plan_checkpoints
from ..training.existing import Evaluation

try:
    from safetensors import SafetensorError
    from safetensors.torch import load_model
    from transformers import PreTrainedModel
except ImportError as error:
    raise ImportError(f'{error}; pip install "fmn_ref[transformers]"') from error

AnyPath = str | os.PathLike[str]
Rows = tuple[NDArray[np.bool_], Any]  # correctness (n_samples,) and labels (n_samples,)


def causal_lm_forward(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    """Return logits (n_tokens, vocabulary) and labels (n_tokens,) of a batch; a `forward_fn` with tokens as samples.

    Logits at a position predict the label at the next one. Labels of -100 are left out.
    """
    if not isinstance(batch, Mapping) or "labels" not in batch:
        raise ValueError(f"batch: expected a dict with a key 'labels', got {type(batch).__name__}")
    output = model(**{k: v for k, v in batch.items() if k != "labels"})
    logits, labels = next_tokens(output.logits, batch["labels"])
    return logits, labels.long()


FORWARD_FNS = {"classification": None, "causal_lm": causal_lm_forward}


def check_task(task: str, model: Any) -> None:
    """Raise a ValueError where `task` is "classification" and the network predicts tokens, by the name of its class."""
    name = type(checkpoints.unwrap(model)).__name__
    if task == "classification" and re.search("CausalLM|LMHead", name):
        raise ValueError(f"task: expected 'causal_lm' for a {name}, whose samples are tokens, got {task!r}")


def next_tokens(outputs: Any, labels: Any) -> tuple[Any, Any]:
    """Pair each output with the next label, without -100: (N, T, ...) and (N, T) to (n_tokens, ...) and (n_tokens,)."""
    if labels.ndim != 2 or outputs.shape[:2] != labels.shape:
        got = f"{tuple(labels.shape)} for outputs of shape {tuple(outputs.shape)}"
        raise ValueError(f"labels: expected shape (n_sequences, n_tokens), got {got}")
    known = labels[:, 1:] != -100
    return outputs[:, :-1][known], labels[:, 1:][known]


def predicted_classes(logits: Any) -> Tensor:
    """Return the likeliest class of each sample or token, on the device of the logits; -1 where one is NaN."""
    scores: Tensor = logits[0] if isinstance(logits, (tuple, list)) else logits  # hidden states may follow
    highest, classes = scores.max(-1)
    return classes.masked_fill(highest.isnan(), -1)


def checked_correctness(outputs: Any, labels: Any) -> NDArray[np.bool_]:
    """`correctness` of scores, or of `predicted_classes`; ValueError where those are -1."""
    if outputs.ndim == 1 and (outputs < 0).any():
        raise ValueError(f"logits: expected numbers, got NaN for sample {int((outputs < 0).argmax())}")
    return correctness(outputs, labels)


def from_trainer(
    output_dir: AnyPath,
    run_dir: AnyPath,
    model: nn.Module,
    eval_data: Any,
    *,
    task: str = "classification",
    keep: str = "all",
    half: bool = False,
    batch_size: int = 256,
) -> Run:
    """Evaluate the checkpoints that a Trainer saved, and make a run of their correctness and weights.

    Checkpoints are evaluated in the order of their steps, with one in memory at a time. If interrupted, call it again
    to go on: it first evaluates the latest recorded checkpoint once more, to see that nothing has changed. Weights are
    copied, so you may delete the Trainer's.

    Parameters
    ----------
    output_dir : path
        Contains checkpoint-STEP/model.safetensors, in shards or not; or adapter_model.safetensors, for a PeftModel.
    run_dir : path
        Folder of the run.
    model : nn.Module
        A model of the checkpoints' architecture, on the device to use. Its own weights do not change.
    eval_data : DataLoader or Dataset
        A DataLoader that does not shuffle (``trainer.get_eval_dataloader()``), or a Dataset of dicts with "labels".
    task, keep, half
        As in `RecorderCallback`.
    batch_size : int, default 256
        For a Dataset.

    Raises
    ------
    FileNotFoundError
        `output_dir` contains no checkpoint.
    ValueError
        A checkpoint is damaged or does not fit the model; NaN among its logits; `run_dir` holds a run of another
        `output_dir`, of a later training in the same folder, or of other `eval_data`.
    """
    data.check_module(model, "model")
    folders = _checkpoint_folders(_files.absolute(output_dir))
    forward_fn = FORWARD_FNS[_check.choice(task, tuple(FORWARD_FNS), "task")]
    check_task(task, model)
    options: dict[str, Any] = {"forward_fn": forward_fn, "batch_size": batch_size, "name": "eval_data"}
    evaluation = Evaluation(model, eval_data, _load_checkpoint, **options)
    config = {"output_dir": str(_files.absolute(output_dir).resolve()), "task": task}
    with Recorder(run_dir, model, keep, half=half, config=config, forward_fn=forward_fn) as recorder:
        return evaluation.record(recorder, folders)


def _checkpoint_folders(output_dir: Path) -> dict[int, Path]:
    """Find the Trainer's checkpoints: folder by step, ascending."""
    found = [p for p in output_dir.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name)]
    if not found:
        raise FileNotFoundError(f"{output_dir}: no checkpoint-STEP there")
    return dict(sorted((int(p.name[11:]), p) for p in found))


def _load_checkpoint(model: nn.Module, folder: Path) -> None:
    with data.computing(model, keep=True) as network:
        if adapters.adapter_of(network) is not None:
            path = folder / "adapter_model.safetensors"
            checkpoints.load_weights(network, foreign.read_state(path, network)[0], path)
            return
        if isinstance(network, PreTrainedModel):
            network.load_state_dict(_from_pretrained(type(network), folder).state_dict())
            return
        with _naming(folder):
            load_model(network, folder / "model.safetensors")


def _from_pretrained(model_class: Any, folder: Path) -> Any:
    """Call `from_pretrained`, which knows shards, tied weights and old names, but refuse what it would initialise."""
    if not (folder / "config.json").is_file():  # from_pretrained would search the hub
        raise ValueError(f"{folder}: no model there (config.json is missing)")
    with _naming(folder):
        model, info = model_class.from_pretrained(folder, local_files_only=True, output_loading_info=True)
    faults = {key: sorted(map(str, names)) for key, names in info.items() if names}
    if faults:
        raise ValueError(f"{folder}: does not fit {type(model).__name__}: {faults}")
    return model


@contextmanager
def _naming(folder: Path) -> Iterator[None]:
    """Turn errors of the loaders into a ValueError that names the folder."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"{folder}: not a readable checkpoint of this model: {error}") from None


def save_fused(folder: AnyPath, plan: FusionPlan, run: Run, processing_class: Any = None) -> None:
    """Write a fused model: plan.json, and a subfolder for each of its checkpoints that `from_pretrained` loads.

    An averaged model is a single one: ``fmn_ref.averaged_model(run, plan.weights, None).save_pretrained(folder)``.

    Parameters
    ----------
    folder : path
        A fused model in it is replaced, once the new one is complete; other files stay. member_00003 is row 3 of the
        run.
    plan : FusionPlan
    run : Run
        With its model attached.
    processing_class : optional
        Tokenizer or processor, saved in `folder` by its `save_pretrained`.

    Raises
    ------
    TypeError
        The run's model is no PreTrainedModel.
    ValueError, FileNotFoundError
        As `FusedModel`; another tool's files have the names of those to write. What was in the folder stays.
    """
    original, paths = plan_checkpoints(plan, run)
    if not isinstance(original, PreTrainedModel):
        hint = "; fmn_ref.integrations.peft saves adapters" if hasattr(original, "peft_config") else ""
        raise TypeError(f"run: expected a model with save_pretrained, got {type(original).__name__}{hint}")
    model = independent(original)

    def save(path: Path, member: Path) -> None:
        with data.computing(checkpoints.load_into(model, path)) as network:
            network.save_pretrained(member)  # type: ignore[operator]

    write_fused(folder, plan, paths, save, processing_class)


def write_fused(
    folder: AnyPath, plan: FusionPlan, paths: dict[int, Path], save: Callable[[Path, Path], None], processing_class: Any
) -> None:
    """Write a fused model as `save_fused` does; `save` gets the paths of a checkpoint and of its member's folder."""
    target = _files.absolute(folder)
    _files.make_folder(target)
    replaced = _fused_members(target, paths)
    with _beside(target / "members") as new:
        for row, path in paths.items():
            save(path, new / f"member_{row:05d}")
        if processing_class is not None:
            processing_class.save_pretrained(target)
        (target / "plan.json").unlink(missing_ok=True)  # never a plan beside the members of another
        _files.sync(target)
        for member in replaced:
            remove_checkpoint(member)
        for member in new.iterdir():
            member.rename(target / member.name)
        _files.sync_tree(target)
    plan.save(target / "plan.json")


@contextmanager
def _beside(path: Path) -> Iterator[Path]:
    """Yield a new folder of a temporary name, which is deleted at the end, and by the next call after a kill."""
    _files.remove_leftovers(path.parent, path.name)
    folder = _files.unpredictable(path)
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _fused_members(folder: Path, rows: Iterable[int]) -> list[Path]:
    """List the members of the fused model in a folder; ValueError if other files have the names of new ones."""
    if (folder / "plan.json").exists():
        FusionPlan.load(folder / "plan.json")  # refuses another tool's
    named = [p for p in folder.glob("member_*") if re.fullmatch(r"member_\d{5,}", p.name)]
    members = [p for p in named if (p / "config.json").is_file() or (p / adapters.CONFIG).is_file()]
    for path in (folder / f"member_{row:05d}" for row in rows):
        if path in named and path not in members:
            raise ValueError(f"{path}: not a member of a fused model; choose another folder")
    return members


def load_fused(folder: AnyPath, model_class: Any) -> FusedModel:
    """Load a fused model that `save_fused` wrote.

    Parameters
    ----------
    folder : path
    model_class : class with `from_pretrained`
        AutoModelForSequenceClassification, AutoModelForCausalLM, ...

    Raises
    ------
    FileNotFoundError
        `folder` contains no plan.json.
    ValueError
        A file is damaged, or a member is missing or does not fit the class. The message names it.
    """
    source = _files.absolute(folder)
    plan = FusionPlan.load(source / "plan.json")
    members = [_from_pretrained(model_class, source / f"member_{row:05d}") for row in plan.weights]
    return FusedModel.of_members(members, plan)
