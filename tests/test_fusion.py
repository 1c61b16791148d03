"""Layers that read the same input as one product: the same numbers, whatever changes."""

from __future__ import annotations

import contextlib
import copy
import io
import threading

import pytest
import torch
from torch import nn

import slope
from slope import fusion

pytestmark = pytest.mark.filterwarnings(
    # torch's own compiler, not ours
    "ignore::DeprecationWarning:torch.*", "ignore::FutureWarning:torch.*",
)  # fmt: skip

D = 16
TOGETHER = ("q_proj", "k_proj", "v_proj")


class Block(nn.Module):
    """Q, K, V of one input, then two more layers, none of which reads what another does."""

    def __init__(self):
        super().__init__()
        self.q_proj = nn.Linear(D, 24)
        self.k_proj = nn.Linear(D, 8, bias=False)
        self.v_proj = nn.Linear(D, 8)
        self.out = nn.Linear(24, D)
        self.gate = nn.Linear(D, 32)
        self.up = nn.Linear(D, 32)

    def forward(self, x):
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        x = self.out(q * torch.cat((k, v, k - v), -1))
        return torch.tanh(self.gate(x)) * self.up(x)


def a_block(rank=0, sparse=True):
    block = Block().double().eval()
    if sparse:
        slope.sparsify(block, slope.SparsityConfig(adapter_rank=rank, adapter_scale=0.7))
        for adapter in slope.layers.adapters(block):
            nn.init.normal_(adapter.up)
        slope.activate_adapters(block)
    return block.requires_grad_(False)


def an_input():
    return torch.randn(2, 5, D, dtype=torch.float64)


@torch.no_grad()
def assert_equal(block, other, x=None):
    x = an_input() if x is None else x
    torch.testing.assert_close(block(x), other(x))


def products(monkeypatch):
    """Output features of every product from now on."""
    seen = []
    linear = nn.functional.linear

    def watched(x, weight, bias=None):
        seen.append(weight.shape[0])
        return linear(x, weight, bias)

    monkeypatch.setattr(nn.functional, "linear", watched)
    return seen


@pytest.mark.parametrize(("sparse", "rank"), [(False, 0), (True, 0), (True, 3)])
def test_fewer_products_give_the_same_numbers(monkeypatch, sparse, rank):
    apart = a_block(rank, sparse)
    fused = copy.deepcopy(apart)
    found = slope.fuse_projections(fused, an_input())
    assert found == [(TOGETHER, None), (("gate", "up"), None)]
    assert_equal(fused, apart)
    sizes = products(monkeypatch)
    with torch.no_grad():
        fused(an_input())
    low = [3 * rank, 40] if rank else []  # down of all, their up in blocks
    first = [40, *low, D, *([rank, D] if rank else [])]
    assert sizes == [*first, 64, *([2 * rank, 64] if rank else [])]


def test_names_parameters_and_hooks_stay_and_memory_is_shared():
    apart = a_block(rank=2)
    fused, seen = copy.deepcopy(apart), []
    fused.k_proj.register_forward_hook(lambda module, inputs, y: seen.append(y.shape))
    layers, parameters = list(fused.modules()), list(fused.parameters())
    fused.train()
    slope.fuse_projections(fused, an_input())
    assert fused.training and fused.q_proj.training
    assert list(fused.modules()) == layers
    assert all(a is b for a, b in zip(fused.parameters(), parameters, strict=True))
    assert isinstance(fused.q_proj, slope.SlopeLinear) and "FusedSlopeLinear" in repr(fused)
    for (name, ours), (same, theirs) in zip(
        fused.state_dict().items(), apart.state_dict().items(), strict=True
    ):
        assert name == same and torch.equal(ours, theirs)
    storages = {getattr(fused, name).values.untyped_storage().data_ptr() for name in TOGETHER}
    assert len(storages) == 1
    assert [name for name, _ in slope.sparse_layers(fused)] == list(dict(fused.named_children()))
    seen.clear()
    assert_equal(fused.eval(), apart)
    assert seen == [(2, 5, 8)]


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def in_one_graph(model):
    return torch.compile(model, backend="eager", fullgraph=True)


