"""The names of files, which give checkpoints and epochs their numbers: the lines of the input are names."""

import contextlib
import functools
import random
import re
import shutil
from pathlib import Path

from fmn_ref.runs import discovery, importers, lm_eval
from fmn_ref.runs.folder import RunFolder
from fmn_ref.runs.torch_files import KERAS

MOST = 12  # files of a folder

SEEDS = [
    b"epoch_1.pt\nepoch_2.pt\nepoch_10.pt\nbest.pt\nlast.pt",
    b"checkpoint-100/model.safetensors\ncheckpoint-20/model.safetensors\ncheckpoint-20/optimizer.pt",
    b"epoch=1-step=500.ckpt\nepoch=2-step=1000.ckpt\nepoch=-1.ckpt\nlast.ckpt",
    b"m-00001-of-00002.safetensors\nm-00002-of-00002.safetensors\nmodel.safetensors.index.json",
    b"a_1_0.5.pth\na_2_0.25.pth\na_3_1e-5.pth\n.a_4.pth.tmp",
    b"epoch_00001.pt\nepoch_00002.pt\nepoch_1.weights.h5\nepoch_2.weights.h5\nepoch_1.keras",
    b"1.2.3.pt\n1.2.4.pt\n\xd9\xa3.pt\n\xff1.pt\n[12]*?.pt",
    b"samples_a_2026-11-26T06-05-31.2.jsonl\nb/samples_a.jsonl\n10/samples_a_b.jsonl",
]


class Names:
    """Stands for a path: what is written to it becomes a folder of files with these names."""

    name = ""  # errors are checked by `read`

    def __init__(self, folder):
        self.folder = folder / "files"

    def write_bytes(self, data):
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()
        self.names = []
        for raw in data.split(b"\n")[:MOST]:
            parts = raw.decode("utf-8", "surrogateescape").split("/")
            if len(parts) > 2 or {"", ".", ".."} & {*parts}:
                continue
            path = Path(self.folder, *parts)
            with contextlib.suppress(OSError, ValueError):  # no name that a file can have
                path.parent.mkdir(exist_ok=True)
                path.write_bytes(bytes(64))
                self.names.append("/".join(parts))


def read(path):
    """Search the folder in all ways; what is found must be in its order."""
    files = [path.folder / name for name in dict.fromkeys(path.names)]
    sources = [(path.folder, discovery.foreign.ENDINGS), (path.folder, KERAS)]
    sources += [(str(path.folder / pattern), discovery.foreign.ENDINGS) for pattern in ("*", "*/*")]
    for source, endings in sources:
        check(path.folder, functools.partial(discovery.find_checkpoints, source, endings=endings))
    found = check(path.folder, lambda: discovery.find_checkpoints(files)) if files else None
    random.Random(0).shuffle(files)
    again = check(path.folder, lambda: discovery.find_checkpoints(files)) if files else None
    assert found == again, f"the order of a list matters: {found} or {again}"
    refused(path.folder, lambda: importers._in_order(path.folder, "*"))
    refused(path.folder, lambda: lm_eval._sample_files([path.folder], "*"))
    RunFolder(path.folder.parent)._checkpoint_files(".pt")


def refused(folder, call):
    """What the call returns; None if it refuses the files, by an error that names one of them or the folder."""
    try:
        return call()
    except (ValueError, OSError) as error:
        names = {folder.name, *(part for p in folder.rglob("*") for part in (p.name, repr(p.name)[1:-1]))}
        if any(name in str(error) for name in names):
            return None
        raise AssertionError(f"no name in {error!r}") from error


def check(folder, call):
    """What is found, which must be files of the folder in the order of numbers that their names hold."""
    found = refused(folder, call)
    for number, path in (found or {}).items():
        digits = re.findall(r"[0-9]+", path.relative_to(folder.parent).as_posix())
        assert number in map(int, digits), f"{number} is not in {path}"
        assert path.exists(), f"{path} is not there"
    assert list(found or ()) == sorted(found or ()), f"not in order: {found}"
    assert len(set((found or {}).values())) == len(found or ()), f"a file has several numbers: {found}"
    return found
