"""Choosing a path: measured once, remembered, never without a way out; the custom ops."""

from __future__ import annotations

import json
import multiprocessing
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import slope
from slope.backends import DenseBackend, dispatch, get_backend, ops, tuning
from slope.backends.choices import VERSION, ChoiceStore
from slope.backends.support import why_no_kernels, why_not_sparse_kernels
from slope.backends.tuning import ProductKey, Tuner, bucket

KEY = ProductKey("forward", 64, 128, 16, "bfloat16", "float32")
TIMES = {"cusparselt": 10.0, "dense": 20.0}


def tuner_of(folder, times=TIMES, calls=None, machine="gpu one"):
    def timer(paths, kernels_alone):
        if calls is not None:
            calls.append((sorted(paths), kernels_alone))
        return {name: times[name] for name in paths}

    return Tuner(ChoiceStore(folder), {"gpu": machine}, timer)


def choose(tuner, failing=(), key=KEY, algorithms=(("cusparselt", (7,)),)):
    def path(name):
        def do(algorithm):
            if name in failing or algorithm in failing:
                raise RuntimeError(f"{algorithm or name} is out of memory\nand more")
            return name, algorithm

        return do

    found = {name: lambda numbers=numbers: numbers for name, numbers in algorithms}
    return tuner.choose(key, {name: path(name) for name in ("dense", *found)}, found)


def test_the_fastest_wins_and_is_measured_once(tmp_path):
    calls = []
    tuner = tuner_of(tmp_path, calls=calls)
    for _ in range(3):
        choice = choose(tuner)
        assert (choice.path, choice.algorithms) == ("cusparselt", {"cusparselt": 7})
    assert len(calls) == 1
    assert choice.reason() == "cusparselt (7) 10.0 µs, dense 20.0 µs"


def test_where_a_decode_kernel_competes_the_kernels_alone_are_timed(tmp_path):
    calls = []
    tuner = tuner_of(tmp_path, TIMES | {"mma": 5.0}, calls)
    assert choose(tuner, key=replace(KEY, tokens=1)).path == "cusparselt"
    assert choose(tuner, algorithms=[("mma", ("1.1.1.8.3/1",))]).path == "mma"
    assert calls == [(["cusparselt", "dense"], False), (["dense", "mma"], True)]


def test_of_several_algorithms_the_fastest_competes_and_is_kept(tmp_path):
    calls = []
    times = TIMES | {"mma": 5.0, "a": 3.0, "b": 2.0, "c": 1.0}
    algorithms = [("mma", ("a", "b", "c")), ("cusparselt", (7,))]
    choice = choose(tuner_of(tmp_path, times, calls), ["c"], algorithms=algorithms)
    assert calls == [(["a", "b"], True), (["cusparselt", "dense", "mma"], True)]
    assert (choice.path, choice.algorithms) == ("mma", {"mma": "b", "cusparselt": 7})
    assert choose(tuner_of(tmp_path, {}), algorithms=algorithms) == choice  # from the disk
    choice = choose(tuner_of(tmp_path, times), ["a", "b", "c"], replace(KEY, tokens=32), algorithms)
    assert (choice.path, choice.refused) == ("cusparselt", {"mma": "c is out of memory"})


@pytest.fixture
def clock(monkeypatch):
    """A GPU whose work is a list, and a host whose time passes in calls alone."""
    done, now = [], [0.0]

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            done.append("event")

        def elapsed_time(self, other):
            return 0.8

    class Scratch:
        def sum(self):
            done.append("flush")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: done.append("wait"))
    monkeypatch.setattr(torch.cuda, "_sleep", done.append, raising=False)
    monkeypatch.setattr(torch, "zeros", lambda *size, **options: Scratch())
    monkeypatch.setattr(tuning.time, "perf_counter", lambda: now[0])

    def call(seconds):
        def run():
            now[0] += seconds
            done.append("call")

        return run

    return done, call


def test_calls_are_timed_back_to_back(clock):
    done, call = clock
    assert tuning.time_interleaved({"one": call(1), "two": call(1)}) == {"one": 100, "two": 100}
    assert done == ["wait", "event", *["call"] * 8, "event", "wait"] * 2 * (tuning.ROUNDS + 1)