def a_fused_block(rank=2, sparse=True):
    """Two equal blocks, the first one fused."""
    apart = a_block(rank, sparse)
    fused = copy.deepcopy(apart)
    slope.fuse_projections(fused, an_input())
    return fused, apart


FOLLOWED = {
    "values": lambda b: b.k_proj.values.mul_(2),
    "values behind autograd": lambda b: b.k_proj.values.data.mul_(2),
    "bias": lambda b: b.v_proj.bias.add_(1),
    "up": lambda b: b.k_proj.adapter.up.add_(1),
    "down": lambda b: b.v_proj.adapter.down.mul_(-1),
    "adapter loaded": lambda b: b.k_proj.adapter.load_state_dict(
        {k: -v for k, v in b.k_proj.adapter.state_dict().items()}
    ),
}
OTHERS = "other parameters or adapters came in, or an adapter fell asleep or woke"
MOVED = "weights were moved or loaded, or invalidate"
ENDED = {
    "bound to other memory": (
        lambda b: setattr(b.v_proj.values, "data", 3 * b.v_proj.values.detach()),
        "parameters were bound to other memory",
    ),
    "mask": (
        lambda b: b.q_proj.set_dense(
            -b.k_proj.to_dense().repeat(3, 1), b.q_proj.keep_mask().flip(0)
        ),
        MOVED,
    ),
    "metadata": (lambda b: b.q_proj.metadata.copy_(b.q_proj.metadata.flip(0)), "a mask was writ"),
    "scale": (lambda b: [setattr(c.adapter, "scale", 0.1) for c in b.children()], OTHERS),
    "asleep": (slope.deactivate_adapters, OTHERS),
    "one asleep": (lambda b: setattr(b.k_proj.adapter, "active", False), OTHERS),
    "no adapter": (lambda b: [setattr(layer, "adapter", None) for layer in b.children()], OTHERS),
    "no bias": (lambda b: setattr(b.q_proj, "bias", None), OTHERS),
    "another bias": (
        lambda b: setattr(b.k_proj, "bias", nn.Parameter(torch.ones(8).double(), False)), OTHERS
    ),
    "another adapter": (lambda b: another_adapter(b.k_proj), OTHERS),
    "loaded": (
        lambda b: b.load_state_dict({k: v.flip(0) for k, v in b.state_dict().items()}), MOVED
    ),
    "assigned": (
        lambda b: b.load_state_dict(
            {k: 2 * v if v.is_floating_point() else v for k, v in b.state_dict().items()},
            assign=True,
        ),
        MOVED,
    ),
    "moved": (lambda b: b.float().double(), MOVED),
}  # fmt: skip


def another_adapter(layer):
    layer.adapter = None
    layer.add_adapter(2, 0.7)
    layer.adapter.up.fill_(0.5)
    layer.adapter.active = True


@pytest.mark.parametrize("change", list(FOLLOWED))
def test_it_follows_what_is_written_in_place(change):
    fused, apart = a_fused_block()
    for _ in range(2):
        with torch.no_grad():
            for block in (apart, fused):
                FOLLOWED[change](block)
        for _ in range(2):
            assert_equal(fused, apart)
    assert type(fused.q_proj) is not slope.SlopeLinear


@pytest.mark.parametrize("change", list(ENDED))
def test_a_group_ends_where_its_tensors_are_others(change):
    fused, apart = a_fused_block()
    write, why = ENDED[change]
    with torch.no_grad():
        torch.manual_seed(0)
        write(apart)
        torch.manual_seed(0)
        with pytest.warns(UserWarning, match=f"go on alone, q_proj, k_proj, v_proj first: .*{why}"):
            write(fused)
            for _ in range(2):  # said once
                assert_equal(fused, apart)
    assert type(fused.q_proj) is slope.SlopeLinear
    own = [p for name in TOGETHER for p in getattr(fused, name).parameters()]
    assert len({parameter.untyped_storage().data_ptr() for parameter in own}) == len(own)
    slope.fuse_projections(fused, an_input())
    assert_equal(fused, apart)


