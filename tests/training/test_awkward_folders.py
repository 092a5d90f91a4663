"""Folders of checkpoints in every awkward shape: read right, or refused by name; no code runs, nothing outside is read.

Each function makes one folder and returns what must come of it: epochs, or a part of the error's message.
"""

import argparse
import contextlib
import json
import os
import pickle
import struct
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import nn

import fmn_ref as fmn

N_IN, N_OUT = 5, 3
X = np.random.default_rng(0).normal(size=(60, N_IN)).astype(np.float32)
Y = np.random.default_rng(1).integers(0, N_OUT, 60)
CASES = {}
OPENED: list[str] = []
sys.addaudithook(lambda event, args: OPENED.append(str(args[0])) if event == "open" and args else None)


class Right(NamedTuple):
    """The epochs of the run; `seeds` where an epoch's weights are not those of `weights(epoch)`."""

    epochs: tuple = (1, 2, 3)
    options: dict = {}  # noqa: RUF012
    seeds: dict = {}  # noqa: RUF012


class Refused(NamedTuple):
    """A part of the message; `late` where epochs before the fault are recorded."""

    message: str
    options: dict = {}  # noqa: RUF012
    late: bool = False


def weights(epoch):
    rng = np.random.default_rng(100 + epoch)
    return {
        "weight": torch.from_numpy(rng.normal(size=(N_OUT, N_IN)).astype(np.float32)),
        "bias": torch.from_numpy(rng.normal(size=N_OUT).astype(np.float32)),
    }


def correct(epoch):
    """What the weights of an epoch classify correctly, by NumPy."""
    w = weights(epoch)
    return (X @ w["weight"].numpy().T + w["bias"].numpy()).argmax(1) == Y


def prefixed(prefix, epoch):
    return {prefix + name: t for name, t in weights(epoch).items()}


class Canary:
    """A pickle of it makes a file, if code of it runs."""

    def __reduce__(self):
        return os.system, (f"touch {os.environ['FMN_CANARY']}",)


def case(function):
    CASES[function.__name__] = function
    return function


def save_all(folder, pattern="epoch_{}.pt", epochs=(1, 2, 3), content=weights, **options):
    for epoch in epochs:
        path = folder / pattern.format(epoch)
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(content(epoch), path, **options)


def safetensors():
    return pytest.importorskip("safetensors.torch")


# --- names ---


@case
def plain(folder):
    save_all(folder)
    return Right()


@case
def natural_order(folder):
    save_all(folder, epochs=(1, 2, 10, 11))
    return Right((1, 2, 10, 11))


@case
def zero_padded(folder):
    save_all(folder, "epoch_{:04d}.pth", (7, 80, 900))
    return Right((7, 80, 900))


@case
def missing_epochs(folder):
    save_all(folder, epochs=(0, 4, 9))
    return Right((0, 4, 9))


@case
def a_number_glued_to_a_word(folder):
    save_all(folder, "checkpoint{}.pt", (9, 10))
    return Right((9, 10))


@case
def a_number_alone(folder):
    save_all(folder, "{}.pt", (9, 10))
    return Right((9, 10))


@case
def a_number_of_the_network(folder):
    save_all(folder, "resnet18_{}.pth", (3, 18, 20))
    return Right((3, 18, 20))


@case
def an_accuracy_in_the_name(folder):
    for epoch in (1, 2, 3):
        torch.save(weights(epoch), folder / f"net_0.{90 + epoch}_{epoch}.pth")
    return Right()


@case
def lightning(folder):
    for epoch in (3, 9, 10):
        torch.save({"state_dict": prefixed("net.", epoch)}, folder / f"epoch={epoch}-step={epoch * 100}.ckpt")
    return Right((3, 9, 10))


@case
def lightning_with_a_loss(folder):
    for epoch, loss in ((1, "0.25"), (2, "1"), (3, "1e-05"), (4, "-0.1")):
        torch.save({"state_dict": prefixed("model.", epoch)}, folder / f"epoch={epoch}-val_loss={loss}.ckpt")
    return Right((1, 2, 3, 4))


