"""The kernel that adds an adapter to a large Y: that it compiles, what blocks do, refusals."""

from __future__ import annotations

import heapq
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from machine_code import instructions_of, stack_of, touching_sums_in_flight

from slope.backends import nvrtc, rank_update
from slope.backends.rank_update import UpdateLaunch, why_no_update

SHARED = 227 * 1024  # bytes, of an H200
SOURCE = Path(rank_update.__file__).with_name("rank_update.cu").read_text()


@pytest.fixture
def hopper(monkeypatch):
    gpu = SimpleNamespace(shared_memory_per_block_optin=SHARED, multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(nvrtc, "why_missing", lambda: None)


@pytest.mark.parametrize("rank", [8, 72, 144, 256])
def test_it_compiles_for_every_number_of_chunks(compiler, tmp_path, rank):
    launch = UpdateLaunch.of(rank, SHARED)
    for dtype, kind in ((torch.bfloat16, "BF16"), (torch.float16, "F32 ")):
        constants = rank_update.constants(launch, dtype)
        path = tmp_path / "kernel.cubin"
        path.write_bytes(nvrtc.compile_source("rank_update.cu", constants, "sm_90a"))
        lines = instructions_of(path)
        products = [line for line in lines if "HGMMA.64x64x16" in line]
        assert len(products) == 4 * launch.chunks and all(kind in line for line in products)
        assert stack_of(path) == 0
        assert not touching_sums_in_flight(lines)


def test_too_few_tiles_in_flight_are_refused(compiler):
    constants = rank_update.constants(UpdateLaunch(1, 2, 2), torch.bfloat16)
    with pytest.raises(nvrtc.NvrtcError, match="a tile of Y is given back one tile later"):
        nvrtc.compile_source("rank_update.cu", constants, "sm_90a")


@pytest.mark.parametrize("rank", range(8, 257, 8))
@pytest.mark.parametrize("shared", [SHARED, 163 * 1024])
def test_shared_memory_holds_up_the_tiles_and_the_barriers(rank, shared):
    launch = UpdateLaunch.of(rank, shared)
    up, y, z = launch.chunks * 128 * 128, 64 * 128 * 2, launch.chunks * 64 * 128
    tiles = launch.y_stages * y + launch.z_stages * z
    assert launch.shared == up + tiles + 8 * (1 + 2 * launch.y_stages + 2 * launch.z_stages)
    assert launch.shared <= shared < launch.shared + y + 16
    assert 64 * (launch.chunks - 1) < rank <= 64 * launch.chunks
    if shared == SHARED:
        assert launch.y_stages > 2


def test_the_launch_packs_the_fields_of_the_source():
    body = re.search(r"struct Arguments \{(.*?)\n\};", SOURCE, re.DOTALL)[1]
    fields = re.findall(r"^ +(\w+) (\w+);", body, re.MULTILINE)
    assert fields == [
        *(("Map", f"{name}_map") for name in ("y", "z", "up")),
        *(("int", name) for name in ("strips", "tiles", "share")), ("float", "scale"),
    ]  # fmt: skip
    assert (3 * 128 + rank_update._ARGUMENTS.size) % 64 == 0
    sizes = {name: int(number) for name, number in re.findall(r"(TOKENS|GROUPS) = (\d+)", SOURCE)}
    assert sizes == {"TOKENS": rank_update._TOKENS, "GROUPS": rank_update._OUTPUTS // 64}
    assert 128 * sizes["GROUPS"] + 64 == rank_update._THREADS


class Blocks:
    """Stands for the compiled kernel: does on the CPU what each block does, by the same numbers."""

    def __init__(self, *matrices):
        self.matrices = {each.data_ptr(): each for each in matrices}
        self.given = []

    def tensor_map(self, address, kind, columns, rows, pitch, box_columns, box_rows):
        matrix = self.matrices[address]
        assert (rows, columns) == matrix.shape and pitch == 2 * columns and box_columns == 64
        assert kind == {torch.bfloat16: "bf16", torch.float16: "fp16"}[matrix.dtype]
        self.given.append((matrix, box_rows))
        return bytes(128)

    def __call__(self, blocks, threads, argument, stream, early):
        assert early and threads == 320 and len(argument) == 3 * 128 + 64
        strips, tiles, share, scale = rank_update._ARGUMENTS.unpack(argument[3 * 128 :])
        y, z, up = (matrix for matrix, _ in self.given)
        assert [rows for _, rows in self.given] == [64, 64, 128]
        counts = torch.zeros(y.shape, dtype=torch.int32)
        sums = y.float() + scale * z.float() @ up.float().t()
        for block in range(blocks):
            column, first = block % strips * 128, block // strips * share
            for tile in range(first, first + min(share, tiles - first)):
                here = slice(64 * tile, 64 * tile + 64), slice(column, column + 128)
                counts[here] += 1
                y[here] = sums[here].to(y.dtype)
        assert (counts == 1).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("tokens", "outputs", "rank"), [(1, 8, 8), (64, 128, 64), (65, 264, 72), (1000, 1600, 144)]
)
def test_every_tile_is_the_work_of_one_block(hopper, monkeypatch, tokens, outputs, rank, dtype):
    shapes = (tokens, outputs), (tokens, rank), (outputs, rank)
    y, z, up = (torch.randn(shape).to(dtype) for shape in shapes)
    blocks = Blocks(y, z, up)
    monkeypatch.setattr(nvrtc, "tensor_map", blocks.tensor_map)
    monkeypatch.setattr(rank_update, "_kernel", lambda launch, dtype, device: blocks)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 0, raising=False)
    expected = (y.float() + 0.5 * z.float() @ up.float().t()).to(dtype)
    assert rank_update.rank_update(y, z, up, 0.5) is y
    assert torch.equal(y, expected)


