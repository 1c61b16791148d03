"""The example that makes small task sets out of the embedded text."""

from __future__ import annotations

import runpy
from pathlib import Path

from tiny_bert import chosen

from slope.finetune.glue import GlueTask
from slope.finetune.squad import SquadTask

SCRIPT = Path(__file__).parents[2] / "examples" / "make_finetune_sets.py"


def test_the_sets_are_in_the_official_formats(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", [str(SCRIPT), str(tmp_path)])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    sentences = GlueTask(chosen("task=glue/sst2", "init_from=x", f"data={tmp_path}")).examples
    pairs = GlueTask(chosen("task=glue/rte", "init_from=x", f"data={tmp_path}")).examples
    questions = SquadTask(chosen("task=squad", "init_from=x", f"data={tmp_path}/squad")).questions
    for split, least in (("train", 1000), ("dev", 100)):
        labels = [example.label for example in sentences[split]]
        assert len(labels) > least
        assert sum(labels) == len(labels) / 2
        assert len(questions[split]) > least
        # The same beginning with what follows it, then with something else.
        assert len(pairs[split]) > least
        for true, wrong in zip(pairs[split][::2], pairs[split][1::2], strict=True):
            assert (true.label, wrong.label) == (0, 1)
            assert true.sentences[0] == wrong.sentences[0]
            assert true.sentences[1] != wrong.sentences[1]
    assert not {p.sentences[0] for p in pairs["train"]} & {p.sentences[0] for p in pairs["dev"]}
    contexts = {split: {q.context for q in asked} for split, asked in questions.items()}
    assert not contexts["train"] & contexts["dev"]
    assert "dev-v1.1.json: 1,0" in capsys.readouterr().out
