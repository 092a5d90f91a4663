import json

import pytest

from fmn_ref.runs import tensors


@pytest.mark.parametrize("shard", ["\ud800", "a\0b"])
def test_a_shard_whose_name_no_file_can_have_is_refused_by_the_index(tmp_path, shard):
    """Fuzzing found the error of the system, which names no file."""
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"weight": shard}}))
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json"):
        tensors.read_state(tmp_path)
