"""The texts: calibration.txt, 16,384 tokens of training documents; essay.txt, another kind of text.

python texts.py smollm2 secA1.md.gz        # the latter from Debian's package anarchism 15.3-3
"""

from __future__ import annotations

import gzip
import re
import sys
from pathlib import Path

from slope.data import prepare

LENGTH = 256


def main(tokenizer: str, essay: str) -> None:
    """Tokenize the demo's corpus into .slope-cache as the recovery does, and write the texts."""
    data = prepare(
        {"dataset": "demo", "tokenizer": tokenizer, "max_length": LENGTH, "val_ratio": 0.01},
        progress=False,
    )
    rows = [data.train[i].tolist() for i in range(16_384 // LENGTH)]
    documents = data.tokenizer.decode(sum(rows, [])).split(data.tokenizer.eos_token)
    Path("calibration.txt").write_text("\n\n".join(documents), encoding="utf-8")
    with gzip.open(essay, "rt", encoding="utf-8") as file:
        text = file.read()
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text)
    Path("essay.txt").write_text(re.sub(r"[*_`#>]{1,3}", "", text), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
