"""Make two small task sets from the Wikipedia text that the ``demo`` extra installs.

    python examples/make_finetune_sets.py sets

writes ``sets/SST-2/{train,dev}.tsv`` in the layout of GLUE's SST-2 (is this sentence from an
article on an artist, 1, or on another person, 0?) and ``sets/squad/{train,dev}-v1.1.json`` in that
of SQuAD v1.1 (what a thing is, where it is, which year its text names first). No article is in both
splits. The same text gives the same files. ``slope finetune task=glue/sst2 data=sets`` and
``task=squad data=sets/squad`` read them.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from slope.data.config import DataConfig
from slope.data.corpora import open_corpus

DEV_EVERY = 10  # one article in ten is held out
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
    """Write both sets."""
    parser = argparse.ArgumentParser(description="Make two small task sets from Wikipedia text.")
    parser.add_argument("folder", type=Path, help="where to write; made if it does not exist")
    folder = parser.parse_args().folder
    for name in ("SST-2", "squad"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for split, rows in classification().items():
        path = folder / "SST-2" / f"{split}.tsv"
        path.write_text("\n".join(["sentence\tlabel", *rows]) + "\n", encoding="utf-8")
        print(f"{path}: {len(rows):,} sentences")
    for split, paragraphs in answering().items():
        path = folder / "squad" / f"{split}-v1.1.json"
        content = {"version": "1.1", "data": [{"title": "Wikipedia", "paragraphs": paragraphs}]}
        path.write_text(json.dumps(content, ensure_ascii=False, indent=1), encoding="utf-8")
        print(f"{path}: {sum(len(p['qas']) for p in paragraphs):,} questions")


if __name__ == "__main__":
    main()