@case
def several_in_one_epoch(folder):
    for step in (50, 100, 150):
        torch.save(weights(step), folder / f"epoch={step // 100}-step={step}.ckpt")
    return Right((50, 100, 150))


@case
def lightnings_second_version(folder):
    save_all(folder, "epoch={}.ckpt")
    torch.save(weights(2), folder / "epoch=2-v1.ckpt")
    return Refused("epoch=2-v1.ckpt and epoch=2.ckpt: both claim epoch 2")


@case
def two_endings_of_one_epoch(folder):
    save_all(folder)
    torch.save(weights(2), folder / "epoch_2.pth")
    return Refused("epoch_2.pt and epoch_2.pth: both claim")


@case
def padded_and_not(folder):
    save_all(folder)
    torch.save(weights(2), folder / "epoch_02.pt")
    return Refused("epoch_02.pt and epoch_2.pt: both claim")


@case
def two_numbering_schemes(folder):
    save_all(folder)
    torch.save(weights(2), folder / "step_500.pt")
    return Refused("epoch_1.pt and step_500.pt: names of two schemes")


@case
def two_series(folder):
    save_all(folder, "model_epoch_{}.pt", (1, 2))
    save_all(folder, "ema_epoch_{}.pt", (3, 4))
    return Refused("ema_epoch_3.pt and model_epoch_1.pt: names of two schemes")


@case
def a_number_sign_in_the_place_of_a_number(folder):
    """A sign that stands for numbers when names are compared must be one that no name holds."""
    for name in ("run_1.5.6.pt", "run_1.5.#.pt"):
        torch.save(weights(1), folder / name)
    return Refused("run_1.5.#.pt and run_1.5.6.pt: names of two schemes")


@case
def no_numbers_but_epochs_inside(folder):
    for name, epoch in (("a", 12), ("b", 3), ("c", 20)):
        torch.save({"epoch": epoch, "model": weights(epoch)}, folder / f"{name}.pt")
    return Right((3, 12, 20))


@case
def steps_inside(folder):
    for name, step in (("a", 900), ("b", 1000)):
        torch.save({"global_step": step, "epoch": 1, "model": weights(step)}, folder / f"{name}.pt")
    return Right((900, 1000))


@case
def no_numbers_at_all(folder):
    save_all(folder, "net{}.pt", ("",), lambda _: weights(1))
    return Refused("net.pt: no epoch or step")


@case
def a_file_without_number_among_others(folder):
    save_all(folder)
    torch.save(weights(7), folder / "pretrained.pt")
    return Right()


@case
def unicode_names(folder):
    save_all(folder, "modèle 模型 epoch_{}.pt")
    return Right()


@case
def undecodable_names(folder):
    for epoch in (1, 2):
        with open(os.fsencode(folder) + b"/\xff_epoch_%d.pt" % epoch, "wb") as file:
            torch.save(weights(epoch), file)
    return Right((1, 2))


@case
def digits_of_other_scripts(folder):
    save_all(folder, "epoch_{}.pt", ("٣",), lambda _: weights(3))
    return Refused("no epoch or step")


@case
def an_enormous_number(folder):
    save_all(folder, epochs=(10**30,), content=lambda _: weights(1))
    return Refused(f"epoch_{10**30}.pt: expected an epoch or a step in")


@case
def a_pattern(folder):
    save_all(folder, "model_epoch_{}.pt", (1, 2))
    save_all(folder, "ema_epoch_{}.pt", (1, 2), lambda epoch: weights(epoch + 50))
    return Right((1, 2), {"pattern": "model_epoch_*.pt"})


@case
def a_pattern_that_matches_nothing(folder):
    save_all(folder)
    return Refused("no checkpoints there", {"pattern": "model_*.pt"})


@case
def checkpoints_one_level_deeper(folder):
    save_all(folder, "version_0/checkpoints/epoch_{}.pt")
    return Refused("there are some in")