@pytest.mark.parametrize(("seconds", "slept"), [(1e-4, 16e-4), (1.0, 0.02)])
def test_kernels_are_timed_behind_a_gpu_that_sleeps_and_with_an_empty_cache(clock, seconds, slept):
    done, call = clock
    assert tuning.time_interleaved({"one": call(seconds)}, True) == {"one": pytest.approx(800)}
    each = ["flush", "event", "call", "event"] * 8
    sleep = pytest.approx(slept * 2e9, abs=2)  # twice as long as queueing took, 20 ms at most
    assert done == ["wait", *each, "wait", sleep, *each, "wait"] * (tuning.ROUNDS + 1)


def test_without_memory_to_flush_kernels_are_timed_all_the_same(clock, monkeypatch):
    done, call = clock

    def full(*size, **options):
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(torch, "zeros", full)
    assert tuning.time_interleaved({"one": call(1e-4)}, True) == {"one": pytest.approx(800)}
    assert "flush" not in done


def test_a_slower_sparse_product_goes_dense(tmp_path):
    choice = choose(tuner_of(tmp_path, {"cusparselt": 21.0, "dense": 20.0}))
    assert (choice.path, choice.algorithms) == ("dense", {"cusparselt": 7})


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
    assert choice.refused == {"cusparselt": "7 is out of memory"}
    assert list(tmp_path.iterdir()) == []  # another process may have the memory


@pytest.fixture
def gpu(tmp_path, monkeypatch):
    """``ops`` as on a GPU of fixed speeds, with nothing chosen yet."""
    state = {"capturing": False, "library": None}
    times = {"cusparselt": 10.0, "mma": 6.0, "triton": 5.0, "dense": 20.0}
    tuner, chosen = tuner_of(tmp_path, times), {}
    monkeypatch.setattr(ops, "tuner", lambda: tuner)
    monkeypatch.setattr(ops, "_chosen", lambda: chosen)
    monkeypatch.setattr(ops, "_can_measure", lambda: not state["capturing"])
    monkeypatch.setattr(ops, "why_no_cusparselt", lambda device, dtype: state["library"])
    return state


def product(tokens=512, only="", shape=(64, 128)):
    return ops.Product(
        "forward", *shape, tokens, torch.bfloat16, torch.float32, False, 0, only,
        torch.device("cuda", 0),
    )  # fmt: skip


def call(*paths, **algorithms):
    """A product whose paths give their names and algorithms."""
    given = {name: lambda algorithm, name=name: (name, algorithm) for name in paths}
    return SimpleNamespace(paths=lambda: paths, algorithms=lambda product: algorithms, **given)


def run(product):
    return ops._run(product, call("cusparselt", "triton", "dense", cusparselt=lambda: [7]))


def test_each_product_goes_to_the_fastest_path_that_can_do_it(gpu):
    assert run(product()) == ("cusparselt", 7)
    assert run(product(tokens=16)) == ("triton", None)
    assert run(product(shape=(80, 48))) == ("dense", None)
    assert run(product(tokens=16, shape=(80, 96)))[0] == "triton"
    reasons = ops._chosen()[product(shape=(80, 48))].reason()
    assert "whole tiles of 64, the layer is 80 x 48" in reasons
    assert "512 tokens, the decode kernel takes up to 64" in reasons


def test_a_path_asked_for_is_taken_but_not_remembered_for_others(gpu):
    assert run(product(tokens=16, only="cusparselt")) == ("cusparselt", 7)
    assert run(product(tokens=16, only="dense"))[0] == "dense"
    assert run(product(tokens=16))[0] == "triton"


def test_a_path_asked_for_that_cannot_is_an_error(gpu):
    with pytest.raises(RuntimeError, match="whole tiles of 64, the layer is 80 x 48; use backend"):
        run(product(only="cusparselt", shape=(80, 48)))
    gpu["library"] = "cuSPARSELt 999 stores another layout"
    assert run(product())[0] == "dense"
    with pytest.raises(RuntimeError, match="999 stores another layout; use backend='auto'"):
        run(product(only="cusparselt"))


def test_of_the_two_decode_kernels_only_the_faster_one_is_measured(gpu, monkeypatch):
    monkeypatch.setattr(ops, "why_no_mma", lambda *product: None)
    given = call("mma", "triton", "dense")
    assert ops._run(product(tokens=16), given) == ("mma", None)
    reason = ops._chosen()[product(tokens=16)].reason()
    assert reason.endswith("; triton: mma does the same by a faster kernel")
    assert ops._run(product(tokens=16, only="triton"), given) == ("triton", None)


