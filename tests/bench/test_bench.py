"""``slope bench`` end to end on the CPU, at toy sizes."""

from __future__ import annotations

import csv
import json
import os
import signal

import pytest
import torch

from slope.bench import experiment, infer, layer, models, operands
from slope.bench.memory import MemoryBench
from slope.bench.results import Results
from slope.bench.setup import SetupBench
from slope.bench.timing import Deadline
from slope.cli import main

LAYER = ["--shapes", "32x16", "--tokens", "8"]
TINY = {
    "layer": LAYER,
    "setup": LAYER,
    "lowrank": [*LAYER, "--ranks", "0.25"],
    "train": ["--models", "toy", "--layers", "1,2", "--batch", "1", "--seq", "8",
              "--contenders", "dense,slope"],
    "infer": ["--layers", "1", "--prompt", "8", "--tokens", "1", "--ranks", "0,0.25"],
    "memory": ["--layers", "1", "--batch", "1", "--seq", "8", "--ranks", "0"],
}  # fmt: skip


FUSED = "", " + fuse"


@pytest.fixture
def no_figure(monkeypatch):
    """Drawing takes longer than measuring a toy."""
    monkeypatch.setattr(Results, "write_figure", lambda *arguments: None)


def bench(name, folder, *more):
    arguments = ["bench", name, "--device", "cpu", "--rounds", "2", "--output", str(folder)]
    return main([*arguments, *TINY[name], *more])