def test_no_tokens_need_no_launch():
    y = torch.empty(0, 64, dtype=torch.bfloat16)
    assert rank_update.rank_update(y, y[:, :8], torch.empty(64, 8), 1.0) is y


def test_blocks_of_several_tiles_begin_less_often():
    given = ((112, 256), (32, 256), (288, 256), (32, 32), (8, 4))
    assert [rank_update._share(*case, 132) for case in given] == [37, 64, 64, 8, 1]


def time_of(share, strips, tiles):
    """In tiles, of blocks that begin one after another where a multiprocessor is free."""
    busy = [0] * 132
    for first in range(0, tiles, share):
        for _ in range(strips):
            heapq.heapreplace(busy, busy[0] + min(share, tiles - first) + 3)
    return max(busy)


@pytest.mark.parametrize("tiles", [1, 4, 32, 100])
@pytest.mark.parametrize("strips", [1, 8, 32, 112, 288, 393])
def test_blocks_share_the_tiles_so_that_few_multiprocessors_wait(strips, tiles):
    share = rank_update._share(strips, tiles, 132)
    best = min(time_of(each, strips, tiles) for each in range(1, tiles + 1))
    assert time_of(share, strips, tiles) <= 1.15 * best


@pytest.mark.parametrize(
    ("outputs", "rank", "capability", "missing", "said"),
    [
        (4096, 64, (9, 0), None, None),
        (4096, 64, (8, 0), None, "the kernel is made for compute capability 9.0"),
        (4096, 64, (12, 0), None, "the kernel is made for compute capability 9.0"),
        (4096, 64, (9, 0), "cannot load libnvrtc.so.13", "cannot load libnvrtc.so.13"),
        (4096, 20, (9, 0), None, "out_features=4096 and rank=20 are not divisible by 8"),
        (4100, 64, (9, 0), None, "out_features=4100 and rank=64 are not divisible by 8"),
        (4096, 264, (9, 0), None, "rank 264, the kernel takes up to 256"),
    ],
)
def test_what_it_cannot_do_is_said(hopper, monkeypatch, outputs, rank, capability, missing, said):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(nvrtc, "why_missing", lambda: missing)
    assert why_no_update(outputs, rank, 0) == said
