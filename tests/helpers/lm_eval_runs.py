"""A program: grade tiny random language models with lm-evaluation-harness, without any download.

    python lm_eval_runs.py FOLDER

FOLDER/out/checkpoint-N gets what the harness writes, for two tasks on binary sums: `sums_choice` (four options) and
`sums_draws` (five sampled answers). Needs torch, transformers and lm_eval. tests/data/lm_eval was made by it.
"""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

STEPS = (100, 200, 1000)
CHARACTERS = "01 +=\n"
COMMON = """dataset_path: json
dataset_kwargs: {data_files: {test: sums.jsonl}}
test_split: test
doc_to_text: "{{question}}"
"""
TASKS = {
    "sums_choice": """output_type: multiple_choice
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "sums_draws": """output_type: generate_until
doc_to_target: "{{last_bit}}"
generation_kwargs: {until: ["x"], max_gen_toks: 8, do_sample: true, temperature: 1.0}
repeats: 5
metric_list: [{metric: exact_match}]
filter_list:
  - {name: draws, filter: [{function: regex, regex_pattern: "([01])"}, {function: take_first_k, k: 5}]}
  - {name: maj, filter: [{function: regex, regex_pattern: "([01])"}, {function: majority_vote}, {function: take_first}]}
""",
}


def write_models(folder):
    import torch
    from tokenizers import Tokenizer, decoders, models
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    vocab = {c: i for i, c in enumerate(["<end>", *CHARACTERS])}
    characters = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<end>"))
    characters.decoder = decoders.Fuse()
    special = dict.fromkeys(("eos_token", "pad_token", "unk_token"), "<end>")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=characters, model_max_length=64, **special)
    sizes = {"vocab_size": len(vocab), "n_positions": 64, "n_embd": 16, "n_layer": 1, "n_head": 2}
    for step in STEPS:
        torch.manual_seed(step)
        model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))
        with torch.no_grad():
            model.transformer.wte.weight *= 10  # so that the models differ
        model.save_pretrained(folder / f"checkpoint-{step}")
        tokenizer.save_pretrained(folder / f"checkpoint-{step}")


def write_tasks(folder):
    rng = random.Random(0)
    rows = []
    for _ in range(6):
        a, b = rng.randint(1, 9), rng.randint(1, 9)
        choices = [f"{c:b}" for c in rng.sample([a + b, a + b + 1, a + b + 2, 30 + a], 4)]
        row = {"question": f"{a:b} + {b:b} =", "choices": choices, "answer": choices.index(f"{a + b:b}")}
        rows.append({**row, "last_bit": str((a + b) % 2)})
    (folder / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "tasks").mkdir()
    for name, text in TASKS.items():
        (folder / "tasks" / f"{name}.yaml").write_text(f"task: {name}\n{COMMON}{text}")


def main(folder):
    write_models(folder)
    write_tasks(folder)
    offline = dict.fromkeys(("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"), "1")
    environment = os.environ | offline | {"HF_HOME": str(folder / "cache"), "TOKENIZERS_PARALLELISM": "false"}
    for step in STEPS:
        command = [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--device", "cpu", "--batch_size", "8"]
        command += ["--model_args", f"pretrained=checkpoint-{step}", "--include_path", "tasks", "--tasks", *TASKS]
        command += ["--log_samples", "--output_path", f"out/checkpoint-{step}"]
        subprocess.run(command, check=True, cwd=folder, env=environment)


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute())