def rows_of(folder):
    with (folder / "results.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("name", TINY)
def test_each_measurement_runs_and_writes_its_results(name, tmp_path, capsys):
    folder = tmp_path / "results"
    assert bench(name, folder) == 0
    files = {path.name for path in folder.iterdir()}
    assert files == {"results.csv", "table.md", "figure.png", "env.json", "log.txt"}
    measured = [row for row in rows_of(folder) if not row["failed"]]
    contenders = {row["contender"] for row in measured}
    assert len(contenders) > 1
    if name != "memory":
        timed = [row for row in measured if row["baseline"]]
        assert timed and all(float(row["low_us"]) <= float(row["median_us"]) for row in timed)
        assert all(float(row["speed_up"]) > 0 and row["rounds"] == "2" for row in timed)
    environment = json.loads((folder / "env.json").read_text(encoding="utf-8"))
    assert environment["libraries"]["torch"] == torch.__version__
    assert environment["settings"]["rounds"] == 2
    output = capsys.readouterr()
    assert f"# slope bench {name}" in output.out and str(folder) in output.out
    table = (folder / "table.md").read_text(encoding="utf-8")
    assert all(contender in table for contender in contenders)


@pytest.mark.usefixtures("no_figure")
def test_layer_times_all_products_and_upkeep(tmp_path):
    bench("layer", tmp_path)
    done = {(row["what"], row["contender"]) for row in rows_of(tmp_path) if not row["failed"]}
    products = {"forward", "input gradient", "weight gradient", "layer"}
    assert {(what, who) for what in products for who in ("dense", "slope")} <= done
    assert {("column mask", "slope"), ("expand", "slope")} <= done


@pytest.mark.usefixtures("no_figure")
def test_training_runs_compiled_and_with_a_refresh_every_other_step(tmp_path):
    more = ["--contenders", "dense + compile,slope + compile", "--column-mask-interval", "2",
            "--layers", "1", "--precision", "bf16"]  # fmt: skip
    assert bench("train", tmp_path, *more) == 0
    rows = rows_of(tmp_path)
    assert [row["contender"] for row in rows if not row["failed"]] == more[1].split(",")
    assert all(float(row["tokens_per_s"]) > 0 for row in rows)


@pytest.mark.usefixtures("no_figure")
def test_two_depths_tell_the_whole_model(tmp_path):
    bench("train", tmp_path)
    text = (tmp_path / "table.md").read_text(encoding="utf-8")
    assert "extrapolated from these depths (not measured)" in text
    assert "| toy | 4 |" in text.partition("extrapolated")[2]


@pytest.mark.usefixtures("no_figure")
def test_decoding_with_a_cache(tmp_path):
    assert bench("infer", tmp_path, "--context", "8") == 0
    assert not any(row["failed"] for row in rows_of(tmp_path))


@pytest.mark.usefixtures("no_figure")
def test_inference_compiled_block_by_block(tmp_path):
    assert bench("infer", tmp_path, "--compile", "--compiler", "eager") == 0
    rows = rows_of(tmp_path)
    assert not any(row["failed"] for row in rows)
    names = {row["contender"] for row in rows}
    assert names == {"dense + compile", "slope r=0% + compile", "slope r=25% + compile"}
    assert {row["baseline"] for row in rows} == {"dense + compile"}


@pytest.mark.usefixtures("no_figure")
def test_each_contender_with_its_projections_fused(tmp_path, monkeypatch):
    small = "dropout=0.0", "vocab_size=128", "hidden_size=64", "ffn_dim=64", "num_attention_heads=2"
    monkeypatch.setitem(models._BY_FAMILY, "opt", (*small, "word_embed_proj_dim=64"))
    more = "--models", "opt-125m", "--layers", "2", "--ranks", "0.02", "--fuse", "--compile"
    assert bench("infer", tmp_path, *more, "--compiler", "eager") == 0
    rows = rows_of(tmp_path)
    assert not any(row["failed"] for row in rows)
    names = {f"{kind}{fused} + compile" for kind in ("dense", "slope r=2%") for fused in FUSED}
    assert {row["contender"] for row in rows} == names
    assert {row["baseline"] for row in rows} <= {"dense + compile", "dense + fuse + compile"}
    read = {row["contender"]: row["gb_per_s"] for row in rows if row["phase"] == "decode"}
    time = {row["contender"]: row["median_us"] for row in rows if row["phase"] == "decode"}
    for kind in ("dense", "slope r=2%"):  # the same bytes, whatever reads them
        one, other = (float(read[n]) * float(time[n]) for n in names if n.startswith(kind))
        assert one == pytest.approx(other, rel=1e-3)


@pytest.mark.usefixtures("no_figure")
def test_projections_that_do_not_read_the_same_input_are_a_failed_row(tmp_path):
    assert bench("infer", tmp_path, "--fuse", "--ranks", "0") == 0
    reasons = {row["contender"]: row["failed"] for row in rows_of(tmp_path)}
    assert not reasons["dense"] and not reasons["slope r=0%"]
    assert "nothing is to be gained for this model" in reasons["slope r=0% + fuse"]


@pytest.mark.usefixtures("no_figure")
def test_a_compiler_that_gives_up_is_a_failed_row(tmp_path, monkeypatch):
    monkeypatch.setattr(infer, "_GRAPHS", 0)
    more = "--ranks", "0", "--compile", "--compiler", "eager", "--layers", "2"
    assert bench("infer", tmp_path, *more) == 1
    reasons = {row["contender"]: row["failed"] for row in rows_of(tmp_path)}
    assert all("recompile_limit" in reason for reason in reasons.values()), reasons


@pytest.mark.usefixtures("no_figure")
def test_a_prompt_is_whole_sequences(tmp_path):
    assert bench("infer", tmp_path, "--prompt", "259", "--ranks", "0") == 0
    reasons = {row["phase"]: row["failed"] for row in rows_of(tmp_path)}
    assert "--prompt 259 does not divide into 2 sequences of up to 256" in reasons["prompt"]
    assert not reasons["decode"]


@pytest.mark.usefixtures("no_figure")
def test_measured_memory_agrees_with_the_arithmetic(tmp_path):
    bench("memory", tmp_path)
    rows = [row for row in rows_of(tmp_path) if row["contender"] != "dense"]
    training = next(row for row in rows if row["phase"] == "training")
    ratio, told = float(training["state_ratio"]), float(training["estimated_state_ratio"])
    assert ratio == pytest.approx(told, abs=0.005)
    inference = next(row for row in rows if row["phase"] == "inference")
    # the column mask, 1/16 of a byte per weight, stays in memory and is not counted
    assert float(inference["state_ratio"]) > float(inference["estimated_state_ratio"])


def test_memory_at_the_depths_of_the_paper():
    options = _Options(models="opt-66b,llama3-8b", layers=None, batch=1, seq=None, ranks=None)
    cases = MemoryBench(options).cases()
    assert [(case.model, case.layers) for case in cases] == [
        ("opt-66b", 2), ("opt-66b", 3), ("llama3-8b", 4), ("llama3-8b", 4),
    ]  # fmt: skip


class _Options:
    device, quick, modes = torch.device("cpu"), False, None

    def __init__(self, **values):
        vars(self).update(values)


@pytest.mark.usefixtures("no_figure")
def test_results_are_never_overwritten(tmp_path, capsys):
    (tmp_path / "results.csv").write_text("precious", encoding="utf-8")
    assert bench("layer", tmp_path) == 1
    assert "results are never overwritten; choose another folder" in capsys.readouterr().err
    assert (tmp_path / "results.csv").read_text(encoding="utf-8") == "precious"
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.usefixtures("no_figure")
def test_without_an_output_each_run_has_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["bench", "layer", "--device", "cpu", "--rounds", "1", *LAYER]) == 0
    (folder,) = (tmp_path / "logs" / "bench").iterdir()
    assert folder.name.endswith("_cpu_layer")