COMPILED = {**FOLLOWED, **{name: write for name, (write, _) in ENDED.items()}}
UNSEEN = "bound to other memory", "metadata", "up", "down", "adapter loaded"  # by invalidate()


@pytest.mark.parametrize("change", [name for name in COMPILED if name not in UNSEEN])
@pytest.mark.filterwarnings("ignore:fused layers go on alone")
def test_a_compiled_model_sees_the_same(change):
    fused, apart = a_fused_block()
    compiled = in_one_graph(fused)
    x = an_input()
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), apart(x))
        for _ in range(2):
            for block in (apart, fused):
                torch.manual_seed(0)
                COMPILED[change](block)
            torch.testing.assert_close(compiled(x), apart(x))


def test_an_adapter_that_wakes_in_a_compiled_model_is_seen():
    apart = a_block(rank=2)
    slope.deactivate_adapters(apart)
    fused = copy.deepcopy(apart)
    slope.fuse_projections(fused, an_input())
    compiled = in_one_graph(fused)
    x = an_input()
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), apart(x))
        slope.activate_adapters(apart), slope.activate_adapters(fused)
        torch.testing.assert_close(compiled(x), apart(x))


def test_dense_layers_follow_and_end():
    fused, apart = a_fused_block(sparse=False)
    for change in (
        lambda b: b.k_proj.weight.mul_(2),
        lambda b: b.load_state_dict({k: v.flip(0) for k, v in b.state_dict().items()}),
    ):
        with torch.no_grad():
            change(apart), change(fused)
        for _ in range(2):
            assert_equal(fused, apart)
    assert type(fused.q_proj) is not nn.Linear
    with pytest.warns(UserWarning, match="weights were moved or loaded; call slope.fuse_proj"):
        fused.float().double(), apart.float().double()
    assert_equal(fused, apart)
    assert type(fused.q_proj) is nn.Linear


def test_an_adapter_at_the_same_address_is_another():
    fused, apart = a_fused_block()
    with torch.no_grad(), pytest.warns(UserWarning, match="go on alone"):
        for _ in range(20):
            for block in (apart, fused):
                torch.manual_seed(0)
                another_adapter(block.k_proj)
            assert_equal(fused, apart)
            slope.fuse_projections(fused, an_input())


def test_weights_written_between_two_layers_are_seen():
    for sparse in (True, False):
        fused, apart = a_fused_block(0, sparse)
        x = an_input()
        with torch.no_grad():
            for block in (fused, apart):
                block.q_proj(x)
                (block.k_proj.values if sparse else block.k_proj.weight).mul_(2)
            torch.testing.assert_close(fused.k_proj(x), apart.k_proj(x))
            torch.testing.assert_close(fused.v_proj(x), apart.v_proj(x))


@pytest.mark.parametrize("what", ["all", "adapters"])
def test_training_ends_it_and_a_fused_optimizer_is_followed(what):
    fused, apart = a_fused_block()
    x, losses = an_input(), []
    assert_equal(fused, apart)
    for block in (apart, fused):
        chosen = list(block.parameters())
        if what == "adapters":
            chosen = slope.adapter_parameters(block)
        for parameter in chosen:
            parameter.requires_grad_()
        optimizer = torch.optim.AdamW(chosen, lr=0.01, fused=True)
        ends = pytest.warns(UserWarning, match="they are trained; call slope.fuse_projections")
        with ends if block is fused else contextlib.nullcontext():
            for _ in range(3):
                optimizer.zero_grad()
                loss = block(x).square().mean()
                loss.backward()
                optimizer.step()
                with torch.no_grad():
                    losses.append(block(x).square().mean())
    torch.testing.assert_close(losses[3:], losses[:3])
    assert_equal(fused, apart)


