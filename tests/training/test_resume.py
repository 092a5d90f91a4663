"""Processes killed at random moments, also within a write, resume and end with the bits of an unbroken run."""

import random

from kill_runs import kill_both


def test_killed_ten_times(tmp_path):
    result = kill_both(tmp_path, 10, random.randrange(2**32))
    for job in ("training", "distillation"):
        print(*result[job]["hits"], sep="\n")
        assert sum(result[job]["kills"].values()) == 10
        assert result[job]["different"] == []
