import json
import sys
from contextlib import nullcontext

import pytest

from fmn_ref.runs import references


def write(folder, target, files):
    """Write a reference to `target` with these stamps; return its path."""
    path = folder / "epoch_00000.ref.json"
    content = {"format": references.FORMAT, "version": 1, "path": str(target), "key": "", "files": files}
    path.write_text(json.dumps(content))
    return path


@pytest.mark.parametrize(
    "stamp", [3, None, [], {"size": 3}, {"size": 3, "mtime_ns": 10**300}, {"size": 3, "mtime_ns": 1e300}, {"size": "3"}]
)
def test_a_stamp_that_is_not_of_integers_is_refused_by_name(tmp_path, stamp):
    """Fuzzing found KeyError, OverflowError and a TypeError without the name, when the message was made."""
    (tmp_path / "target.pt").write_bytes(b"abc")
    path = write(tmp_path, tmp_path / "target.pt", {"target.pt": stamp})
    with pytest.raises(ValueError, match=r"epoch_00000\.ref\.json.*size and mtime_ns"):
        references.check_unchanged(path)


def test_a_path_that_the_system_refuses_is_an_error_that_names_the_reference(tmp_path):
    """Fuzzing found an OSError without the name; from Python 3.14 on, there is no such file."""
    path = write(tmp_path, tmp_path / ("a" * 3000), {})
    with pytest.raises(OSError, match=r"epoch_00000\.ref\.json"):
        references.check_unchanged(path)
    with pytest.raises(OSError, match=r"epoch_00000\.ref\.json") if sys.version_info < (3, 14) else nullcontext():
        assert not references.exists(path)
