"""The binding, its plans and its layout, over a stand-in for the library."""

from __future__ import annotations

import threading

import pytest
import torch
from fake_cusparselt import FakeLibrary

from slope.backends.cusparselt import layout
from slope.backends.cusparselt.binding import CusparseltError, Handle, Library, Plan
from slope.backends.cusparselt.plans import PLANS_PER_THREAD, PlanKey, Products
from slope.compressed import compress
from slope.masks import row_keep_mask
from slope.pattern import NMPattern

PATTERN = NMPattern(2, 4)


@pytest.fixture
def fake():
    return FakeLibrary()


@pytest.fixture
def products(fake):
    return Products(Library(fake))


def operand(out_features=64, in_features=128, dtype=torch.bfloat16):
    weight = torch.randn(out_features, in_features).to(dtype)
    keep_mask = row_keep_mask(weight, PATTERN)
    values, metadata = compress(weight, keep_mask, PATTERN)
    return layout.pack(values, metadata), weight * keep_mask


def expected(x, weight, bias=None):
    y = x.float() @ weight.float().t()
    return (y if bias is None else y + bias.float()).to(x.dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [8, 1, 13, 40])
def test_product_equals_the_dense_one_for_ragged_token_counts_too(products, tokens, dtype):
    packed, weight = operand(dtype=dtype)
    x = torch.randn(tokens, 128).to(dtype)
    y = products.matmul(packed, x, None, 64)
    assert y.shape == (tokens, 64)
    torch.testing.assert_close(y, expected(x, weight))


def test_one_plan_serves_layers_with_their_own_bias(products, fake):
    x = torch.randn(8, 128).bfloat16()
    for _ in range(3):
        packed, weight = operand()
        bias = torch.randn(64).bfloat16()
        y = products.matmul(packed, x, bias, 64)
        torch.testing.assert_close(y, expected(x, weight, bias))
    assert fake.names().count("MatmulPlanInit") == 1
    assert (products.counts.hits, products.counts.misses) == (2, 1)


def test_the_same_bias_is_set_once(products, fake):
    packed, _ = operand()
    x, bias = torch.randn(8, 128).bfloat16(), torch.randn(64).bfloat16()
    products.matmul(packed, x, bias, 64)
    before = fake.names().count("MatmulDescSetAttribute")
    products.matmul(packed, x, bias, 64)
    assert fake.names().count("MatmulDescSetAttribute") == before


def test_calls_are_made_in_the_order_of_the_header(products, fake):
    packed, _ = operand()
    products.matmul(packed, torch.randn(8, 128).bfloat16(), None, 64)
    assert fake.names() == [
        "Init", "StructuredDescriptorInit", "DenseDescriptorInit", "DenseDescriptorInit",
        "MatmulDescriptorInit", "MatmulAlgSelectionInit", "MatmulPlanInit", "MatmulGetWorkspace",
        "Matmul",
    ]  # fmt: skip


def test_a_second_product_is_one_call_of_the_library(products, fake):
    packed, _ = operand()
    x = torch.randn(8, 128).bfloat16()
    products.matmul(packed, x, None, 64)
    fake.calls.clear()
    products.matmul(packed, x, None, 64)
    assert fake.names() == ["Matmul"]


def test_plans_differ_by_shape_tokens_dtype_bias_and_algorithm(products):
    base = dict(
        device=-1, out_features=64, in_features=64, tokens=8, dtype=torch.bfloat16, bias=False,
        algorithm=None,
    )  # fmt: skip
    changes = dict(
        out_features=128, in_features=128, tokens=16, dtype=torch.float16, bias=True, algorithm=1
    )
    plans = {id(products.plan(PlanKey(**base)))}
    plans |= {id(products.plan(PlanKey(**base | {key: value}))) for key, value in changes.items()}
    assert len(plans) == 7
    assert products.plan(PlanKey(**base)) is products.plan(PlanKey(**base))


def test_search_returns_the_best_algorithm_and_frees_its_plan(products, fake):
    packed, _ = operand()
    live = len(fake.live)
    assert products.search(packed, torch.randn(8, 128).bfloat16(), None, 64) == 3
    assert [kind for kind in fake.live.values() if kind == "plan"] == []
    assert len(fake.live) <= live + 2  # the handle, and the product's descriptor, never destroyed


def test_fp16_is_not_searched(products, fake):
    before = dict(fake.live)
    packed = torch.empty(layout.packed_numel(64, 128), dtype=torch.float16)
    assert products.search(packed, torch.randn(8, 128).half(), None, 64) is None
    assert fake.live == before


def test_every_thread_has_its_own_handle_and_plans(products, fake):
    packed, weight = operand()
    x = torch.randn(8, 128).bfloat16()

    def work():
        torch.testing.assert_close(products.matmul(packed, x, None, 64), expected(x, weight))

    work()
    other = threading.Thread(target=work)
    other.start()
    other.join()
    assert fake.names().count("Init") == 2
    assert fake.names().count("MatmulPlanInit") == 2


def test_the_least_recently_used_plan_goes_first(products, fake, monkeypatch):
    monkeypatch.setattr("slope.backends.cusparselt.plans.PLANS_PER_THREAD", 2)
    keys = [PlanKey(-1, 64, 64, tokens, torch.bfloat16, False, None) for tokens in (8, 16, 24)]
    first, second = products.plan(keys[0]), products.plan(keys[1])
    products.plan(keys[0])
    products.plan(keys[2])
    assert products.plan(keys[0]) is first
    assert products.plan(keys[1]) is not second
    assert fake.names().count("MatmulPlanDestroy") == 2
    assert PLANS_PER_THREAD > 100


def test_an_error_of_the_library_names_the_call_and_the_status(fake):
    fake.fail["cusparseLtMatmulPlanInit"] = 10
    handle = Handle(Library(fake))
    with pytest.raises(CusparseltError, match="cusparseLtMatmulPlanInit returned status 10"):
        Plan(handle, 64, 64, 8, torch.bfloat16, bias=False)


def test_a_dtype_without_kernels_is_refused(products):
    with pytest.raises(CusparseltError, match="torch.float32 has no 2:4 kernels; use bf16 or fp16"):
        products.plan(PlanKey(-1, 64, 64, 8, torch.float32, False, None))


def test_version_is_read(fake):
    assert Handle(Library(fake)).version() == 800


@pytest.mark.parametrize("shape", [(64, 64), (128, 320), (192, 128)])
def test_packed_operand_unpacks_to_the_weight(shape):
    from fake_cusparselt import unpack

    packed, weight = operand(*shape)
    assert packed.numel() == layout.packed_numel(*shape)
    torch.testing.assert_close(unpack(packed, *shape), weight, rtol=0, atol=0)


def test_only_whole_tiles_fit():
    assert layout.fits(64, 128)
    assert not layout.fits(96, 128)
    assert not layout.fits(64, 96)
