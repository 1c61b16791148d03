"""The page of a run: complete, self-contained, and never written over."""

from __future__ import annotations

import base64
import json
from html.parser import HTMLParser

import pytest

from slope import cli
from slope.report import summary_of, write_report

VOID = {"meta", "img"}
REPORT = """\
sparsified 1 of 2 linear layers (2:4), 470.5k -> 305.9k parameters
  layer         d_out x d_in  pattern  note
  h.0.attn         384 x 128  dense    first linear layer after the embedding
  h.0.mlp         1024 x 128  2:4
"""
MASKS = "step,layer,density,lemma\n10,h.0.mlp,0.7,\n20,h.0.mlp,0.5,\n20,total,0.25,\n"


class Page(HTMLParser):
    """Elements with their attributes, rows of tables, and text; every element must be closed."""

    def __init__(self, text):
        super().__init__()
        self.open, self.elements, self.rows, self.text = [], [], [], ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("th", "td"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data
        if self.open and self.open[-1] in ("th", "td"):
            self.rows[-1][-1] += data


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "logs" / "mine"
    folder.mkdir(parents=True)
    (folder / "metrics.csv").write_text(
        "step,tokens,seconds,train/loss,val/loss\n10,1000,5,4.5,\n20,2000,10,4.0,4.1\n"
    )
    return folder


def finish(folder):
    summary = {"val_loss": 4.1, "peak_memory_bytes": 3 << 20, "wall_seconds": 3723.4}
    summary |= {"adapters_started_at_step": None, "device": "cpu", "tokens": 2_000_000}
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "report.txt").write_text(REPORT)
    (folder / "diagnostics.csv").write_text(MASKS)
    (folder / "config.yaml").write_text("name: mine\nmodel:\n  family: gpt2\n")
    (folder / "sample.txt").write_text('<script src="https://evil.example/x.js"></script> & more')


def test_the_page_has_summary_figures_sparsity_and_configuration(folder):
    finish(folder)
    path = write_report(folder)
    assert path == folder / "report.html"
    page = Page(path.read_text(encoding="utf-8"))
    for row in (
        ["val_loss", "4.1000", ""],
        ["peak_memory_bytes", "3,145,728", "3.0 MiB"],
        ["wall_seconds", "3,723.4000", "1:02:03 h"],
        ["tokens", "2,000,000", "2.0 million"],
        ["adapters_started_at_step", "–", ""],
        ["device", "cpu", ""],
        ["layer", "d_out x d_in", "pattern", "note", "density"],
        ["h.0.attn", "384 x 128", "dense", "first linear layer after the embedding", ""],
        ["h.0.mlp", "1024 x 128", "2:4", "", "0.5000"],
        ["total", "", "", "mean over the sparse weights", "0.2500"],
    ):
        assert row in page.rows
    assert "sparsified 1 of 2 linear layers" in page.text and "measured at step 20" in page.text
    assert "model:\n  family: gpt2" in page.text
    assert "evil.example/x.js" in page.text  # as text
    # The headings of the measured columns stand above their numbers, the others on the left.
    headings = [(tag, style) for tag, style in page.elements if tag == "th" and style]
    assert headings == [("th", {"class": "number"})]
    images = [attributes for tag, attributes in page.elements if tag == "img"]
    assert len(images) == 2 and all(image["alt"] for image in images)
    for image in images:
        kind, _, data = image["src"].partition(",")
        assert kind == "data:image/svg+xml;base64"
        assert "</svg>" in base64.b64decode(data).decode()


def test_the_page_needs_no_other_file_and_no_network(folder):
    finish(folder)
    page = Page(write_report(folder).read_text(encoding="utf-8"))
    assert not {tag for tag, _ in page.elements} & {"script", "link", "iframe", "object", "base"}
    links = [
        value
        for _, attributes in page.elements
        for name, value in attributes.items()
        if name in ("src", "href", "srcset", "data", "action")
    ]
    assert links and all(link.startswith("data:") for link in links)
    (policy,) = [attributes for _, attributes in page.elements if "http-equiv" in attributes]
    assert policy["content"].startswith("default-src 'none'; ")


def test_a_run_that_goes_on_is_reported_as_far_as_it_is(folder):
    page = Page(write_report(folder).read_text(encoding="utf-8"))
    assert "Not finished" in page.text
    assert "There is no report.txt; a run writes it when it ends." in page.text
    assert ["val/loss", "4.1000", ""] in page.rows and ["step", "20", ""] in page.rows
    assert summary_of(folder)["tokens"] == 2000


def test_a_resumed_run_is_reported_by_its_metrics_until_it_ends(folder):
    finish(folder)
    summary = json.loads((folder / "summary.json").read_text())
    (folder / "summary.json").write_text(json.dumps(summary | {"steps": 19}))
    assert "Not finished" in Page(write_report(folder).read_text(encoding="utf-8")).text
    assert summary_of(folder)["step"] == 20
    (folder / "summary.json").write_text(json.dumps(summary | {"steps": 20}))
    assert summary_of(folder)["steps"] == 20


def test_bytes_that_are_no_text_do_not_stop_the_page(folder):
    finish(folder)
    for name in ("report.txt", "config.yaml", "sample.txt"):
        (folder / name).write_bytes(f"{name} caf\xe9\n".encode("latin-1"))
    page = Page(write_report(folder).read_text(encoding="utf-8"))
    assert page.text.count("caf\ufffd") == 3


def test_large_numbers_are_said_in_large_units(folder):
    summary = {"tokens": 196_608_000_000, "peak_memory_bytes": 3 << 30}
    (folder / "summary.json").write_text(json.dumps(summary))
    rows = Page(write_report(folder).read_text(encoding="utf-8")).rows
    assert rows[0] == ["tokens", "196,608,000,000", "196.6 billion"]
    assert rows[1] == ["peak_memory_bytes", "3,221,225,472", "3.0 GiB"]


def test_the_command_replaces_a_page_only_when_told_so(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder.parent.parent)
    finish(folder)
    output = folder / "kept" / "page.html"
    command = ["report", "mine", "--output", str(output)]
    assert cli.main(command) == 1
    assert f"no folder '{output.parent}' for --output {output}; make it." in capsys.readouterr().err
    assert not output.parent.exists()
    output.parent.mkdir()
    assert cli.main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["report"] == str(output) and found["summary"]["val_loss"] == 4.1
    output.write_text("precious")
    assert cli.main(command) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and "page.html' exists; give --force to replace it" in captured.err
    assert output.read_text() == "precious"
    assert cli.main([*command, "--force"]) == 0
    assert capsys.readouterr().out == f"{output}\n"
    assert [path.name for path in output.parent.iterdir()] == ["page.html"]
    assert output.read_text(encoding="utf-8").endswith("</html>\n")
