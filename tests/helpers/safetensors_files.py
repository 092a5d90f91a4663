"""Safetensors files, written and read as the format's description says: a length, a JSON header, the bytes."""

import json
import struct
from pathlib import Path

import torch

TYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64}
TYPES |= {"I32": torch.int32, "U8": torch.uint8, "I8": torch.int8, "BOOL": torch.bool, "C64": torch.complex64}
TYPES |= {"F8_E4M3": torch.float8_e4m3fn}
NAMES = {dtype: name for name, dtype in TYPES.items()}


def write(path, state, metadata=None):
    header, blobs, at = {} if metadata is None else {"__metadata__": metadata}, [], 0
    for name, t in state.items():
        blob = t.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        header[name] = {"dtype": NAMES[t.dtype], "shape": list(t.shape), "data_offsets": [at, at + len(blob)]}
        blobs.append(blob)
        at += len(blob)
    text = json.dumps(header).encode()
    Path(path).write_bytes(struct.pack("<Q", len(text)) + text + b"".join(blobs))


def write_folder(folder, state, n_shards=2):
    """Write shards and their index, as `save_pretrained` names them."""
    Path(folder).mkdir()
    names, weight_map = list(state), {}
    for i in range(n_shards):
        file = f"model-{i + 1:05d}-of-{n_shards:05d}.safetensors"
        write(Path(folder, file), {name: state[name] for name in names[i::n_shards]})
        weight_map |= dict.fromkeys(names[i::n_shards], file)
    content = json.dumps({"metadata": {}, "weight_map": weight_map})
    Path(folder, "model.safetensors.index.json").write_text(content)


def read(path):
    """Return (tensors by name, metadata)."""
    raw = Path(path).read_bytes()
    (n,) = struct.unpack("<Q", raw[:8])
    header, found = json.loads(raw[8 : 8 + n]), {}
    metadata = header.pop("__metadata__", {})
    for name, entry in header.items():
        begin, end = (8 + n + offset for offset in entry["data_offsets"])
        dtype = TYPES[entry["dtype"]]
        assert (begin - 8 - n) % dtype.itemsize == 0, f"{name} is not aligned"
        content = (
            torch.frombuffer(bytearray(raw[begin:end]), dtype=dtype) if end > begin else torch.empty(0, dtype=dtype)
        )
        found[name] = content.reshape(entry["shape"])
    return found, metadata


def read_folder(folder):
    """Return the tensors of all files of a folder, by name, and its index or None."""
    index = Path(folder, "model.safetensors.index.json")
    found = {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        found |= read(path)[0]
    return found, json.loads(index.read_text()) if index.exists() else None
