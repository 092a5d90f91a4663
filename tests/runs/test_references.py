import json

import pytest

from fmn_ref.runs import references


@pytest.mark.parametrize(
    "stamp", [3, None, [], {"size": 3}, {"size": 3, "mtime_ns": 10**300}, {"size": 3, "mtime_ns": 1e300}, {"size": "3"}]
)
def test_a_stamp_that_is_not_of_integers_is_refused_by_name(tmp_path, stamp):
    """Fuzzing found KeyError, OverflowError and a TypeError without the name, when the message was made."""
    (tmp_path / "target.pt").write_bytes(b"abc")
    content = {"format": references.FORMAT, "version": 1, "path": str(tmp_path / "target.pt"), "key": ""}
    path = tmp_path / "epoch_00000.ref.json"
    path.write_text(json.dumps(content | {"files": {"target.pt": stamp}}))
    with pytest.raises(ValueError, match=r"epoch_00000\.ref\.json.*size and mtime_ns"):
        references.check_unchanged(path)
