"""Choosing a path: measured once, remembered, never without a way out; the custom ops."""

from __future__ import annotations

import json
import multiprocessing

import pytest
import torch

import slope
from slope.backends import get_backend, ops
from slope.backends.choices import ChoiceStore
from slope.backends.support import why_no_kernels, why_not_sparse_kernels
from slope.backends.tuning import ProductKey, Tuner, bucket

KEY = ProductKey("forward", 64, 128, 16, "bfloat16", "float32")
TIMES = {"cusparselt": 10.0, "dense": 20.0}


def tuner_of(folder, times=TIMES, calls=None, machine="gpu one"):
    def timer(paths):
        if calls is not None:
            calls.append(sorted(paths))
        return {name: times[name] for name in paths}

    return Tuner(ChoiceStore(folder), {"gpu": machine}, timer)


def choose(tuner, search=lambda: 7, can_measure=True, failing=()):
    def path(name):
        def do(algorithm):
            if name in failing:
                raise RuntimeError(f"{name} is out of memory\nand more")
            return name, algorithm

        return do

    paths = {name: path(name) for name in ("cusparselt", "dense")}
    return tuner.choose(KEY, paths, search, lambda: can_measure)


def test_the_fastest_wins_and_is_measured_once(tmp_path):
    calls = []
    tuner = tuner_of(tmp_path, calls=calls)
    for _ in range(3):
        choice = choose(tuner)
        assert (choice.path, choice.algorithm) == ("cusparselt", 7)
    assert len(calls) == 1
    assert choice.reason() == "cusparselt 10.0 µs, dense 20.0 µs"


def test_a_slower_sparse_product_goes_dense(tmp_path):
    choice = choose(tuner_of(tmp_path, {"cusparselt": 21.0, "dense": 20.0}))
    assert (choice.path, choice.algorithm) == ("dense", None)


def test_another_process_reads_the_choice_and_another_gpu_does_not(tmp_path):
    choose(tuner_of(tmp_path))
    calls = []
    assert choose(tuner_of(tmp_path, calls=calls)).path == "cusparselt"
    assert calls == []
    choose(tuner_of(tmp_path, calls=calls, machine="gpu two"))
    assert len(calls) == 1


def test_a_path_that_fails_is_left_out_with_its_reason(tmp_path):
    choice = choose(tuner_of(tmp_path), failing=("cusparselt",))
    assert choice.path == "dense"
    assert choice.refused == {"cusparselt": "cusparselt is out of memory"}


def test_while_a_graph_is_captured_nothing_is_measured_or_kept(tmp_path):
    tuner = tuner_of(tmp_path)
    assert choose(tuner, can_measure=False).path == "dense"
    assert choose(tuner).path == "cusparselt"


@pytest.mark.parametrize("damage", [b"", b"{", b'{"version": 1}', b"\xff\xfe"])
def test_a_damaged_file_is_measured_again(tmp_path, damage, caplog):
    choose(tuner_of(tmp_path))
    (file,) = tmp_path.iterdir()
    file.write_bytes(damage)
    calls = []
    assert choose(tuner_of(tmp_path, calls=calls)).path == "cusparselt"
    assert len(calls) == 1
    assert "it is measured again" in caplog.text
    assert json.loads(file.read_text())["choice"]["path"] == "cusparselt"


def _write_often(folder):
    store = ChoiceStore(folder)
    for number in range(50):
        store.save({"key": number % 5}, {"path": "dense", "filler": "x" * 2000})
        found = store.load({"key": number % 5})
        assert found is not None and len(found["filler"]) == 2000


def test_several_writers_leave_whole_files(tmp_path):
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=_write_often, args=(tmp_path,)) for _ in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    assert len(list(tmp_path.iterdir())) == 5


def test_a_folder_that_cannot_be_written_costs_a_warning(tmp_path, caplog):
    (tmp_path / "file").touch()
    choice = choose(tuner_of(tmp_path / "file" / "below"))
    assert choice.path == "cusparselt"
    assert "cannot keep measurements in" in caplog.text


def test_buckets_are_the_nearest_powers_of_two():
    assert [bucket(t) for t in (1, 2, 5, 6, 11, 12, 1500, 16384)] == [
        1, 2, 4, 8, 8, 16, 2048, 16384,
    ]  # fmt: skip


def test_reasons_are_one_line_each():
    two_four, two_eight = slope.NMPattern(2, 4), slope.NMPattern(2, 8)
    assert "pattern 2:8 has no sparse kernels" in why_no_kernels(two_eight, torch.bfloat16, "cpu")
    assert "the layer is on cpu" in why_no_kernels(two_four, torch.bfloat16, "cpu")
    assert why_not_sparse_kernels("2:4", "cpu") == "device type 'cpu' has no sparse tensor cores"


def test_a_backend_asked_for_by_name_fails_where_it_cannot_serve():
    layer = slope.SlopeLinear(64, 64, backend="cusparselt")
    layer.values.requires_grad_(False)
    weight = layer.compressed_weight()
    with pytest.raises(RuntimeError, match="on cpu, sparse kernels need a CUDA GPU; use"):
        get_backend("cusparselt").forward(torch.randn(2, 64), weight, None)


def arguments(adapter):
    layer = slope.SlopeLinear(64, 32)
    x = torch.randn(6, 64, requires_grad=True)
    down = torch.randn(4, 64, requires_grad=True) if adapter else None
    up = torch.randn(32, 4, requires_grad=True) if adapter else None
    bias = layer.bias if adapter else None
    return layer, (
        x, layer.values, layer.metadata, layer.column_mask, None, bias, down, up, 0.5, "",
    )  # fmt: skip


@pytest.mark.parametrize("adapter", [False, True])
def test_the_product_passes_opcheck(adapter):
    _, given = arguments(adapter)
    torch.library.opcheck(torch.ops.slope.sparse_linear, given)


def test_the_other_ops_pass_opcheck():
    layer, (x, *_) = arguments(False)
    values, dy, x = layer.values.detach(), torch.randn(6, 32), x.detach()
    masks = (layer.metadata, layer.column_mask)
    torch.library.opcheck(torch.ops.slope.sparse_input_gradient, (dy, values, *masks, ""))
    torch.library.opcheck(torch.ops.slope.values_gradient, (dy, x, layer.metadata, torch.float32))
    torch.library.opcheck(torch.ops.slope.column_mask, (values, layer.metadata))


def test_the_op_has_slopes_gradients():
    layer, given = arguments(True)
    x, _, _, _, _, bias, down, up, scale, _ = given
    y = ops.sparse_linear(*given)
    dy = torch.randn_like(y)
    y.backward(dy)
    got = [t.grad.clone() for t in (x, layer.values, bias, down, up)]
    for tensor in (x, layer.values, bias, down, up):
        tensor.grad = None
    expected = layer(x) + scale * (x @ down.T) @ up.T
    expected.backward(dy)
    torch.testing.assert_close(y, expected)
    for ours, theirs in zip(got, (x, layer.values, bias, down, up), strict=True):
        torch.testing.assert_close(ours, theirs.grad)
