"""Train: ``python training/run.py experiment=owt/gpt2s …``, the same as ``slope train …``."""

import sys

from slope.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