@pytest.mark.parametrize("sparse", [False, True])
def test_copies_and_pickles_are_apart(sparse):
    fused, _ = a_fused_block(sparse=sparse)
    file = io.BytesIO()
    torch.save(fused, file)
    file.seek(0)
    x = an_input()
    for other in (copy.deepcopy(fused), torch.load(file, weights_only=False)):
        assert_equal(other, fused)
        assert type(other.q_proj) is (slope.SlopeLinear if sparse else nn.Linear)
        with torch.no_grad():
            before = fused(x)
            for parameter in other.parameters():
                parameter.zero_()
            assert torch.equal(fused(x), before)
    assert type(fused.q_proj) in (fusion.FusedSlopeLinear, fusion.FusedLinear)


def test_other_inputs_and_orders_go_on_alone():
    apart = a_block(rank=2)
    fused = copy.deepcopy(apart)
    slope.fuse_projections(fused, an_input())
    x, other = an_input(), an_input()
    with torch.no_grad():
        for calls in (
            [("q_proj", x), ("k_proj", other), ("v_proj", x)],
            [("v_proj", x), ("k_proj", x), ("q_proj", x)],
            [("q_proj", x), ("q_proj", other), ("k_proj", other), ("v_proj", x)],
            [("k_proj", x), ("v_proj", x.clone())],
            [("q_proj", x), ("v_proj", x), ("v_proj", x), ("k_proj", x)],
        ):
            for name, given in calls:
                expected = getattr(apart, name)(given)
                torch.testing.assert_close(getattr(fused, name)(given), expected)


def test_an_input_written_between_two_layers_is_seen():
    apart = a_block()
    fused = copy.deepcopy(apart)
    slope.fuse_projections(fused, an_input())
    x = an_input()
    with torch.no_grad():
        fused.q_proj(x)
        x.zero_()
        torch.testing.assert_close(fused.k_proj(x), apart.k_proj(x))


def test_gradients_of_the_input_are_those_of_the_layers_alone():
    fused, apart = a_fused_block()
    found = []
    for block in (apart, fused):
        x = an_input().fill_(0.3).requires_grad_()
        block(x).square().sum().backward()
        found.append(x.grad)
    torch.testing.assert_close(*found)


def test_a_frozen_model_needs_no_no_grad(monkeypatch):
    fused, apart = a_fused_block(rank=0)
    x = an_input()
    expected, sizes = apart(x), products(monkeypatch)
    torch.testing.assert_close(fused(x), expected)
    assert sizes == [40, D, 64]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("made", [torch.no_grad, torch.inference_mode])
def test_models_of_inference_mode(mode, made):
    with made():
        fused = a_block(rank=2)
        apart = copy.deepcopy(fused)
        slope.fuse_projections(fused, an_input())
    with mode():
        for _ in range(2):
            x = an_input()
            torch.testing.assert_close(fused(x), apart(x))


def test_autocast_takes_its_dtype():
    apart = a_block(rank=2).float()
    fused = copy.deepcopy(apart)
    slope.fuse_projections(fused, an_input().float())
    x = an_input().float()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        y, expected = fused(x), apart(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, expected, rtol=3e-2, atol=3e-2)


@pytest.mark.parametrize("rank", [0, 2])
def test_blocks_share_one_compiled_graph_that_follows_the_weights(rank):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    apart = nn.ModuleList(a_block(rank) for _ in range(3))
    fused = copy.deepcopy(apart)
    for block in fused:
        slope.fuse_projections(block, an_input())
        block.compile(backend=backend, fullgraph=True, dynamic=False)
    for _ in range(2):
        for ours, theirs in zip(fused, apart, strict=True):
            assert_equal(ours, theirs)
            for block in (ours, theirs):
                with torch.no_grad():
                    block.k_proj.values.mul_(-2)
    assert len(graphs) == 1


