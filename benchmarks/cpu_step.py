"""Time of a sparse training step beside the dense step of the same model, on the CPU.

    python benchmarks/cpu_step.py --output benchmarks/results/<date>_<device>_cpu_step

A step is ``accumulation`` forwards and backwards, gradient clipping and fused AdamW, of a GPT-2
with random weights and no dropout on random tokens. Dense and sparse steps alternate in pairs, and
from pair to pair the order too, so that a slow moment of the machine hits both. The table shows
median times, the median of the pairs' ratios, and the ratios' quartiles. Writes ``pairs.csv`` (all
pairs), ``table.md``, ``log.txt`` and ``env.json``.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import logging
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import GPT2Config, GPT2LMHeadModel

import slope

log = logging.getLogger("cpu_step")


class Case(NamedTuple):
    """One row of the table: model size, tokens of a micro-batch, and how often masks refresh."""

    layers: int
    width: int
    sequences: int
    length: int
    accumulation: int
    column_mask_interval: int = 1
    pattern: str = "2:4"
    vocabulary: int = 4096

    @property
    def tokens(self) -> int:
        """Tokens in one micro-batch."""
        return self.sequences * self.length


# From the shapes of the demo to those where expanding the weights cannot pay: few tokens, no
# accumulation. No row is left out of the table.
CASES = [
    Case(4, 128, 16, 128, 1),
    Case(4, 128, 1, 64, 1),
    Case(4, 256, 16, 128, 1),
    Case(4, 256, 4, 128, 4),
    Case(4, 256, 1, 64, 1),
    Case(4, 512, 8, 256, 1),
    Case(4, 512, 2, 256, 4),
    Case(4, 512, 1, 64, 1),
    Case(4, 512, 1, 64, 8),
    Case(2, 768, 4, 256, 1),
    Case(2, 768, 4, 256, 4),
    Case(2, 768, 1, 128, 1),
    Case(2, 768, 1, 128, 1, column_mask_interval=100),
    Case(4, 256, 16, 128, 1, pattern="2:8"),
]
QUICK = [Case(2, 128, 4, 64, 1), Case(2, 128, 1, 32, 2)]


def make_step(case: Case, sparse: bool) -> Callable[[], None]:
    """A function that does one whole optimizer step."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=case.vocabulary, n_positions=case.length, n_embd=case.width,
            n_layer=case.layers, n_head=case.width // 64, attn_implementation="sdpa",
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
            loss_type="ForCausalLM",
        )
    )  # fmt: skip
    if sparse:
        interval = case.column_mask_interval
        config = slope.SparsityConfig(pattern=case.pattern, column_mask_interval=interval)
        slope.sparsify(model, config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.1, fused=True)
    schedule = slope.SlopeSchedule(10**6, lora_start=None)
    tokens = torch.randint(0, case.vocabulary, (case.accumulation, case.sequences, case.length))
    done = 0

    def step() -> None:
        nonlocal done
        if sparse:
            schedule.apply(model, done)
        for micro_batch in tokens:
            loss = model(input_ids=micro_batch, labels=micro_batch).loss
            (loss / case.accumulation).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        done += 1

    return step


def seconds(step: Callable[[], None]) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def measure(case: Case, pairs: int, warmup: int) -> list[tuple[float, float]]:
    """Interleaved (dense, sparse) seconds."""
    dense, sparse = make_step(case, sparse=False), make_step(case, sparse=True)
    for _ in range(warmup):
        dense()
        sparse()
    times = []
    for number in range(pairs):
        first, second = (sparse, dense) if number % 2 else (dense, sparse)
        pair = (seconds(first), seconds(second))
        times.append(pair[::-1] if number % 2 else pair)
    return times


def table_row(case: Case, times: list[tuple[float, float]]) -> str:
    ratios = [sparse / dense for dense, sparse in times]
    low, _, high = statistics.quantiles(ratios, n=4)
    dense_ms, sparse_ms = (1000 * statistics.median(column) for column in zip(*times, strict=True))
    return (
        f"| {case.layers} x {case.width} | {case.pattern} | {case.tokens} | {case.accumulation} "
        f"| {case.column_mask_interval} | {dense_ms:.1f} | {sparse_ms:.1f} "
        f"| **{statistics.median(ratios):.3f}** | {low:.3f}–{high:.3f} | {len(times)} |"
    )


HEADER = (
    "| layers x width | pattern | tokens per micro-batch | micro-batches | mask refresh, steps "
    "| dense, ms | sparse, ms | sparse / dense | quartiles | pairs |\n" + "|---" * 10 + "|"
)


def environment(arguments: argparse.Namespace) -> dict[str, object]:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    now = datetime.datetime.now(datetime.timezone.utc)
    return {
        "date": now.isoformat(timespec="seconds"), "commit": commit,
        "slope": slope.__version__, "torch": torch.__version__,
        "python": platform.python_version(), "system": platform.platform(),
        "cpu": names[0] if names else platform.processor(), "cores": os.cpu_count(),
        "threads": torch.get_num_threads(), "load_average": os.getloadavg(),
        "pairs": arguments.pairs, "warmup": arguments.warmup,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="results folder")
    parser.add_argument("--pairs", type=int, default=21, help="dense/sparse pairs per case")
    parser.add_argument("--warmup", type=int, default=3, help="steps of each before measuring")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--quick", action="store_true", help="two tiny cases, to try the script")
    arguments = parser.parse_args()
    if arguments.pairs < 2:
        parser.error(f"--pairs={arguments.pairs} gives no quartiles; use at least 2.")
    torch.set_num_threads(arguments.threads)
    (output := arguments.output).mkdir(parents=True, exist_ok=True)
    handlers = [logging.StreamHandler(), logging.FileHandler(output / "log.txt", mode="w")]
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", handlers=handlers)
    settings = environment(arguments)
    (output / "env.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    log.info("%s", settings)

    rows = []
    with (output / "pairs.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([*Case._fields, "pair", "dense_seconds", "sparse_seconds"])
        for case in QUICK if arguments.quick else CASES:
            times = measure(case, arguments.pairs, arguments.warmup)
            for number, pair in enumerate(times):
                writer.writerow([*case, number, *(f"{value:.6f}" for value in pair)])
            file.flush()
            rows.append(table_row(case, times))
            log.info("%s", rows[-1])
    table = "\n".join([HEADER, *rows]) + "\n"
    (output / "table.md").write_text(table, encoding="utf-8")
    print(table, end="")


if __name__ == "__main__":
    main()
