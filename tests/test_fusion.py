"""Layers that read the same input as one product: the same numbers, whatever changes."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

import slope

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


CHANGES = {
    "values": lambda b: b.k_proj.values.mul_(2),
    "values behind autograd": lambda b: b.k_proj.values.data.mul_(2),
    "bound to other memory": lambda b: setattr(
        b.v_proj.values, "data", 3 * b.v_proj.values.detach()
    ),
    "bias": lambda b: b.v_proj.bias.add_(1),
    "mask": lambda b: b.q_proj.set_dense(-b.k_proj.to_dense().repeat(3, 1), b.q_proj.keep_mask()),
    "up": lambda b: b.k_proj.adapter.up.add_(1),
    "down": lambda b: b.v_proj.adapter.down.mul_(-1),
    "scale": lambda b: [setattr(layer.adapter, "scale", 0.1) for layer in b.children()],
    "asleep": slope.deactivate_adapters,
    "one asleep": lambda b: setattr(b.k_proj.adapter, "active", False),
    "no adapter": lambda b: [setattr(layer, "adapter", None) for layer in b.children()],
    "loaded": lambda b: b.load_state_dict({k: v.flip(0) for k, v in b.state_dict().items()}),
    "assigned": lambda b: b.load_state_dict(
        {k: 2 * v if v.is_floating_point() else v for k, v in b.state_dict().items()}, assign=True
    ),
    "trained": lambda b: b.requires_grad_(True),
}


@pytest.mark.parametrize("change", list(CHANGES))
def test_it_follows_what_is_changed(change):
    apart = a_block(rank=2)
    fused = copy.deepcopy(apart)
    slope.fuse_projections(fused, an_input())
    for number in range(2):
        with torch.no_grad():
            for block in (apart, fused):
                torch.manual_seed(number)
                CHANGES[change](block)
        for _ in range(2):
            assert_equal(fused, apart)


def test_dense_layers_follow_what_is_changed():
    apart = a_block(sparse=False)
    fused = copy.deepcopy(apart)
    slope.fuse_projections(fused, an_input())
    for change in (
        lambda b: b.k_proj.weight.mul_(2),
        lambda b: b.load_state_dict({k: v.flip(0) for k, v in b.state_dict().items()}),
        lambda b: setattr(b.v_proj.bias, "data", torch.ones_like(b.v_proj.bias)),
        lambda b: b.to(torch.float32).to(torch.float64),
    ):
        with torch.no_grad():
            change(apart), change(fused)
        for _ in range(2):
            assert_equal(fused, apart)


def test_what_is_moved_is_put_together_again(monkeypatch):
    apart = a_block(rank=2)
    fused = copy.deepcopy(apart)
    slope.fuse_projections(fused, an_input())
    fused, apart = fused.float().double(), apart.float().double()
    x = an_input()
    assert_equal(fused, apart, x)
    sizes = products(monkeypatch)
    with torch.no_grad():
        fused(x)
    assert sizes[0] == 40
    pointers = [getattr(fused, name).values.data_ptr() for name in TOGETHER]
    whole = pointers[0], pointers[0] + 24 * 8 * 8, pointers[0] + 32 * 8 * 8
    assert tuple(pointers) == whole


@pytest.mark.parametrize("sparse", [False, True])
def test_copies_and_pickles_are_wholes_of_their_own(sparse):
    fused = a_block(rank=2, sparse=sparse)
    slope.fuse_projections(fused, an_input())
    file = io.BytesIO()
    torch.save(fused, file)
    file.seek(0)
    for other in (copy.deepcopy(fused), torch.load(file, weights_only=False)):
        assert_equal(other, fused)
        with torch.no_grad():
            other.q_proj.stored().zero_() if sparse else other.q_proj.weight.zero_()
            with pytest.raises(AssertionError, match="not close"):
                assert_equal(other, fused)
            assert not torch.equal(other(an_input()), other(an_input()))  # of random inputs


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


def test_gradients_are_those_of_the_layers_alone():
    apart = a_block(rank=2)
    fused = copy.deepcopy(apart)
    slope.fuse_projections(fused, an_input())
    x = an_input()
    gradients = []
    for block in (apart, fused):
        block.requires_grad_(True)
        optimizer = torch.optim.SGD(block.parameters(), lr=1e-6)
        for _ in range(2):
            optimizer.zero_grad()
            leaf = x.clone().requires_grad_()
            block(leaf).square().sum().backward()
            gradients.append([leaf.grad, *(p.grad.clone() for p in block.parameters())])
            optimizer.step()
    for ours, theirs in zip(gradients[2:], gradients[:2], strict=True):
        torch.testing.assert_close(ours, theirs)
    assert_equal(fused, apart)


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
    torch._dynamo.reset()
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
    fused[0].float(), apart[0].float()
    assert_equal(fused[0], apart[0], an_input().float())
    torch._dynamo.reset()


def test_a_llama_of_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    apart = transformers.LlamaForCausalLM(config).double().eval()
    slope.sparsify(apart)
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
    loaded = slope.load_pretrained(tmp_path / "fused")
    for name, tensor in apart.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
    dense = slope.densify(fused)
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
    assert second == (("gate", "up"), "a parameter is shared with another layer")


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