@case
def an_empty_folder(folder):
    return Refused("no checkpoints there")


# --- what is left out ---


@case
def copies_by_name(folder):
    save_all(folder)
    for name in ("last.pt", "best.pt", "model_final.pth", "best-epoch=2.ckpt"):
        torch.save(weights(9), folder / name)
    return Right()


@case
def a_link_to_the_last(folder):
    save_all(folder)
    (folder / "epoch_4.pt").symlink_to(folder / "epoch_3.pt")
    return Right()


@case
def a_link_that_leads_outside(folder):
    save_all(folder)
    (folder / "epoch_4.pt").symlink_to(folder.parent / "outside" / "epoch_4.pt")
    return Right()


@case
def a_folder_that_is_a_link_outside(folder):
    save_all(folder, "checkpoint-{}/pytorch_model.bin")
    (folder / "checkpoint-4").symlink_to(folder.parent / "outside")
    return Right()


@case
def weights_that_are_a_link_outside(folder):
    save_all(folder, "checkpoint-{}/pytorch_model.bin")
    (folder / "checkpoint-4").mkdir()
    (folder / "checkpoint-4" / "pytorch_model.bin").symlink_to(folder.parent / "outside" / "epoch_4.pt")
    return Right()


@case
def links_in_circles(folder):
    save_all(folder)
    (folder / "epoch_4").symlink_to(folder)
    (folder / "epoch_5.pt").symlink_to(folder / "epoch_5.pt")
    return Right()


@case
def a_broken_link(folder):
    save_all(folder)
    (folder / "epoch_4.pt").symlink_to(folder / "gone.pt")
    return Right()


@case
def half_written(folder):
    save_all(folder, epochs=(1, 2, 3, 4))
    (folder / "epoch_4.pt").write_bytes((folder / "epoch_4.pt").read_bytes()[:700])
    return Right()


@case
def an_empty_file(folder):
    save_all(folder)
    (folder / "epoch_4.pt").touch()
    return Right()


@case
def unfinished_by_name(folder):
    save_all(folder)
    for name in ("epoch_4.pt.tmp", ".epoch_5.pt", "epoch_6.pt.part", "epoch_7.pt~"):
        torch.save(weights(4), folder / name)
    return Right()


@case
def states_of_the_optimizer(folder):
    save_all(folder)
    for name in ("optimizer_3.pt", "scheduler_4.pt", "rng_state_5.pth", "training_args.bin"):
        torch.save({"x": torch.zeros(2)}, folder / name)
    return Right()


@case
def other_things_in_the_folder(folder):
    save_all(folder)
    (folder / "log_4.txt").write_text("text")
    (folder / "epoch_4.pt").mkdir()
    (folder / "events").mkdir()
    np.save(folder / "epoch_5.npy", X)
    return Right()


@case
def a_pipe(folder):
    save_all(folder)
    os.mkfifo(folder / "epoch_4.pt")
    return Right()


@case
def a_run_in_the_folder(folder):
    save_all(folder)
    fmn.Recorder(folder / "epoch_4").record(4, Y, Y)
    save_all(folder / "epoch_4" / "x", epochs=(4,))
    return Right()


@case
def nothing_but_copies(folder):
    torch.save(weights(9), folder / "last.pt")
    return Refused("left out: last.pt (a copy, by its name)")


@case
def a_folder_with_several(folder):
    save_all(folder)
    save_all(folder, "epoch_4/{}.pt", (1, 2))
    return Right()


# --- containers and prefixes ---


@case
def a_container(folder):
    extras = {"args": argparse.Namespace(lr=0.1, out=Path("/x")), "best": np.float64(0.5), "optimizer": {"state": {}}}
    save_all(folder, "ckpt_{}.pth.tar", content=lambda e: {"epoch": e, "model": prefixed("module.", e), **extras})
    return Right()


@case
def nested_containers(folder):
    save_all(folder, content=lambda e: {"state": {"network": prefixed("module._orig_mod.", e)}, "epoch": e})
    return Right()


