"""A run in all formats: loaded without slope, bytes, and a local task for lm-eval.

python formats.py checkpoints/demo exported          # exported: a new folder
cd exported && slope eval back hf slope hf-folded --tasks continuation.yaml
"""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import islice
from pathlib import Path

import torch

import slope
from slope import cli
from slope.data.config import DataConfig
from slope.data.corpora import open_corpus
from slope.deploy import open_source

EXAMPLES = 200
EXPORTS = {
    "slope": ["--format", "slope"],
    "slope-bf16": ["--format", "slope", "--dtype", "bfloat16"],
    "hf": ["--format", "hf"],
    "hf-bf16": ["--format", "hf", "--dtype", "bfloat16"],
    "hf-folded": ["--format", "hf", "--fold"],
    "peft": ["--format", "peft"],
}
TASK = """\
task: continuation
dataset_path: json
dataset_kwargs: {data_files: {test: continuation.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
doc_to_choice: "{{choices}}"
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
# transformers and peft alone: importing slope is an error in this process.
WITHOUT_SLOPE = """
import sys, torch
sys.modules["slope"] = None
from peft import PeftModel
from transformers import AutoModelForCausalLM as Auto
ids = torch.load("ids.pt")
with torch.no_grad():
    out = {name: Auto.from_pretrained(name)(input_ids=ids).logits for name in ("hf", "hf-folded")}
    for name in ("peft", "hf/adapter"):
        model = PeftModel.from_pretrained(Auto.from_pretrained("hf"), name)
        out[name] = model(input_ids=ids).logits
assert not [name for name in sys.modules if name.startswith("slope.")]
torch.save(out, "logits.pt")
"""


def logits(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Of the model in eval mode."""
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=ids).logits
    return found


def difference(one: torch.Tensor, other: torch.Tensor) -> str:
    """In words."""
    largest = float((one - other).abs().max())
    return "equal bit for bit" if largest == 0 else f"largest difference {largest:.1e}"


def main(run: str, output: str) -> None:
    """Export, compare, and print what was found."""
    source, folder = open_source(run), Path(output)
    folder.mkdir()
    for name, options in EXPORTS.items():
        assert cli.main(["export", run, *options, "--output", str(folder / name)]) == 0
    zeros = ["--sparsify", "zeros", "--format", "slope", "--output", str(folder / "back")]
    assert cli.main(["export", str(folder / "hf"), *zeros]) == 0

    texts = [text for text, _ in islice(open_corpus(DataConfig()).documents(), EXAMPLES)]
    halves = [(t[: len(t) // 2], t[len(t) // 2 :][:120]) for t in texts]
    with (folder / "continuation.jsonl").open("w", encoding="utf-8") as file:
        for i, (question, right) in enumerate(halves):
            wrong = halves[(i + 1) % len(halves)][1]
            choices = [right, wrong] if i % 2 else [wrong, right]
            row = {"question": question, "choices": choices, "answer": i % 2 ^ 1}
            file.write(json.dumps(row) + "\n")
    (folder / "continuation.yaml").write_text(TASK)

    ids = torch.tensor([source.tokenizer(" ".join(texts[:4]))["input_ids"][:128]])
    torch.save(ids, folder / "ids.pt")
    with_adapters = logits(source.model, ids)
    print("slope:", difference(logits(slope.load_pretrained(folder / "slope"), ids), with_adapters))
    slope.deactivate_adapters(source.model)
    without = logits(source.model, ids)
    back = slope.load_pretrained(folder / "back")
    print("hf and back to slope:", difference(logits(back, ids), without))
    print("without the adapters:", difference(without, with_adapters))

    subprocess.run([sys.executable, "-c", WITHOUT_SLOPE], cwd=folder, check=True)
    found = torch.load(folder / "logits.pt")
    print("hf, by transformers alone:", difference(found["hf"], without))
    for name in ("hf-folded", "peft", "hf/adapter"):
        print(f"{name}, by transformers and peft alone:", difference(found[name], with_adapters))
    for name in (*EXPORTS, "back"):
        weights = list((folder / name).glob("*.safetensors"))
        print(f"{name}: {sum(p.stat().st_size for p in weights):,} bytes of weights")


if __name__ == "__main__":
    main(*sys.argv[1:])
