"""Make three small task sets from the Wikipedia text that the ``demo`` extra installs.

    python examples/make_finetune_sets.py sets

writes ``sets/SST-2/{train,dev}.tsv`` in the layout of GLUE's SST-2 (is this sentence from an
article on an artist, 1, or on another person, 0?), ``sets/RTE/{train,dev}.tsv`` in that of RTE (do
two sentences go on with the two others, or are these from another article?) and
``sets/squad/{train,dev}-v1.1.json`` in that of SQuAD v1.1 (what a thing is, where it is, which year
its text names first). No article is in both splits; the dev split of RTE is from the articles that
``experiment=bert/demo`` validates on, which it never trains on. The same text gives the same files.
``slope finetune task=glue/sst2 data=sets``, ``task=glue/rte data=sets`` and ``task=squad
data=sets/squad`` read them.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

from slope.data.config import DataConfig
from slope.data.corpora import open_corpus

DEV_EVERY = 10  # one article in ten is held out
DEMO_VAL_RATIO = 0.02  # of experiment=bert/demo
PAIRS = 2000  # to train on, each with a true and a wrong second half
ARTIST = re.compile(
    r"\b(writer|author|novelist|poet|playwright|dramatist|essayist|painter|sculptor|architect|artist|"
    r"composer|musician|singer|songwriter|pianist|conductor|actor|actress|director|filmmaker|"
    r"comedian|dancer|photographer)\b"
)
OTHER_PERSON = re.compile(
    r"\b(physicist|chemist|mathematician|philosopher|scientist|biologist|astronomer|engineer|inventor|"
    r"economist|theologian|politician|statesman|president|king|queen|emperor|pharaoh|general|"
    r"revolutionary|explorer|player|footballer|boxer|businessman|leader)\b"
)
PLACE = re.compile(
    r"\b(city|town|country|state|province|region|capital|island|river|lake|mountain|sea|desert|"
    r"peninsula|bay|archipelago|municipality)\b"
)
SENTENCE = re.compile(r"(?<=[.!?])\s+(?=[A-Z])")
IS = re.compile(
    r"\b(?:is|are|was|were) ((?:a|an|the) [^.,;]{4,100}?)(?= (?:that|which|who|in)\b|[.,;])"
)
WHERE = re.compile(r"\b(?:in|of) ((?:[A-Z][a-z]+)(?: (?:and )?[A-Z][a-z]+)*)")
YEAR = re.compile(r"\b(?:in|since|from|between|until) (1\d{3}|20[012]\d)\b")


def articles() -> Iterator[tuple[str, str, list[str]]]:
    """(split, title, sentences) of each article."""
    for number, (document, _) in enumerate(open_corpus(DataConfig()).documents()):
        title, _, text = document.partition("\n")
        split = "train" if number % DEV_EVERY else "dev"
        yield split, re.sub(r" \(.*\)", "", title), SENTENCE.split(" ".join(text.split()))


def classification() -> dict[str, list[str]]:
    """Rows of each split: sentences after the first, which itself says what the article is on."""
    found: dict[tuple[str, int], list[str]] = {}
    for split, _, (first, *others) in articles():
        defined = IS.search(first)
        artist, other = (bool(defined and k.search(defined[1])) for k in (ARTIST, OTHER_PERSON))
        if artist != other:
            rows = [s for s in others if 5 <= len(s.split()) <= 40 and "\t" not in s]
            found.setdefault((split, int(artist)), []).extend(rows)
    splits = {}
    for split in ("train", "dev"):
        # As many of one class as of the other, in turn: 50 % is chance.
        pairs = zip(found[split, 0], found[split, 1], strict=False)
        splits[split] = [f"{text}\t{label}" for pair in pairs for label, text in enumerate(pair)]
    return splits


def held_out(document: str) -> bool:
    """Whether ``experiment=bert/demo`` keeps the document for validation: by a hash of its text."""
    salt = DataConfig().val_split_seed.to_bytes(16, "little")
    digest = hashlib.blake2b(document.encode(), digest_size=8, salt=salt).digest()
    return int.from_bytes(digest, "little") < int(DEMO_VAL_RATIO * 2**64)


def continuation() -> dict[str, list[str]]:
    """Rows of each split: two sentences with the two after them, then with two of another text."""
    found: dict[str, list[tuple[str, str]]] = {"train": [], "dev": []}
    for document, _ in open_corpus(DataConfig()).documents():
        sentences = SENTENCE.split(" ".join(document.partition("\n")[2].split()))
        for start in range(0, len(sentences) - 3, 2):
            pair = (
                " ".join(sentences[start : start + 2]),
                " ".join(sentences[start + 2 : start + 4]),
            )
            if all(8 <= len(text.split()) <= 60 for text in pair):
                found["dev" if held_out(document) else "train"].append(pair)
    chance = random.Random(0)
    splits: dict[str, list[str]] = {}
    for split, pairs in found.items():
        chance.shuffle(pairs)
        rows = []
        for (first, second), (_, other) in pairwise([*pairs[:PAIRS], pairs[0]]):
            rows += [f"{first}\t{second}\tentailment", f"{first}\t{other}\tnot_entailment"]
        splits[split] = [f"{number}\t{row}" for number, row in enumerate(rows)]
    return splits


def answering() -> dict[str, list[dict[str, Any]]]:
    """Paragraphs with their questions."""
    splits: dict[str, list[dict[str, Any]]] = {"train": [], "dev": []}
    for number, (split, title, sentences) in enumerate(articles()):
        context = " ".join(sentences)
        asked = {
            f"What is {title}?": IS.search(sentences[0]),
            f"Where is {title}?": WHERE.search(sentences[0])
            if PLACE.search(sentences[0])
            else None,
            f"Which year does the text on {title} name first?": YEAR.search(context),
        }
        questions = [
            {
                "id": f"{number}-{kind}",
                "question": question,
                "answers": [{"text": match[1], "answer_start": match.start(1)}],
            }
            for kind, (question, match) in enumerate(asked.items())
            if match
        ]
        if questions:
            splits[split].append({"context": context, "qas": questions})
    return splits


def main() -> None:
    """Write the sets."""
    parser = argparse.ArgumentParser(description="Make three small task sets from Wikipedia text.")
    parser.add_argument("folder", type=Path, help="where to write; made if it does not exist")
    folder = parser.parse_args().folder
    for name in ("SST-2", "RTE", "squad"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for split, rows in classification().items():
        path = folder / "SST-2" / f"{split}.tsv"
        path.write_text("\n".join(["sentence\tlabel", *rows]) + "\n", encoding="utf-8")
        print(f"{path}: {len(rows):,} sentences")
    for split, rows in continuation().items():
        path = folder / "RTE" / f"{split}.tsv"
        names = "index\tsentence1\tsentence2\tlabel"
        path.write_text("\n".join([names, *rows]) + "\n", encoding="utf-8")
        print(f"{path}: {len(rows):,} pairs")
    for split, paragraphs in answering().items():
        path = folder / "squad" / f"{split}-v1.1.json"
        content = {"version": "1.1", "data": [{"title": "Wikipedia", "paragraphs": paragraphs}]}
        path.write_text(json.dumps(content, ensure_ascii=False, indent=1), encoding="utf-8")
        print(f"{path}: {sum(len(p['qas']) for p in paragraphs):,} questions")


if __name__ == "__main__":
    main()