@pytest.mark.usefixtures("no_figure")
def test_a_failing_baseline_is_a_row_with_the_reason(tmp_path):
    assert bench("layer", tmp_path) == 0
    failed = {(r["what"], r["contender"]): r["failed"] for r in rows_of(tmp_path) if r["failed"]}
    assert failed["layer", "torchao"] == "ModuleNotFoundError: No module named 'torchao'"
    assert ("forward", "torch 2:4") in failed
    text = (tmp_path / "table.md").read_text(encoding="utf-8")
    assert "| layer | torchao | eager | 1 | ModuleNotFoundError" in text


@pytest.mark.usefixtures("no_figure")
def test_out_of_memory_ends_the_case_and_not_the_table(tmp_path, monkeypatch):
    random = operands.Operands.random

    def small_only(case, *arguments):
        if case.tokens == 16:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")
        return random(case, *arguments)

    monkeypatch.setattr(layer.Operands, "random", small_only)
    assert bench("layer", tmp_path, "--tokens", "16,8") == 0
    rows = rows_of(tmp_path)
    assert [row["failed"] for row in rows if row["tokens"] == "16"] == ["out of memory"]
    assert any(row["tokens"] == "8" and row["median_us"] for row in rows)


def test_nothing_measured_is_an_error(tmp_path, monkeypatch, capsys):
    def fail(*_):
        raise RuntimeError("no such device")

    monkeypatch.setattr(layer.Operands, "random", fail)
    assert bench("layer", tmp_path) == 1
    assert "nothing could be measured" in capsys.readouterr().err
    assert not (tmp_path / "figure.png").exists()


@pytest.mark.usefixtures("no_figure")
def test_a_budget_leaves_what_was_measured(tmp_path, monkeypatch):
    class AfterTheFirst(Deadline):
        asked = 0

        @property
        def passed(self):
            self.asked += 1
            return self.asked > 1

    monkeypatch.setattr(experiment, "Deadline", AfterTheFirst)
    assert bench("setup", tmp_path, "--tokens", "8,16") == 0
    assert {row["tokens"] for row in rows_of(tmp_path)} == {"8"}
    assert "Stopped after 1 of 2 cases" in (tmp_path / "table.md").read_text(encoding="utf-8")


@pytest.mark.usefixtures("no_figure")
def test_sizes_of_a_model_for_which_no_time_is_left_are_told(tmp_path, monkeypatch):
    monkeypatch.setattr(experiment.Lab, "late", property(lambda _: True))
    assert bench("infer", tmp_path) == 0
    rows = [(row["phase"], row["failed"]) for row in rows_of(tmp_path)]
    assert rows == [("prompt", "")] * 3 + [("decode", "no time left")]
    assert "no time left" in (tmp_path / "table.md").read_text(encoding="utf-8")