def test_a_llama_of_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    safetensors = pytest.importorskip("safetensors.torch")
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    apart = transformers.LlamaForCausalLM(config).double().eval()
    slope.sparsify(apart, slope.SparsityConfig(adapter_rank=2))
    for adapter in slope.layers.adapters(apart):
        nn.init.normal_(adapter.up)
    slope.activate_adapters(apart)
    apart.requires_grad_(False)
    fused, ids = copy.deepcopy(apart), torch.randint(64, (2, 6))
    found = slope.fuse_projections(fused, input_ids=ids)
    assert [len(fusion.names) for fusion in found] == [3, 2, 3, 2]  # the first QKV is dense
    assert all(fusion.why_apart is None for fusion in found)
    with torch.no_grad():
        torch.testing.assert_close(fused(ids).logits, apart(ids).logits)
        tokens = [m.generate(ids, max_new_tokens=4, do_sample=False) for m in (fused, apart)]
    assert torch.equal(*tokens)
    slope.save_pretrained(fused, tmp_path / "fused")
    loaded = slope.load_pretrained(tmp_path / "fused").state_dict()
    fused.save_pretrained(tmp_path / "theirs")
    theirs = safetensors.load_file(tmp_path / "theirs/model.safetensors")
    for name, tensor in apart.state_dict().items():
        assert torch.equal(loaded[name], tensor) and torch.equal(theirs[name], tensor)
    dense = slope.densify(fused, fold_adapters=True)
    with torch.no_grad():
        torch.testing.assert_close(dense(ids).logits, apart(ids).logits)


def another_pattern():
    block = Block().double()
    slope.sparsify(block, slope.SparsityConfig(rules=[("k_proj", "1:2")]))
    return block.requires_grad_(False)


def changed(change):
    block = a_block(rank=2)
    change(block)
    return block


def on_meta():
    with torch.device("meta"):
        block = Block().double()
    slope.sparsify(block)
    return block.requires_grad_(False)


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: changed(lambda b: setattr(b.k_proj.adapter, "scale", 0.1)), "differ in scale, or"),
        (lambda: changed(lambda b: setattr(b.k_proj.adapter, "active", False)), "some are active"),
        (lambda: changed(lambda b: setattr(b.k_proj, "prune_backward", False)), "patterns or back"),
        (another_pattern, "their patterns or backends differ"),
        (lambda: changed(lambda b: b.k_proj.requires_grad_(True)), "they are trained; call"),
        (lambda: a_block(rank=8), r"their adapters' ranks add up to more than d_in"),
    ],
)  # fmt: skip
def test_what_stays_apart_is_said(make, why):
    block = make()
    expected = copy.deepcopy(block)
    first, second = slope.fuse_projections(block, an_input())
    assert first.names == TOGETHER and type(block.q_proj) is slope.SlopeLinear
    with pytest.raises(AssertionError, match=why):
        raise AssertionError(first.why_apart)
    assert second == (("gate", "up"), None)
    assert_equal(block, expected)


def test_shared_parameters_stay_apart():
    block = a_block()
    block.gate.bias = block.up.bias
    _, second = slope.fuse_projections(block, an_input())
    assert second == (("gate", "up"), "a parameter shares memory with another one")


def test_different_dtypes_stay_apart():
    block = Block().requires_grad_(False)
    block.k_proj.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        first, _ = slope.fuse_projections(block, torch.randn(2, D))
    assert first.why_apart == "their parameters differ in dtype or device"


class Company(nn.Module):
    """Calls layers of one input in the groups given."""

    def __init__(self, *groups):
        super().__init__()
        self.groups = groups
        self.layers = nn.ModuleList(nn.Linear(D, D) for _ in range(4)).requires_grad_(False)

    def forward(self, x):
        for group in self.groups:
            x = sum(self.layers[number](x) for number in group)
        return x


