"""Feed nonsense and forgeries to everything that reads what others wrote, and count the answers.

    python scripts/fuzz_campaign.py --seconds 300 --output logs/fuzz

The targets are those of ``tests/fuzz``: config parser, layer rules, token cache, checkpoint file,
sharded checkpoint, safetensors importer. A case is a seed, so any of them can be done again with
``--only <target> --seed <seed>``. A case fails if anything is raised that is not documented, if
code of a file is run, if a file outside of the folder is written, or after ten seconds.
"""

from __future__ import annotations

import argparse
import logging
import random
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
LONGEST = 10  # seconds of a case


def main() -> int:
    """Command line; 1 if a case failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60, help="for each target")
    parser.add_argument("--output", type=Path, help="folder of the report")
    parser.add_argument("--only", help="one target")
    parser.add_argument("--seed", type=int, help="one case")
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT / "tests" / "fuzz"))
    import fuzz_targets
    import torch

    torch.set_num_threads(1)
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    signal.signal(signal.SIGALRM, _hangs)
    counts: dict[str, Counter[str]] = {}
    failures: dict[tuple[str, str], int] = {}  # the first seed of each
    with tempfile.TemporaryDirectory() as folder:
        for name, target in fuzz_targets.Readers(Path(folder)).targets().items():
            if options.only not in (None, name):
                continue
            counts[name] = Counter()
            for seed in _seeds(options):
                outcome = _case(target, seed)
                counts[name][outcome if outcome in ("refused", "taken") else "failed"] += 1
                if outcome not in ("refused", "taken"):
                    failures.setdefault((name, outcome), seed)
            print(name, dict(counts[name]), flush=True)
    lines = ["| target | cases | refused with a reason | taken | failed |", "|---|---|---|---|---|"]
    for name, found in counts.items():
        numbers = " | ".join(str(found[word]) for word in ("refused", "taken", "failed"))
        lines.append(f"| {name} | {found.total()} | {numbers} |")
    lines += [f"* {name}, seed {seed}: {text}" for (name, text), seed in failures.items()]
    print("\n".join(lines))
    if options.output is not None:
        options.output.mkdir(parents=True, exist_ok=True)
        (options.output / "fuzz.md").write_text("\n".join(lines) + "\n")
    return 1 if failures else 0


def _seeds(options: argparse.Namespace) -> Any:
    if options.seed is not None:
        return iter([options.seed])
    return _until(time.monotonic() + options.seconds)


def _until(end: float) -> Any:
    seed = 0
    while time.monotonic() < end:
        yield seed
        seed += 1


def _case(target: Any, seed: int) -> str:
    """What happened, or where it went wrong."""
    signal.alarm(LONGEST)
    try:
        outcome: str = target(random.Random(seed))
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        ours = [frame for frame in frames if "slope" in frame.filename] or frames
        where = f"{Path(ours[-1].filename).name}:{ours[-1].lineno}"
        return f"{type(error).__name__} at {where}: {str(error)[:120]!r}"
    finally:
        signal.alarm(0)
    return outcome


def _hangs(number: int, frame: Any) -> None:
    raise TimeoutError(f"longer than {LONGEST} s")


if __name__ == "__main__":
    sys.exit(main())
