"""Targets of optional packages: checkpoints of Keras, settings of adapters of PEFT. Others do not import them."""

import functools
import importlib.util
import io
import json
import os
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import torch

import fmn_ref as fmn
from fmn_ref.runs import foreign
from fmn_ref.runs.checkpoints import load_weights


@functools.cache
def keras_files():
    """A reader of weights, and files of both kinds."""
    os.environ.setdefault("KERAS_BACKEND", "torch")
    import keras

    from fmn_ref.integrations.keras_checkpoints import Predictor

    network = keras.Sequential([keras.Input((3,)), keras.layers.Dense(4)])
    with tempfile.TemporaryDirectory() as folder:
        weights, whole = Path(folder, "a.weights.h5"), Path(folder, "a.keras")
        network.save_weights(weights)
        network.save(whole)
        predictor = Predictor(network, np.zeros((2, 3), np.float32), None, False)
        return predictor._load, weights.read_bytes(), whole.read_bytes()


def read_keras(path):
    keras_files()[0](path)


def in_keras(data):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(zipfile.ZipInfo("model.weights.h5"), data)
    return buffer.getvalue()


def base():
    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))


@functools.cache
def adapter():
    """A network with an adapter, and the files that peft stores of it."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    import peft

    network = peft.get_peft_model(base(), peft.LoraConfig(r=2, target_modules=["0", "1"], rank_pattern={"1": 1}))
    with tempfile.TemporaryDirectory() as folder:
        network.save_pretrained(folder)
        return network, {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def beside_adapter():
    with tempfile.TemporaryDirectory() as folder:
        fmn.FusionPlan.from_weights({0: 1.0}, 1).save(Path(folder, "plan.json"))
        plan = Path(folder, "plan.json").read_bytes()
    return {"plan.json": plan, "member_00000/adapter_model.safetensors": adapter()[1]["adapter_model.safetensors"]}


def seeds_of_adapter():
    stored = json.loads(adapter()[1]["adapter_config.json"])
    changes = {}, {"r": 1 << 27}, {"target_modules": "0|1"}, {"peft_type": "LOHA"}, {"rank_pattern": {"0": 1e9}}
    changes += {"init_lora_weights": "olora"}, {"init_lora_weights": "pissa", "r": 1 << 27}
    megatron = {"megatron_config": {"a": 1}, "megatron_core": "this"}  # a module that peft would import
    return [json.dumps({**stored, **change}).encode() for change in (*changes, megatron)]


def read_adapter(path):
    """As `from_checkpoints` does with a network that has an adapter."""
    own, weights = adapter()[0], path.with_name("adapter_model.safetensors")
    load_weights(own, foreign.read_state(weights, own)[0], weights)


def read_fused_adapter(path):
    from fmn_ref.integrations.peft import load_fused

    load_fused(path.parents[1], base())


def targets(target):
    """Those of the packages that are installed."""
    found = {}
    if all(map(importlib.util.find_spec, ("keras", "h5py"))):
        weights = lambda: [keras_files()[1]]  # noqa: E731
        found["keras_weights"] = target("epoch_1.weights.h5", read_keras, weights, temporary=True)
        found["keras_archive"] = target("epoch_1.keras", read_keras, lambda: [keras_files()[2]], temporary=True)
        found["keras_archive_weights"] = target("epoch_1.keras", read_keras, weights, in_keras, temporary=True)
    if importlib.util.find_spec("peft"):
        options = {"seeds": seeds_of_adapter, "beside": beside_adapter, "names": ("member_00000",)}
        found["adapter_config"] = target("member_00000/adapter_config.json", read_adapter, **options)
        found["adapter_fused"] = target("member_00000/adapter_config.json", read_fused_adapter, **options)
    return found