@pytest.mark.parametrize(
    ("groups", "why"),
    [
        ([(0, 1), (1, 2)], "2 groups and none can be one product; layers.0, layers.1: a layer is "
         "called in other company too"),
        ([(0, 0)], "layers.0, layers.0: a layer is called in other company too"),
        ([(0,), (1,)], "found no linear layers that are called one after another with the same"),
    ],
)  # fmt: skip
def test_nothing_to_fuse_is_an_error(groups, why):
    with pytest.raises(ValueError, match=why):
        slope.fuse_projections(Company(*groups), torch.randn(3, D))


def test_a_group_called_again_is_one_group():
    apart = Company((0, 1), (0, 1), (2, 3))
    fused = copy.deepcopy(apart)
    assert len(slope.fuse_projections(fused, torch.randn(3, D))) == 2
    assert_equal(fused, apart, torch.randn(3, D))


def test_trained_and_empty_models_are_refused():
    with pytest.raises(ValueError, match=r"2 groups .* q_proj, k_proj, v_proj: they are trained"):
        slope.fuse_projections(Block().double(), an_input())
    with pytest.raises(ValueError, match="their parameters are sharded, or hold no numbers"):
        slope.fuse_projections(on_meta(), an_input().to("meta"))


def test_a_failed_call_leaves_nothing_behind():
    block = a_block().train()
    with pytest.raises(ValueError, match="the input has 3 features"):
        slope.fuse_projections(block, torch.randn(2, 3, dtype=torch.float64))
    assert block.training and type(block.q_proj) is slope.SlopeLinear
    assert not block.q_proj._forward_pre_hooks


def test_submodules_keep_their_modes():
    block = a_block().train()
    block.out.eval()
    slope.fuse_projections(block, an_input())
    assert block.training and block.q_proj.training and not block.out.training


def test_a_replica_for_another_gpu_reads_its_own_weights():
    fused, _ = a_fused_block(0, sparse=False)
    replica = fused.q_proj._replicate_for_data_parallel()
    replica.weight, replica.bias = 2 * fused.q_proj.weight, fused.q_proj.bias
    x = an_input()
    with torch.no_grad():
        expected = nn.functional.linear(x, replica.weight, replica.bias)
        assert torch.equal(replica(x), expected)


def test_autocast_that_begins_or_ends_between_two_layers_is_seen():
    block = a_block().float()
    slope.fuse_projections(block, an_input().float())
    x = an_input().float()
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            assert block.q_proj(x).dtype == torch.bfloat16
        assert block.k_proj(x).dtype == torch.float32