def test_the_decode_kernel_asked_for_does_few_tokens_forward_or_says_why_not(gpu):
    assert run(product(tokens=64, only="triton", shape=(80, 96)))[0] == "triton"
    with pytest.raises(RuntimeError, match="'triton' cannot .* 65 tokens, the decode kernel takes"):
        run(product(tokens=65, only="triton"))
    with pytest.raises(RuntimeError, match="in_features=48 is not divisible by 32, the decode"):
        run(product(tokens=64, only="triton", shape=(80, 48)))
    gradient = product(tokens=16, only="triton")._replace(operation="input_gradient")
    with pytest.raises(RuntimeError, match="decode kernel does the forward alone; use backend"):
        ops._run(gradient, call("cusparselt", "dense"))
    assert slope.SparsityConfig(backend="triton").backend == get_backend("triton").name == "triton"


@pytest.mark.parametrize("name", dispatch.PATHS)
def test_a_shape_without_kernels_is_dense_unless_a_path_is_asked_for(monkeypatch, name):
    monkeypatch.setattr(dispatch, "why_no_kernels", lambda pattern, dtype, device: None)
    weight = slope.SlopeLinear(20, 28).compressed_weight()
    x = torch.randn(3, 20)
    with torch.no_grad():
        expected = DenseBackend().forward(x, weight, None)
        assert torch.equal(get_backend("auto").forward(x, weight, None), expected)
        with pytest.raises(RuntimeError, match="in_features=20 is not divisible by 16; use"):
            get_backend(name).forward(x, weight, None)


def test_without_gradients_the_backend_adds_the_adapter_itself():
    class Recording(DenseBackend):
        seen = []

        def forward(self, x, weight, bias, operands=None, adapter=None):
            self.seen.append(adapter)
            return super().forward(x, weight, bias, operands, adapter)

    layer = slope.SlopeLinear(64, 32)
    layer.add_adapter(5, scale=0.3)
    torch.nn.init.normal_(layer.adapter.up)
    layer._backend = Recording()
    x = torch.randn(2, 3, 64)
    with torch.no_grad():
        layer(x)
        assert layer._backend.seen == [None]  # dormant
        layer.adapter.active = True
        y = layer(x)
    assert layer._backend.seen[-1].scale == 0.3
    assert torch.equal(layer(x), y)  # bit for bit what training computes
    assert layer._backend.seen[-1] is None


def test_while_a_graph_is_captured_nothing_is_measured_or_kept(gpu):
    gpu["capturing"] = True
    assert run(product())[0] == "dense"
    with pytest.raises(RuntimeError, match="must see a product once before it is captured"):
        run(product(only="cusparselt"))
    gpu["capturing"] = False
    assert run(product())[0] == "cusparselt"
    gpu["capturing"] = True
    assert run(product())[0] == "cusparselt"


@pytest.mark.parametrize("damage", [b"", b"{", b'{"version": %d}' % VERSION, b"\xff\xfe"])
def test_a_damaged_file_is_measured_again(tmp_path, damage, caplog):
    choose(tuner_of(tmp_path))
    (file,) = tmp_path.iterdir()
    file.write_bytes(damage)
    calls = []
    assert choose(tuner_of(tmp_path, calls=calls)).path == "cusparselt"
    assert len(calls) == 1
    assert "it is measured again" in caplog.text
    assert json.loads(file.read_text())["choice"]["path"] == "cusparselt"


def test_a_choice_of_an_earlier_version_is_measured_again(tmp_path, caplog):
    choose(tuner_of(tmp_path))
    (file,) = tmp_path.iterdir()
    file.write_text(json.dumps(json.loads(file.read_text()) | {"version": 1}))
    calls = []
    choose(tuner_of(tmp_path, calls=calls))
    assert len(calls) == 1 and "cannot read" not in caplog.text


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


def test_buckets_are_powers_of_two_above_few_tokens_and_nearest_to_many():
    assert [bucket(t) for t in (1, 2, 3, 5, 11, 33, 65, 181, 182, 1448, 1449, 16384)] == [
        1, 2, 4, 8, 16, 64, 128, 128, 256, 1024, 2048, 16384,
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
        x, layer.values, layer.metadata, layer.column_mask, None, bias, down, up, 0.5, "", [],
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
    x, _, _, _, _, bias, down, up, scale, *_ = given
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
