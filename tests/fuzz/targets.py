"""The readers of files: what each reads, files to begin with, and frames that let damaged bytes past a checksum."""

import functools
import io
import json
import pickle
import struct
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import file_names
import frameworks
import numpy as np
import torch
import torch.distributed.checkpoint.metadata

import fmn_ref as fmn
from fmn_ref.reporting.comparison import read_comparison
from fmn_ref.runs import (
    content,
    foreign,
    importers,
    lm_eval,
    load,
    pickles,
    references,
    tensors,
    text,
    torch_files,
)
from fmn_ref.runs.checkpoints import load_weights
from fmn_ref.runs.folder import RunFolder
from fmn_ref.training import engine, store
from fmn_ref.training.engine import Loop
from fmn_ref.training.kept import KeptPredictions
from fmn_ref.training.recipe import Recipe
from fmn_ref.training.target_files import TargetFolder

GOLDEN = Path(__file__).parents[1] / "golden" / "0.1.0rc1"
LM_EVAL = Path(__file__).parents[1] / "data" / "lm_eval"


@dataclass
class Target:
    """A reader.

    Attributes
    ----------
    file : str
        Name of the file that is fuzzed.
    read : callable(path)
    seeds : callable() -> list of bytes
    mended : callable(bytes) -> bytes
        Puts checksums and frames right, so that the reader gets past them.
    beside : dict of {str: bytes}
        Files that must be in the folder too.
    names : tuple of str
        What an error may name instead of the file.
    temporary : bool
        Whether the reader makes temporary files.
    classes : set of str
        Classes and functions, as "MODULE.NAME", that the reader may look up for a pickle.
    """

    file: str
    read: Any
    seeds: Any
    mended: Any = bytes
    beside: Any = dict
    names: tuple[str, ...] = ()
    temporary: bool = False
    classes: frozenset[str] = frozenset()

    def prepare(self, folder):
        """Write the files beside the one that is fuzzed; return the latter's path."""
        for name, data in self.beside().items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(data)
        path = folder / self.file
        path.parent.mkdir(parents=True, exist_ok=True)
        return path


def golden(*names):
    return lambda: [(GOLDEN / name).read_bytes() for name in names]


def model():
    return torch.nn.Linear(3, 4)


def dumped(*values):
    return lambda: [json.dumps(value).encode() for value in values]


# --- histories ---


def read_history(path):
    for verify in (True, False):
        fmn.CorrectnessHistory.open(path, verify=verify).correct()