@pytest.mark.filterwarnings("ignore:fused layers go on alone")
def test_threads_that_end_a_group_together_disturb_no_one():
    errors, x = [], an_input()

    def run(block, expected, barrier):
        try:
            barrier.wait()
            for _ in range(3):
                with torch.no_grad():
                    torch.testing.assert_close(block(x), expected)
        except Exception as error:  # told in the thread that tests
            errors.append(error)

    for _ in range(20):
        fused, apart = a_fused_block()
        with torch.no_grad():
            for block in (fused, apart):
                block.v_proj.adapter.scale = 0.2
            barrier = threading.Barrier(6)
            threads = [
                threading.Thread(target=run, args=(fused, apart(x), barrier)) for _ in range(6)
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
    assert not errors


@pytest.mark.parametrize(
    "more",
    [
        lambda layer: layer.register_buffer("amax", torch.ones(1)),
        lambda layer: setattr(layer, "extra", nn.Identity()),
        lambda layer: setattr(layer, "forward", layer.forward),
    ],
)
def test_layers_that_hold_more_stay_apart(more):
    block = a_block()
    more(block.v_proj)
    expected = copy.deepcopy(block)
    first, _ = slope.fuse_projections(block, an_input())
    assert first.why_apart == "they hold more than weights, or have a forward of their own"
    assert_equal(block, expected)


def test_memory_shared_with_processes_stays_shared():
    block = a_block().share_memory()
    with pytest.raises(ValueError, match="their memory is shared with other processes"):
        slope.fuse_projections(block, an_input())
    assert block.q_proj.values.is_shared()


def test_a_failure_leaves_the_layers_as_they_were(monkeypatch):
    block = a_block()
    expected = copy.deepcopy(block)

    def full(parts):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(fusion, "_frozen", full)
    with pytest.raises(torch.OutOfMemoryError):
        slope.fuse_projections(block, an_input())
    assert type(block.q_proj) is slope.SlopeLinear
    assert_equal(block, expected)


def test_no_more_than_one_product_is_held():
    fused, _ = a_fused_block()
    x = an_input()
    with torch.no_grad():
        fused.q_proj(x)  # the others of its group are not called
        slot = fused.q_proj._group._slot
        assert slot.eager is not None
        gate = fused.gate(an_input())
        assert slot.eager[3][0].data_ptr() == gate.data_ptr()
        fused(x)
        assert slot.eager is None and slot.traced is None


def test_fusing_again_begins_anew():
    fused, apart = a_fused_block()
    before = fused.q_proj._group
    slope.fuse_projections(fused, an_input())
    assert fused.q_proj._group is not before and before._whole is None
    assert_equal(fused, apart)


def test_sparsify_says_that_it_comes_first():
    block = a_block(sparse=False)
    slope.fuse_projections(block, an_input())
    report = slope.sparsify(block)
    reasons = {layer.name: layer.reason for layer in report.layers}
    assert reasons["q_proj"] == (
        "it is one product with others; sparsify before slope.fuse_projections"
    )
    assert slope.SlopeLinear.from_linear(block.q_proj).origin == "Linear"


def test_a_module_under_two_names_is_one():
    block = a_block()
    twice = nn.Sequential(block, nn.Linear(32, D).double().requires_grad_(False), block)
    expected = copy.deepcopy(twice)
    found = slope.fuse_projections(twice, an_input())
    assert [fusion.why_apart for fusion in found] == [None, None]
    assert_equal(twice, expected)


def test_an_exported_program_holds_no_weights_twice():
    fused, apart = a_fused_block()
    x = an_input()
    with torch.no_grad():
        program = torch.export.export(fused, (x,), strict=False)
        torch.testing.assert_close(program.module()(x), apart(x))
    assert not program.constants


def test_adapters_pickled_by_older_versions_have_no_corners():
    adapter = slope.Adapter(8, 8, 2)
    assert "corners" not in adapter.__dict__ and adapter.corners == ()


@pytest.mark.parametrize("change", ["metadata", "up", "down", "adapter loaded"])
def test_a_compiled_model_is_told_by_invalidate(change):
    fused, apart = a_fused_block()
    compiled = in_one_graph(fused)
    x = an_input()
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), apart(x))
        for block in (apart, fused):
            COMPILED[change](block)
        with pytest.warns(UserWarning, match=r"or invalidate\(\) was called"):
            fused.q_proj.invalidate()
        torch.testing.assert_close(compiled(x), apart(x))


@pytest.mark.filterwarnings("ignore:fused layers go on alone")
def test_a_compiled_group_that_is_trained_goes_on_alone():
    fused, apart = a_fused_block()
    compiled = in_one_graph(fused)
    x = an_input()
    with torch.no_grad():
        compiled(x)
    losses = []
    for block, function in ((apart, apart), (fused, compiled)):
        optimizer = torch.optim.AdamW(block.requires_grad_(True).parameters(), fused=True)
        for _ in range(3):
            optimizer.zero_grad()
            loss = function(x).square().mean()
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                losses += [loss.detach(), function(x).square().mean()]
    torch.testing.assert_close(losses[6:], losses[:6])