@case
def containers_of_several_names(folder):
    for epoch, name in enumerate(("model", "state_dict", "model_state_dict", "net", "module"), 1):
        torch.save({name: weights(epoch)}, folder / f"epoch_{epoch}.pt")
    return Right((1, 2, 3, 4, 5))


@case
def prefixes_in_some_files(folder):
    for epoch, prefix in enumerate(("", "module.", "_orig_mod.", "model.", "net.", "model.module._orig_mod."), 1):
        torch.save(prefixed(prefix, epoch), folder / f"epoch_{epoch}.pt")
    return Right((1, 2, 3, 4, 5, 6))


@case
def a_prefix_for_some_names(folder):
    def content(epoch):
        return {"module.weight": weights(epoch)["weight"], "bias": weights(epoch)["bias"]}

    save_all(folder, content=content)
    return Right()


@case
def a_name_with_and_without_prefix(folder):
    save_all(folder, content=lambda e: {**weights(e), **prefixed("module.", e + 50)})
    return Refused("does not fit the model: left over module.weight, module.bias")


@case
def an_unknown_prefix(folder):
    save_all(folder, content=lambda e: prefixed("encoder.", e))
    return Refused("missing weight, bias; left over encoder.weight, encoder.bias")


@case
def averages_beside(folder):
    save_all(folder, content=lambda e: {"state_dict": weights(e), "state_dict_ema": weights(e + 50)})
    return Right()


@case
def averages_by_choice(folder):
    save_all(folder, content=lambda e: {"model": weights(e), "model_ema": prefixed("module.", e + 50)})
    return Right(options={"key": "model_ema"}, seeds={1: 51, 2: 52, 3: 53})


@case
def averages_alone(folder):
    save_all(folder, content=lambda e: {"ema": weights(e)})
    return Refused("epoch_1.pt: only averaged weights fit: 'ema'")


@case
def two_networks(folder):
    save_all(folder, content=lambda e: {"student": weights(e), "teacher": weights(e + 50)})
    return Refused("several state_dicts fit: 'student', 'teacher'")


@case
def one_of_two_networks(folder):
    save_all(folder, content=lambda e: {"nets": {"student": weights(e), "teacher": weights(e + 50)}})
    return Right(options={"key": "nets.student"})


@case
def an_unknown_key(folder):
    save_all(folder, content=lambda e: {"model": weights(e)})
    return Refused("expected a state_dict at key 'net', got 'model'", {"key": "net"})


@case
def half_precision(folder):
    def content(epoch):
        return {name: t.double() for name, t in weights(epoch).items()}

    save_all(folder, content=content)
    return Right()


@case
def wrong_shapes(folder):
    save_all(folder, content=lambda e: {"weight": torch.zeros(4, N_IN), "bias": torch.zeros(4)})
    return Refused(f"does not fit the model: weight is {(4, N_IN)}, not")


@case
def wrong_shapes_later(folder):
    save_all(folder)
    torch.save({"weight": torch.zeros(4, N_IN), "bias": torch.zeros(4)}, folder / "epoch_4.pt")
    return Refused("epoch_4.pt: does not fit the model", late=True)


@case
def weights_missing(folder):
    save_all(folder, content=lambda e: {"weight": weights(e)["weight"]})
    return Refused("epoch_1.pt: does not fit the model: missing bias")


@case
def weights_left_over(folder):
    save_all(folder, content=lambda e: {**weights(e), "criterion.weight": torch.ones(3)})
    return Refused("left over criterion.weight")


@case
def no_tensors(folder):
    save_all(folder, content=lambda e: {"epoch": e})
    return Refused("expected a state_dict, got dict")


@case
def not_a_number(folder):
    save_all(folder, content=lambda e: {name: t * float("nan") for name, t in weights(e).items()})
    return Refused("expected numbers as logits, got NaN (with the weights of", late=True)


# --- files ---


@case
def old_torch_files(folder):
    save_all(folder, _use_new_zipfile_serialization=False)
    return Right()