def mended_history(data):
    """The checksums of the header and of each whole record."""
    if len(data) < 64:
        return data
    data = bytearray(data)
    data[56:64] = struct.pack("<II", zlib.crc32(data[:56]), 0)
    n_samples = struct.unpack_from("<Q", data, 16)[0]
    size = 64 + -(-n_samples // 512) * 64
    for at in range(64, len(data) - size + 1, size):
        data[at + 4 : at + 8] = struct.pack(
            "<I", zlib.crc32(data[at + 64 : at + size], zlib.crc32(data[at + 8 : at + 16]))
        )
    return bytes(data)


# --- JSON ---


def read_run(path):
    run = fmn.Run.open(path.parent)
    repr((run, run.checkpoints))


def read_plan(path):
    plan = fmn.FusionPlan.load(path)
    repr((str(plan), plan, plan.weights))


def read_reference(path):
    references.exists(path)
    references.check_unchanged(path)


def seeds_of_reference():
    stamp = {"size": 3, "mtime_ns": 1_700_000_000_000_000_000}
    base = {"format": "fmn_ref.reference", "version": 1, "key": "model"}
    files = [{"target.pt": stamp}, {"target.pt": {"size": 1e300, "mtime_ns": 1e300}}, {"target.pt": 3}, {}]
    return dumped(*({**base, "path": "/proc/self/cwd/target.pt", "files": f} for f in files))()


def read_targets(path):
    with TargetFolder(path.parent, {"format": "fmn_ref.targets"}, {}) as folder:
        folder.load(["view_00000.log_probs.npy"])


# --- weights ---


def read_weights(path):
    """As `from_checkpoints` does."""
    own = model()
    load_weights(own, foreign.read_state(path, own)[0], path)


def read_state(path):
    """As `average_checkpoints` does."""
    for value in tensors.read_state(path if path.suffix != ".json" else path.parent).values():
        if tensors.is_dense(value):
            list(tensors.parts(value))


LOGITS = ("logits[", "logits:")  # the name of an argument, to which the command line adds the file


def each(*readers, names=()):
    """A reader that tries all; it raises if an error does not name the file, or all refuse it."""

    def read_each(path):
        errors = []
        for read in readers:
            try:
                read(path)
            except (ValueError, TypeError, OSError, MemoryError) as error:
                if not any(name in str(error) for name in (path.name, path.parent.name, *names)):
                    raise
                errors.append(error)
        if len(errors) == len(readers):
            raise errors[0]

    return read_each


def saved(content, zipped=True):
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


def contents_of_checkpoints():
    state = model().state_dict()
    extra = {
        "epoch": 3,
        "state_dict": state,
        "optimizer": {"lr": 0.1, "betas": (0.9, 0.95)},
        "half": state["bias"].half(),
    }
    return [state, extra, {"module.weight": state["weight"], "module.bias": state["bias"]}, [1, "two", None, {3: 4.0}]]


def seeds_of_pickles():
    found = [zipfile.ZipFile(io.BytesIO(saved(c))).read("archive/data.pkl") for c in contents_of_checkpoints()]
    return [*found, *hostile_pickles()]


def hostile_pickles():
    """Code that would run, memory that would be taken, and depth that would kill."""
    return [
        b"cos\nmkdir\n(X\x03\0\0\0RANtR.",
        b"\x80\2cbuiltins\nbytearray\nJ\xff\xff\xff\x7f\x85R.",
        b"(" * 3000 + b"t" * 3000 + b".",
        b"]q\0h\0a.",
        b"\x80\2" + b"]q\0" + b"(h\0h\0e" * 40 + b".",
    ]


def pickle_of(name):
    with zipfile.ZipFile(GOLDEN / name) as archive:
        return archive.read("archive/data.pkl")


def read_resume(path):
    """As `train` does. Nothing of the run's folder is needed but the state."""
    own = model()
    loop = Loop(own, Recipe(), 3, None, None)
    load = functools.partial(store._resume_state, path)
    engine._resume(loop, SimpleNamespace(load=load, folder=SimpleNamespace(path="", resume=path)))


def in_archive(data, like=None):
    """A checkpoint whose pickle is `data`, with storages of 48 bytes, or those of another checkpoint."""
    buffer, parts = io.BytesIO(), {f"archive/data/{i}": bytes(48) for i in range(3)} | {"archive/version": b"3\n"}
    if like is not None:
        with zipfile.ZipFile(GOLDEN / like) as archive:
            parts = {name: archive.read(name) for name in archive.namelist() if not name.endswith("data.pkl")}
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, part in {"archive/data.pkl": data, **parts}.items():
            archive.writestr(zipfile.ZipInfo(name), part)
    return buffer.getvalue()


def headers_of_safetensors():
    state = {"weight": {"dtype": "F32", "shape": [4, 3], "data_offsets": [0, 48]}}
    state["bias"] = {"dtype": "F32", "shape": [4], "data_offsets": [48, 64]}
    return dumped(
        state, {"__metadata__": {"format": "pt"}, **state}, {"weight": {**state["weight"], "dtype": "BF16"}}
    )()


def in_safetensors(data):
    return struct.pack("<Q", len(data)) + data + bytes(64)


def shards():
    return {"a.safetensors": in_safetensors(headers_of_safetensors()[0]), "b.pt": saved(model().state_dict())}


def seeds_of_index():
    maps = [{"weight": "a.safetensors", "bias": "b.pt"}, {"weight": "../a"}, {"weight": "a.safetensors", "bias": "c"}]
    return dumped(*({"metadata": {}, "weight_map": m} for m in maps))()


def distributed():
    """Files of a folder of torch.distributed.checkpoint, by name."""
    import tempfile
    import warnings

    from torch.distributed.checkpoint import FileSystemWriter, save

    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        save(model().state_dict(), storage_writer=FileSystemWriter(folder, sync_files=False), no_dist=True)
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


# What torch's own writer refers to; Path objects are those of the prefix.
OF_DISTRIBUTED = frozenset(
    [f"torch.distributed.checkpoint.metadata.{name}" for name in dir(torch.distributed.checkpoint.metadata)]
    + [f"torch.distributed.checkpoint.filesystem.{name}" for name in ("_StorageInfo", "_StoragePrefix")]
    + ["torch.Size", "torch.serialization._get_layout", "collections.OrderedDict", "builtins.set"]
    + ["pathlib.PosixPath", "pathlib.PurePosixPath"]
)


def read_distributed(path):
    own = model()
    load_weights(own, foreign.read_state(path.parent, own)[0], path.parent)


# --- arrays ---


def read_arrays(path):
    """All that the command line does with such a file."""
    content.content_of(path)
    each(
        lambda path: load.load_labels(None, str(path)),
        lambda path: load.load_labels(str(path), ""),
        lambda path: load.load_correct(str(path), None),
        lambda path: list(load.load_epochs(str(path), True)),
        lambda path: load.load_epoch_numbers(str(path), 2),
        names=LOGITS,
    )(path)


def npy(*values):
    def seeds():
        found = []
        for value in values:
            buffer = io.BytesIO()
            np.save(buffer, value)
            found.append(buffer.getvalue())
        return found

    return seeds


ARRAYS = npy(np.eye(3, dtype=bool), np.arange(6).reshape(2, 3), np.full((2, 3, 4), 0.25, np.float16), np.arange(3))


def npz():
    found = []
    for options in (
        {"probs": np.full((2, 3, 4), 0.25), "labels": np.arange(3)},
        {"correct": np.eye(2), "epochs": [1, 5]},
    ):
        for write in (np.savez, np.savez_compressed):
            buffer = io.BytesIO()
            write(buffer, **options)
            found.append(buffer.getvalue())
    return found


def in_npz(data):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("probs.npy", "labels.npy", "epochs.npy"):
            archive.writestr(zipfile.ZipInfo(name), data, zipfile.ZIP_DEFLATED)
    return buffer.getvalue()


def read_about(path):
    KeptPredictions.matching(RunFolder(path.parents[1]), (torch.zeros(2, 3), torch.tensor([0, 1])))


def read_kept(path):
    kept = KeptPredictions(RunFolder(path.parents[1]))
    kept.read(1)
    repr(kept.labels)


# --- records of other tools ---


def read_text(path):
    text.id_array(text.read_ids(path))
    sorted(text.read_ids(path), key=text.natural)


def read_cartography(path):
    logits, _, _ = importers.from_cartography(path.parent)
    for epoch in importers.from_logits(logits):
        repr(epoch.sum())


def lines_of_cartography(epoch):
    rows = [{"guid": i, f"logits_epoch_{epoch}": [0.5, -1.0 * i, 2], "gold": i % 3} for i in range(3)]
    return "\n".join(map(json.dumps, rows)).encode()


def lm_eval_files(name):
    return lambda: [path.read_bytes() for path in sorted((LM_EVAL / "checkpoint-100").glob(f"samples_{name}_*.jsonl"))]


def read_lm_eval(path):
    each(
        lambda path: repr(lm_eval.from_lm_eval(path.parent).rates),
        lambda path: lm_eval.from_lm_eval([path.parent, path.parent], filter="draws"),
        lambda path: lm_eval.from_lm_eval([path.parent], metric="acc"),
    )(path)


def read_results(path):
    repr(lm_eval.from_lm_eval(path.parent, task="sums_draws", filter="draws").rates)


def seeds_of_results():
    models = "pretrained=a,seed=1", {"pretrained": "a", "seed": 1}, None, {"pretrained": "b"}
    return dumped(
        *({"results": {}, "config": {"model": "hf", "model_args": m}} for m in models), {}, {"config": None}
    )()


def two_runs():
    """Those of two seeds, and the results of the other one."""
    samples = lm_eval_files("sums_draws")()[0]
    files = {f"out/samples_sums_draws_2026-11-26T06-05-3{i}.284305.jsonl": samples for i in (1, 2)}
    return {**files, "out/results_2026-11-26T06-05-32.284305.json": seeds_of_results()[0]}


def pickles_of_toneva():
    rows = {i: [[0.5, 0.25], [0, 1], [0.1, -0.2]] for i in range(3)} | {"train": [[], [0.5]]}
    of_numpy = {i: [[np.float32(0.5)], [np.int64(1), True], [np.float16(1)]] for i in range(2)}
    found = [pickle.dumps(value, protocol) for value in (rows, of_numpy) for protocol in (0, 2, 4)]
    return [*found, *hostile_pickles()]


def scan(path):
    """In memory, so that it is fast; the file's name stands for the loaders'."""
    data = path.data
    for contents in (False, True):
        pickles.scan(data, contents=contents)


class InMemory:
    """Stands for a path where no file is written."""

    name, parent = "", Path("folder")

    def write_bytes(self, data):
        self.data = data


def text_seeds():
    return [
        b"cat\ndog\r\nfish\rbird",
        b"\xef\xbb\xbfa\nb",
        "é\n1".encode("utf-16"),
        b"\xff\xfe\0\0a\0\0\0",
        b"a" * 2000 + b"\nb",
    ]


def seeds_of_all():
    return [
        json.dumps({"format": "fmn_ref.plan"}).encode(),
        saved([1]),
        in_safetensors(headers_of_safetensors()[0]),
        *text_seeds(),
    ]


class InMemoryTarget(Target):
    """A reader of bytes."""

    def prepare(self, folder):
        return InMemory()


class NamesTarget(Target):
    """A reader of names."""

    def prepare(self, folder):
        return file_names.Names(folder)


TARGETS = {
    "names": NamesTarget("names", file_names.read, lambda: file_names.SEEDS),
    "pickle": InMemoryTarget("in memory", scan, lambda: [*pickles_of_toneva(), *seeds_of_pickles()]),
    "history": Target("history.fmnh", read_history, golden("run/history.fmnh")),
    "history_mended": Target(
        "history.fmnh", read_history, golden("run/history.fmnh", "imported/history.fmnh"), mended_history
    ),
    "run": Target(
        "run.json",
        read_run,
        golden("run/run.json", "imported/run.json"),
        beside=lambda: {"history.fmnh": golden("run/history.fmnh")()[0]},
    ),
    "plan": Target("plan.json", read_plan, golden("run/plan.json", "fused/plan.json", "pool.json", "chosen.json")),
    "comparison": Target("comparison.json", read_comparison, golden("run/comparison.json")),
    "reference": Target(
        "epoch_00001.ref.json",
        read_reference,
        seeds_of_reference,
        names=("changed since", "no such checkpoint"),
        beside=lambda: {"target.pt": b"abc"},
    ),
    "kept_about": Target("run/predictions/data.json", read_about, golden("imported/predictions/data.json")),
    "targets": Target(
        "targets/targets.json",
        read_targets,
        golden("targets/targets.json"),
        names=("targets",),
        beside=lambda: {"targets/view_00000.log_probs.npy": golden("targets/view_00000.log_probs.npy")()[0]},
    ),
    "checkpoint": Target(
        "epoch.pt",
        each(read_weights, read_state),
        lambda: [*golden("run/checkpoints/epoch_00001.pt")(), *map(saved, contents_of_checkpoints())],
    ),
    "checkpoint_pickle": Target(
        "epoch.pt", each(read_weights, read_state, torch_files.load), seeds_of_pickles, in_archive
    ),
    "resume": Target(
        "resume.pt", read_resume, lambda: [pickle_of("run/resume.pt")], lambda data: in_archive(data, "run/resume.pt")
    ),
    "checkpoint_legacy": Target(
        "epoch.pth", read_weights, lambda: [saved(c, False) for c in contents_of_checkpoints()]
    ),
    "safetensors": Target("epoch.safetensors", each(read_weights, read_state), headers_of_safetensors, in_safetensors),
    "index": Target(
        "model.safetensors.index.json", each(read_weights, read_state), seeds_of_index, beside=shards, names=("files",)
    ),
    "distributed_metadata": Target(
        ".metadata",
        read_distributed,
        lambda: [distributed()[".metadata"]],
        beside=distributed,
        names=("files",),
        classes=OF_DISTRIBUTED,
    ),
    "distributed_part": Target(
        "__0_0.distcp",
        read_distributed,
        lambda: [distributed()["__0_0.distcp"]],
        beside=distributed,
        names=("files",),
        classes=OF_DISTRIBUTED,
    ),
    "npy": Target("a.npy", read_arrays, ARRAYS, names=LOGITS),
    "npz": Target("a.npz", read_arrays, npz, names=LOGITS),
    "npz_member": Target("a.npz", read_arrays, ARRAYS, in_npz, names=LOGITS),
    "kept": Target(
        "run/predictions/epoch_00001.npy",
        read_kept,
        golden("imported/predictions/epoch_00001.npy"),
        beside=lambda: {"run/predictions/labels.npy": golden("imported/predictions/labels.npy")()[0]},
    ),
    "kept_labels": Target(
        "run/predictions/labels.npy",
        read_kept,
        golden("imported/predictions/labels.npy"),
        names=("epoch_00001.npy",),
        beside=lambda: {"run/predictions/epoch_00001.npy": golden("imported/predictions/epoch_00001.npy")()[0]},
    ),
    "text": Target("ids.txt", read_text, text_seeds, names=("sample_ids",)),
    "content": Target("any", content.content_of, lambda: [*npz(), *ARRAYS(), *seeds_of_all()]),
    "cartography": Target(
        "dynamics_epoch_1.jsonl",
        read_cartography,
        lambda: [lines_of_cartography(1)],
        names=("files",),
        beside=lambda: {"dynamics_epoch_0.jsonl": lines_of_cartography(0)},
    ),
    "toneva": Target("stats.pkl", importers.from_toneva, pickles_of_toneva),
    "lm_eval_results": Target(
        "out/results_2026-11-26T06-05-31.284305.json", read_results, seeds_of_results, beside=two_runs, names=("out",)
    ),
    "lm_eval": Target(
        "samples_sums_draws_2026-11-26T06-05-31.284305.jsonl",
        read_lm_eval,
        lambda: [*lm_eval_files("sums_draws")(), *lm_eval_files("sums_choice")()],
        names=("files",),
    ),
}

TARGETS |= frameworks.targets(Target)
