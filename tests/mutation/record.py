"""Write benchmarks/results/mutation.json from the verdicts of mutate.py, and list the survivors without an explanation.

    python tests/mutation/record.py

A mutant counts as killed if a test fails on it, or if it runs out of time or memory. `survivors.toml` explains those
that no test can notice. The score is the share of the killed among those that ran, which are a random sample under
`mutate.py --share`; `score_of_the_others` leaves the explained out.
"""

from __future__ import annotations

import json
import platform
import tomllib
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mutants import mutants
from mutate import ROOMS, ROOT, stored_verdicts

OUTPUT = ROOT / "benchmarks" / "results" / "mutation.json"


def explained() -> dict[tuple[str, str, str], str]:
    """{(file, line, mutated line): reason} of survivors.toml."""
    content = tomllib.loads(Path(__file__).with_name("survivors.toml").read_text())
    reasons = content.pop("reasons")
    return {
        (file, entry["line"], after): reasons[entry["reason"]]
        for file, entries in content.items()
        for entry in entries
        for after in entry["to"]
    }


def count(file: str, verdicts: dict[tuple[str, ...], dict[str, Any]], known: dict[tuple[str, str, str], str]) -> Any:
    """The numbers of a file; prints its survivors that nothing explains."""
    keys = {mutant.key: mutant.lines[0] for mutant in mutants(ROOT, file)}
    found = Counter(verdicts[key]["verdict"] if key in verdicts else "not run" for key in keys)
    survivors = [key for key in keys if key in verdicts and verdicts[key]["verdict"] == "survived"]
    unexplained = [key for key in survivors if (key[0], key[2], key[3]) not in known]
    for key in unexplained:
        print(f"{file}:{keys[key]} {key[1]}\n  - {key[2]}\n  + {key[3]}")
    run = len(keys) - found["not run"]
    killed, n_explained = found["killed"] + found["timeout"], len(survivors) - len(unexplained)
    return {
        "mutants": len(keys),
        "run": run,
        "killed": found["killed"],
        "timeouts": found["timeout"],
        "survived": len(survivors),
        "explained": n_explained,
        "score": round(killed / run, 4) if run else None,
        "score_of_the_others": round(killed / (run - n_explained), 4) if run else None,
    }


def main() -> None:
    known, files = explained(), {}
    for room, (names, _) in ROOMS.items():
        verdicts = stored_verdicts(ROOT / "build" / "mutation" / room / "verdicts.jsonl")
        for name in names.split():
            file = f"fmn_ref/{room}/{name}.py"
            files[file] = count(file, verdicts, known)
    total = {
        key: sum(numbers[key] for numbers in files.values()) for key in next(iter(files.values())) if "score" not in key
    }
    killed = total["killed"] + total["timeouts"]
    total["score"] = round(killed / total["run"], 4)
    total["score_of_the_others"] = round(killed / (total["run"] - total["explained"]), 4)
    tool = f"operators of mutmut {version('mutmut')} and three more, by tests/mutation/mutants.py"
    record = {
        "tool": tool,
        "python": platform.python_version(),
        "commands": "tests/mutation/README.md",
        "files": files,
        "all": total,
    }
    OUTPUT.write_text(json.dumps(record, indent=1) + "\n")
    for file, numbers in {**files, "all": total}.items():
        print(f"{file:36} " + "  ".join(f"{key} {value}" for key, value in numbers.items()))


if __name__ == "__main__":
    main()
