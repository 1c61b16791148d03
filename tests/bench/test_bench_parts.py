"""The parts of ``slope bench``: timing, environment, models, and the script for a device."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from slope.bench import environment, models
from slope.bench.models import ModelCase
from slope.bench.results import failures, pivot
from slope.bench.timing import Clock, Deadline, Effort, Spread, Timing, interleave, noting
from slope.cli.bench import EXPERIMENTS, prepared

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu_all.sh"


class FakeClock(Clock):
    """Takes the seconds that a call returns for its time."""

    def __init__(self):
        self.runs = []

    def run(self, call, calls):
        self.runs.append((call.__name__, calls))
        seconds = call()
        return seconds, seconds / 2


def slow():
    return 2e-3


def fast():
    return 1e-3


def test_contenders_take_turns_in_rotating_order():
    clock = FakeClock()
    found = interleave({"a": slow, "b": fast}, clock, Effort(4, 4e-3, 1, 60), Deadline())
    assert [name for name, _ in clock.runs[2:]] == ["slow", "fast", "fast", "slow"] * 2
    assert (found["a"].calls, found["b"].calls) == (2, 4)  # both fill the window
    assert found["a"].seconds == (2e-3,) * 4 and found["a"].host == (1e-3,) * 4
    assert found["b"].speed_up(found["a"]) == Spread(2.0, 2.0, 2.0)


@pytest.mark.parametrize(("limit", "budget"), [(60, -1), (0, None)])
def test_five_rounds_are_left_when_time_is_up(limit, budget):
    effort = Effort(9, 1e-3, 1, limit)
    found = interleave({"a": fast}, FakeClock(), effort, Deadline(budget))
    assert len(found["a"].seconds) == 5
    assert interleave({}, FakeClock(), effort, Deadline()) == {}


def test_speed_ups_are_paired_by_round():
    # The machine was twice as slow in the second round: pairs do not see it.
    base, own = Timing((2.0, 4.0), (0.0, 0.0), 1), Timing((1.0, 2.0), (0.0, 0.0), 1)
    assert own.speed_up(base) == Spread(2.0, 2.0, 2.0)


def test_spread_is_median_and_percentiles():
    assert Spread.of([float(value) for value in range(21)]) == Spread(10.0, 2.0, 18.0)
    assert Spread.of([3.0]) == Spread(3.0, 3.0, 3.0)


def test_cpu_clock_counts_calls():
    calls = []
    seconds, host = Clock(torch.device("cpu")).run(lambda: calls.append(1), 5)
    assert len(calls) == 5 and seconds == host > 0


def test_failures_are_noted_in_one_line():
    failed = {}
    with noting(failed, "a"):
        raise torch.OutOfMemoryError("Tried to allocate\nmuch")
    with noting(failed, "b"):
        raise NotImplementedError("\n  this op\nhas more to say")
    with noting(failed, "c"):
        pass
    assert failed == {"a": "out of memory", "b": "NotImplementedError: this op"}
    with pytest.raises(KeyboardInterrupt), noting(failed, "d"):
        raise KeyboardInterrupt


def test_tables():
    rows = [
        {"n": 1, "who": "a", "x": 2.0},
        {"n": 1, "who": "b", "x": 3.0},
        {"n": 2, "who": "b", "x": 4.0},
    ]
    text = pivot(rows, ["n"], lambda row: row["who"], lambda row: f"{row['x']:.0f}")
    assert text == "| n | a | b |\n|---|---|---|\n| 1 | 2 | 3 |\n| 2 | – | 4 |\n"
    assert failures(rows, ["who"]) == ""
    assert "| b | 2 | no |" in failures([{"who": "b", "failed": "no"}] * 2, ["who"])


@pytest.mark.parametrize("name", models.PAPER)
def test_every_model_of_the_paper_can_be_built(name):
    import slope

    case = ModelCase(name, 2)
    model = models.build(case, 64, torch.device("meta"), torch.bfloat16, slope.SparsityConfig())
    assert len(list(slope.sparse_layers(model))) > 2
    assert all(parameter.dtype == torch.bfloat16 for parameter in model.parameters())
    assert model.config.num_hidden_layers == 2 < models.whole_depth(name)


def test_a_model_keeps_its_output_without_a_mask():
    from slope import configs
    from slope.models import build_model

    model = models.build(ModelCase("toy", 1), 8, torch.device("cpu"), torch.float32)
    torch.manual_seed(0)
    cfg = configs.compose(models.overrides("toy", 1)).model
    usual = build_model(cfg, 1, 8)
    tokens = models.random_tokens(model, 2, 8, torch.device("cpu"))
    torch.testing.assert_close(model(input_ids=tokens).logits, usual(input_ids=tokens).logits)


def test_a_shorter_model_gets_more_sequences():
    options = type("Options", (), {"batch": None, "seq": None})
    assert models.batch_of(ModelCase("llama3-8b", 1), options, on_gpu=True) == (8, 2048)
    assert models.batch_of(ModelCase("gpt2-small", 1), options, on_gpu=True) == (16, 1024)


def test_the_whole_model_from_two_depths():
    rows = [{"model": "toy", "layers": layers, "t": time} for layers, time in ((1, 3.0), (3, 7.0))]
    assert models.at_full_depth(rows, "t") == 9.0  # 4 blocks: 3 + 3 x 2
    assert models.at_full_depth(rows[:1], "t") is None


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_quick_measures_fewer_cases_on_a_gpu(name):
    experiment = prepared([name])
    options = experiment.options
    options.device, options.modes = torch.device("cuda", 0), None
    counts = []
    for options.quick in (True, False):
        cases = type(experiment)(options).cases()
        counts.append(len(set(cases)))
        assert counts[-1] == len(cases)
    assert 0 < counts[0] < counts[1]


def test_mfu_counts_the_dense_model():
    told = models.arithmetic(ModelCase("llama3-8b", 2), "bf16-mixed", 8, 2048, 0)
    linear = 2 * (2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 14336) + 128256 * 4096
    attention = 2 * 4 * 1024 * 4096 * 3
    assert told.dense.flops.model == pytest.approx(6 * linear + attention)


def test_peak_is_known_by_the_name_of_the_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    assert models.peak_flops(torch.device("cuda", 0)) == 989e12
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Another")
    assert models.peak_flops(torch.device("cuda", 0)) is None
    assert models.peak_flops(torch.device("cpu")) is None


def test_a_gpu_is_watched_while_it_is_measured(tmp_path, monkeypatch):
    program = tmp_path / "nvidia-smi"
    program.write_text('#!/bin/sh\necho "$@"\nsleep 60\n', encoding="utf-8")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    path = tmp_path / "gpu.csv"
    with environment.watched(torch.device("cuda", 1), path):
        while not path.read_text(encoding="utf-8"):
            pass
    assert path.read_text(encoding="utf-8").startswith("-i 5 --query-gpu=timestamp,clocks.sm")
    with environment.watched(torch.device("cpu"), tmp_path / "none.csv"):
        pass
    assert not (tmp_path / "none.csv").exists()


def test_the_script_for_a_device_runs_all_within_its_budget(tmp_path):
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\ncase "$*" in *infer*) exit 3;; esac\n', encoding="utf-8")
    python.chmod(0o755)
    output = tmp_path / "all"
    done = subprocess.run(
        ["bash", str(SCRIPT), str(output), "100"],
        env=os.environ | {"PYTHON": str(python)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1  # infer failed, the others ran
    lines = (output / "summary.txt").read_text(encoding="utf-8").splitlines()
    names = ["tests", "layer", "decode", "train", "memory", "infer", "compiled", "setup", "lowrank"]
    assert sorted(line.split()[0] for line in lines) == sorted(names)
    failed = [line.split()[0] for line in lines if "exit 3" in line]
    assert failed == ["infer", "compiled"]
    again = subprocess.run(
        ["bash", str(SCRIPT), str(output)], capture_output=True, text=True, check=False
    )
    assert again.returncode == 2 and "never overwritten" in again.stderr


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--named", "t"], "--named and --every are about other cuts; add --cuts"),
        (["--once", "dense", "--rank", "0.1"], "--once is without an adapter and times nothing"),
        (["--shapes", "768x768,4096"], "--shapes has 4096; type d_out x d_in, as 4096x14336"),
        ([], "it times kernels of an NVIDIA GPU, and torch finds none"),
    ],
)
def test_the_decode_benchmark_says_what_it_needs(options, said):
    script = SCRIPT.with_name("gpu_decode.py")
    done = subprocess.run(
        [sys.executable, str(script), *options], capture_output=True, text=True, check=False,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert done.returncode == 2 and said in done.stderr


def script(name):
    """A module of benchmarks/."""
    spec = importlib.util.spec_from_file_location(name, SCRIPT.with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--device", "cpu"], "it traces kernels of an NVIDIA GPU; leave --device cpu out."),
        (["--models", "gpt5"], "gpt5"),
        (
            ["--device", "cpu", "--output", str(SCRIPT.parent)],
            "is there already; name a new folder",
        ),
    ],
)
def test_the_trace_says_what_it_needs(monkeypatch, capsys, options, said):
    monkeypatch.setattr(sys, "argv", ["gpu_trace.py", *options])
    assert script("gpu_trace").main() == 2
    assert said in capsys.readouterr().err


def test_time_that_kernels_share_counts_for_the_first():
    trace = script("gpu_trace")
    spans = (5, 4, "a"), (7, 5, "b"), (8, 1, "c"), (14, 2, "a")
    kernels = [trace.Kernel(*span) for span in spans]
    kinds, between = trace.covered(kernels)
    assert kinds == {"a": 6, "b": 3, "c": 0} and between == 2


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("slope_gemm", "sparse product"),
        ("slope_decode", "sparse product"),
        ("sm90_xmma_sparse_gemm_bf16bf16_bf16f32", "sparse product"),
        ("nvjet_sm90_tst_256x128_64x4_2x1_v_bz_NNT", "dense product"),
        ("_pack_columns_kernel", "operands and masks"),
        ("void pytorch_flash::flash_fwd_kernel", "attention"),
        ("triton_poi_fused_relu_6", "rest"),
    ],
)
def test_the_profile_tells_kinds_of_kernels(kernel, kind):
    profile = script("gpu_profile")
    span = SimpleNamespace(elapsed_us=lambda: 3e3 * profile.STEPS)
    on_gpu = torch.autograd.DeviceType.CUDA
    event = SimpleNamespace(name=kernel, device_type=on_gpu, time_range=span)
    assert profile.by_kind([event]) == {kind: 3}


def test_what_names_one_gpu_is_not_written() -> None:
    said = [
        "Driver Version                         : 580.159.04",
        "GPU 00000000:00:06.0",
        "    Serial Number                      : 1650000000000",
        "    GPU UUID                           : GPU-00000000-0000-0000-0000-000000000000",
        "        Bus Id                         : 00000000:00:06.0",
        "    Max Clocks",
        "        SM                             : 1980 MHz",
    ]
    assert environment.anonymous(said) == [said[0], *said[5:]]