def test_a_gradient_from_before_is_applied_rightly():
    fused = a_block(rank=2)
    apart = copy.deepcopy(fused)
    for block in (fused, apart):
        block.requires_grad_(True)
        block(an_input().fill_(0.2)).square().mean().backward()
        block.requires_grad_(False)
    slope.fuse_projections(fused, an_input())
    assert_equal(fused, apart)
    with pytest.warns(UserWarning, match="they are trained"):
        for block in (fused, apart):
            block.requires_grad_(True)
            torch.optim.AdamW(block.parameters(), lr=0.1, fused=True).step()
            with torch.no_grad():
                block(an_input())
    assert_equal(fused, apart)


def test_what_is_moved_nowhere_stays_one_product(monkeypatch):
    fused, apart = a_fused_block()
    fused.to("cpu").double().eval()
    sizes = products(monkeypatch)
    assert_equal(fused, apart)
    assert sizes[0] == 40


@pytest.mark.parametrize("sparse", [True, False])
def test_saved_tensors_have_memory_of_their_own(sparse):
    """Libraries that save take tensors of one storage for the same and drop some."""
    fused, apart = a_fused_block(sparse=sparse)
    file = io.BytesIO()
    torch.save(fused, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    for state in (fused.state_dict(), loaded.state_dict(), loaded.state_dict(keep_vars=True)):
        assert len({t.untyped_storage().data_ptr() for t in state.values()}) == len(state)
        for name, tensor in apart.state_dict().items():
            assert torch.equal(state[name], tensor)


def test_accelerate_saves_all(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    safetensors = pytest.importorskip("safetensors.torch")
    fused, apart = a_fused_block()
    accelerate.Accelerator(cpu=True).save_model(fused, tmp_path)
    saved = safetensors.load_file(tmp_path / "model.safetensors")
    assert saved.keys() == apart.state_dict().keys()
    safetensors.save_model(fused, tmp_path / "other.safetensors")


def test_outputs_may_be_written_in_place():
    fused, apart = a_fused_block(0, sparse=False)
    x, found = an_input(), []
    scale = torch.ones(8, dtype=torch.float64, requires_grad=True)
    for block in (fused, apart):
        with torch.no_grad():
            q, k, v = block.q_proj(x), block.k_proj(x), block.v_proj(x)
        k += scale
        v.relu_()
        found.append(torch.cat((q, k, v), -1))
    torch.testing.assert_close(*found)


def test_tensors_of_inference_mode_beside_others_stay_apart():
    block = a_block()
    with torch.inference_mode():
        block.k_proj.values = nn.Parameter(block.k_proj.values.clone(), False)
    first, _ = slope.fuse_projections(block, an_input())
    assert first.why_apart == "some are tensors of inference mode and others not"


def test_a_traced_program_holds_no_weights_twice():
    fused, apart = a_fused_block(0, sparse=False)
    x = an_input()
    with torch.no_grad():
        traced = torch.jit.trace(fused, x, check_trace=False)
        traced.load_state_dict({k: -v for k, v in traced.state_dict().items()})
        apart.load_state_dict({k: -v for k, v in apart.state_dict().items()})
        torch.testing.assert_close(traced(x), apart(x))


def test_another_group_that_fails_ends_the_first(monkeypatch):
    block = a_block()
    made = fusion._Group.__init__

    def second_fails(group, members, names, slot):
        if "gate" in names:
            raise torch.OutOfMemoryError("no room")
        made(group, members, names, slot)

    monkeypatch.setattr(fusion._Group, "__init__", second_fails)
    with pytest.raises(torch.OutOfMemoryError):
        slope.fuse_projections(block, an_input())
    assert all(type(layer) is slope.SlopeLinear for layer in block.children())


def test_vmap_over_inputs_goes_on_alone():
    fused, apart = a_fused_block(0, sparse=False)
    xs = torch.stack([an_input() for _ in range(3)])
    with torch.no_grad():
        torch.testing.assert_close(torch.vmap(fused)(xs), torch.vmap(apart)(xs))