@case
def old_and_new_torch_files(folder):
    save_all(folder, epochs=(1, 2), _use_new_zipfile_serialization=False)
    save_all(folder, epochs=(3,))
    return Right()


@case
def an_old_file_cut_short(folder):
    save_all(folder, epochs=(1,), _use_new_zipfile_serialization=False)
    (folder / "epoch_1.pt").write_bytes((folder / "epoch_1.pt").read_bytes()[:-20])
    return Refused("epoch_1.pt: not a readable checkpoint")


@case
def an_old_file_that_asks_for_memory(folder):
    save_all(folder, epochs=(1,), _use_new_zipfile_serialization=False)
    data = (folder / "epoch_1.pt").read_bytes()
    (folder / "epoch_1.pt").write_bytes(data.replace(b"K\x0fNt", b"J\xff\xff\xff\x7fNt"))
    return Refused("a tensor is larger than the file")


@case
def code_in_a_file(folder):
    save_all(folder, content=lambda e: {**weights(e), "extra": Canary()})
    return Refused("epoch_1.pt: not a readable checkpoint")


@case
def code_in_an_old_file(folder):
    save_all(folder, content=lambda e: {**weights(e), "x": Canary()}, _use_new_zipfile_serialization=False)
    return Refused("epoch_1.pt: not a readable checkpoint")


@case
def code_in_a_plain_pickle(folder):
    (folder / "epoch_1.pt").write_bytes(pickle.dumps(Canary()))
    return Refused("epoch_1.pt: not a readable checkpoint")


@case
def code_under_a_harmless_name(folder):
    """A name that is on the list calls nothing, whatever it is given."""
    (folder / "epoch_1.pt").write_bytes(b"\x80\x02cargparse\nNamespace\ncos\nsystem\n\x85R.")
    return Refused("epoch_1.pt: not a readable checkpoint")


@case
def a_pickled_network(folder):
    save_all(folder, content=lambda e: nn.Linear(N_IN, N_OUT))
    return Refused("torch.save(torch.load(OLD, weights_only=False).state_dict(), NEW)")


@case
def a_damaged_byte(folder):
    save_all(folder)
    data = bytearray((folder / "epoch_1.pt").read_bytes())
    at = bytes(data).index(weights(1)["weight"].numpy().tobytes())
    data[at] ^= 1
    (folder / "epoch_1.pt").write_bytes(data)
    return Refused("epoch_1.pt: not a readable checkpoint of tensors: the checksum")


@case
def a_page_of_text(folder):
    (folder / "epoch_1.pt").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12345\n")
    return Refused("epoch_1.pt: not a readable checkpoint")


@case
def deep_values(folder):
    (folder / "epoch_1.pt").write_bytes(b"\x80\x02" + b")" + b"\x85" * 1_000_000 + b".")
    return Refused("epoch_1.pt: not a readable checkpoint")


@case
def safetensors_files(folder):
    save = safetensors().save_file
    for epoch in (1, 2, 3):
        save(prefixed("model.", epoch), folder / f"epoch_{epoch}.safetensors")
    return Right()


@case
def safetensors_cut_short(folder):
    save = safetensors().save_file
    for epoch in (1, 2):
        save(weights(epoch), folder / f"epoch_{epoch}.safetensors")
    (folder / "epoch_2.safetensors").write_bytes((folder / "epoch_2.safetensors").read_bytes()[:20])
    return Right((1,))


@case
def safetensors_with_an_enormous_header(folder):
    (folder / "epoch_1.safetensors").write_bytes(struct.pack("<Q", 2**60) + b"{}")
    return Refused("left out: epoch_1.safetensors (half-written)")


@case
def folders_of_a_trainer(folder):
    save = safetensors().save_file
    for step in (500, 1000):
        (folder / f"checkpoint-{step}").mkdir()
        save(weights(step), folder / f"checkpoint-{step}" / "model.safetensors")
        torch.save({"x": torch.zeros(3)}, folder / f"checkpoint-{step}" / "optimizer.pt")
    return Right((500, 1000))