@pytest.mark.usefixtures("no_figure")
def test_the_end_of_a_lease_leaves_what_was_measured(tmp_path, monkeypatch):
    measure = SetupBench.measure

    def stopped(self, case, lab):
        yield from measure(self, case, lab)
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(SetupBench, "measure", stopped)
    assert bench("setup", tmp_path) == 143
    assert signal.getsignal(signal.SIGTERM) is before
    table = (tmp_path / "table.md").read_text(encoding="utf-8")
    assert " µs" in table and "Stopped after 0 of 1 cases" in table


@pytest.mark.usefixtures("no_figure")
@pytest.mark.parametrize("name", TINY)
def test_json_for_a_program(name, tmp_path, capsys):
    assert bench(name, tmp_path / "results", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["measurement"], found["folder"]) == (name, str(tmp_path / "results"))
    assert found["environment"]["libraries"]["torch"] == torch.__version__
    written = rows_of(tmp_path / "results")
    assert [row["contender"] for row in found["rows"]] == [row["contender"] for row in written]
    assert all(row.get("failed") or len(row) > 2 for row in found["rows"])


def test_ctrl_c_leaves_what_was_measured(tmp_path, monkeypatch):
    measure = layer.LayerBench.measure

    def interrupted(self, case, lab):
        rows = measure(self, case, lab)
        yield next(rows)
        raise KeyboardInterrupt

    monkeypatch.setattr(layer.LayerBench, "measure", interrupted)
    assert bench("layer", tmp_path) == 130
    assert len(rows_of(tmp_path)) == 1
    assert "Stopped after 0 of 1 cases" in (tmp_path / "table.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["lyer"], "unknown measurement 'lyer'; did you mean 'layer'? Measurements: layer, "),
        (["foo"], "unknown measurement 'foo'. Measurements: layer, train, infer, "),
        (["layer", "--device", "tpu7"], "--device tpu7 is unknown"),
        (["layer", "--device", "meta"], "--device meta is not supported"),
        (["layer", "--device", "cuda:9"], "finds 0 GPUs; type --device cpu"),
        (["layer", "--shapes", "64"], "shape '64' is not d_out x d_in"),
        (["layer", "--shapes", "30x64"], "both multiples of 16"),
        (["layer", "--tokens", "0"], "--tokens 0 must be positive whole numbers"),
        (["layer", "--budget", "0"], "--budget 0 must be more than 0 seconds"),
        (["layer", "--rounds", "0"], "--rounds 0 must be at least 1"),
        (["layer", "--modes", "graph"], "--modes 'graph' cannot be measured on cpu"),
        (["train", "--models", "gpt5"], "model='gpt5' is unknown"),
        (["train", "--layers", "9"], "--layers 9 is more than the 4 blocks of toy"),
        (["train", "--contenders", "fst"], "--contenders 'fst' is unknown; choose from dense"),
        (["train", "--batch", "0"], "'0' must be a whole number of at least 1"),
        (["infer", "--ranks", "16"], "--ranks 16 must be ratios of d_in"),
        (["infer", "--ranks", "x"], "--ranks x must be ratios of d_in"),
        (["lowrank", "--ranks", "0,0.5"], "a rank of 0 has no product"),
    ],
)
def test_bad_input_is_named_with_what_to_type(arguments, message, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert main(["bench", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_help_lists_the_measurements(capsys):
    assert main(["bench", "--help"]) == 0
    assert main(["bench"]) == 2
    output = capsys.readouterr().out
    assert all(f"  {name} " in output for name in TINY)
    for name in TINY:
        assert main(["bench", name, "--help"]) == 0
        shown = capsys.readouterr().out
        assert f"\n  slope bench {name} " in shown.partition("examples:")[2]
        assert ("--column-mask-interval" in shown) == (name == "train")