def save_shards(folder, epoch):
    place, state = folder / f"checkpoint-{epoch}", weights(epoch)
    place.mkdir()
    names = {"weight": "model-1-of-2.bin", "bias": "model-2-of-2.bin"}
    for name, file in names.items():
        torch.save({name: state[name]}, place / file)
    (place / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    return place


@case
def shards(folder):
    for epoch in (1, 2, 3):
        save_shards(folder, epoch)
    return Right()


@case
def shards_of_safetensors(folder):
    save = safetensors().save_file
    for epoch in (1, 2):
        place, state = save_shards(folder, epoch), weights(epoch)
        (place / "pytorch_model.bin.index.json").unlink()
        for name in state:
            save({name: state[name]}, place / f"{name}.safetensors")
        index = {"weight_map": {name: f"{name}.safetensors" for name in state}}
        (place / "model.safetensors.index.json").write_text(json.dumps(index))
    return Right((1, 2))


@case
def a_shard_missing(folder):
    (save_shards(folder, 1) / "model-2-of-2.bin").unlink()
    return Refused("its shard 'model-2-of-2.bin' is not in the folder")


@case
def a_shard_outside(folder):
    place = save_shards(folder, 1)
    index = {"weight_map": {"weight": "../../outside/epoch_4.pt", "bias": "model-2-of-2.bin"}}
    (place / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return Refused("its shard '../../outside/epoch_4.pt' is not in the folder")


@case
def a_shard_that_is_a_link(folder):
    place = save_shards(folder, 1)
    (place / "model-1-of-2.bin").unlink()
    (place / "model-1-of-2.bin").symlink_to(folder.parent / "outside" / "epoch_4.pt")
    return Refused("its shard 'model-1-of-2.bin' is not in the folder")


@case
def a_shard_without_its_tensor(folder):
    torch.save({}, save_shards(folder, 1) / "model-2-of-2.bin")
    return Refused("model-2-of-2.bin: lacks bias")


@case
def an_index_of_nonsense(folder):
    (save_shards(folder, 1) / "pytorch_model.bin.index.json").write_text('{"weight_map": [1]}')
    return Refused("it has no weight_map")


def save_distributed(folder, epochs=(1, 2, 3)):
    dcp = pytest.importorskip("torch.distributed.checkpoint")
    for epoch in epochs:
        content = {
            "model": prefixed("module.", epoch),
            "optim": {"state": {0: {"step": torch.ones(1)}}},
            "n": Path("x"),
        }
        dcp.save(content, checkpoint_id=folder / f"step-{epoch}", no_dist=True)
    return folder / f"step-{epochs[0]}"


@case
def distributed_checkpoints(folder):
    save_distributed(folder)
    return Right()


@case
def a_distributed_file_missing(folder):
    next(save_distributed(folder, (1,)).glob("*.distcp")).unlink()
    return Refused("is not in the folder")


@case
def code_in_distributed_metadata(folder):
    (save_distributed(folder, (1,)) / ".metadata").write_bytes(pickle.dumps(Canary()))
    return Refused("it refers to posix.system")


@case
def distributed_metadata_that_leads_outside(folder):
    place = save_distributed(folder, (1,))
    metadata = pickle.loads((place / ".metadata").read_bytes())
    for info in metadata.storage_data.values():
        info.relative_path = "../../outside/epoch_4.pt"
    (place / ".metadata").write_bytes(pickle.dumps(metadata))
    return Refused("its file 'epoch_4.pt' is not in the folder")


@case
def a_damaged_byte_in_a_distributed_file(folder):
    path = next(save_distributed(folder, (1,)).glob("*.distcp"))
    data = bytearray(path.read_bytes())
    data[bytes(data).index(weights(1)["weight"].numpy().tobytes())] ^= 1
    path.write_bytes(data)
    return Refused("not a readable file of model.module.weight: the checksum")


@case
def a_distributed_file_cut_short(folder):
    path = next(save_distributed(folder, (1,)).glob("*.distcp"))
    path.write_bytes(path.read_bytes()[:100])
    return Refused("not a readable file of model.module.")


@case
def a_distributed_tensor_that_asks_for_memory(folder):
    place = save_distributed(folder, (1,))
    metadata = pickle.loads((place / ".metadata").read_bytes())
    entry = metadata.state_dict_metadata["model.module.weight"]
    entry.size = entry.chunks[0].sizes = torch.Size((2**40, 2**20))
    (place / ".metadata").write_bytes(pickle.dumps(metadata))
    return Refused("model.module.weight is larger than the files")


@case
def a_part_of_a_distributed_tensor_missing(folder):
    place = save_distributed(folder, (1,))
    metadata = pickle.loads((place / ".metadata").read_bytes())
    metadata.state_dict_metadata["model.module.weight"].chunks[0].sizes = torch.Size((2, N_IN))
    (place / ".metadata").write_bytes(pickle.dumps(metadata))
    return Refused("parts of model.module.weight are missing")


@case
def two_thousand_files(folder):
    state = weights(1)
    for epoch in range(2000):
        torch.save(state, folder / f"epoch_{epoch}.pt")
    return Right(tuple(range(2000)), seeds=dict.fromkeys(range(2000), 1))


def test_there_are_sixty():
    assert len(CASES) >= 60


@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_folder(name, tmp_path, monkeypatch):
    monkeypatch.setenv("FMN_CANARY", str(tmp_path / "RAN"))
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # thousands of files
    folder, outside, run_dir = tmp_path / "checkpoints", tmp_path / "outside", tmp_path / "run"
    folder.mkdir()
    save_all(outside, epochs=(4,))
    expected = CASES[name](folder)
    options = dict(expected.options)
    source = folder / options.pop("pattern") if "pattern" in options else folder
    before = {path: path.lstat().st_mtime_ns for path in folder.rglob("*")}
    OPENED.clear()
    run = None
    refused = isinstance(expected, Refused)
    with pytest.raises((ValueError, FileNotFoundError)) if refused else contextlib.nullcontext() as caught:
        run = fmn.from_checkpoints(source, nn.Linear(N_IN, N_OUT), (X, Y), run_dir, **options)
    if refused:
        assert expected.message in str(caught.value)
        assert expected.late or not run_dir.exists()
    else:
        assert run.history.epochs == expected.epochs
        rows = [correct(expected.seeds.get(epoch, epoch)) for epoch in expected.epochs]
        np.testing.assert_array_equal(run.history.correct(), rows)
    assert not (tmp_path / "RAN").exists()
    assert not [path for path in OPENED if path.startswith(str(outside)) or "/../" in path]
    assert {path: path.lstat().st_mtime_ns for path in folder.rglob("*")} == before


def test_the_canary_sings(tmp_path, monkeypatch):
    """The code in the files does run where a file is loaded without care."""
    monkeypatch.setenv("FMN_CANARY", str(tmp_path / "RAN"))
    pickle.loads(pickle.dumps(Canary()))
    assert (tmp_path / "RAN").exists()


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_distributed_checkpoint_that_lost_its_metadata_has_changed(tmp_path):
    place = save_distributed(tmp_path / "checkpoints")
    run = fmn.from_checkpoints(tmp_path / "checkpoints", nn.Linear(N_IN, N_OUT), (X, Y), tmp_path / "run")
    (place / ".metadata").unlink()
    with pytest.raises(ValueError, match=r"step-1: \.metadata changed since .* now not there"):
        run.probabilities((X, Y))[0]
    reference = run.checkpoint(0)  # of a stranger: it says that there are no files
    reference.write_text(json.dumps(json.loads(reference.read_text()) | {"files": {}}))
    (place / next(place.glob("*.distcp"))).unlink()
    with pytest.raises((ValueError, FileNotFoundError), match=r"step-1"):
        run.probabilities((X, Y))[0]
