"""The kernel for many tokens: that it compiles, what it is told, which tile is whose, refusals."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from machine_code import instructions_of, stack_of, touching_sums_in_flight

import slope
from slope.backends import gemm as module
from slope.backends import nvrtc
from slope.backends.cusparselt import layout
from slope.backends.gemm import gemm, takes_adapter, takes_scale, why_no_gemm

SOURCE = Path(module.__file__).with_name("gemm.cu").read_text()
MAPPED = "values", "x", "y", "up", "z", "down", "z_out"
MAPS = 128 * len(MAPPED)


@pytest.fixture
def hopper(monkeypatch):
    gpu = SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(nvrtc, "why_missing", lambda: None)


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize(("dtype", "kind"), [(torch.bfloat16, "BF16"), (torch.float16, "F32 ")])
def test_it_compiles_and_keeps_its_sums_in_registers(compiler, tmp_path, adapted, dtype, kind):
    path = tmp_path / "kernel.cubin"
    path.write_bytes(nvrtc.compile_source("gemm.cu", module.constants(dtype, adapted), "sm_90a"))
    lines = instructions_of(path)
    # One of zeros closes a group whose number of products is known at run time alone.
    products = [line for line in lines if "HGMMA" in line and "HGMMA.64x8x16.F16 RZ" not in line]
    assert all(kind in line for line in products)
    sparse = [line for line in products if "HGMMA.SP.64x256x32" in line]
    # Four products are a whole step of up, one is of the loop of what is left; four each are of two
    # steps of down of 64 ranks.
    dense = [sum(shape in line for line in products) for shape in ("64x256x16", "64x128x16")]
    assert dense == ([5, 8] if adapted else [0, 0])
    # A step has two products, and steps that give a part of Y away are written out.
    assert len(sparse) == 2 * (module._TOKENS // module._PART + 2)
    assert stack_of(path) == 0
    assert not touching_sums_in_flight(lines)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"PART": 24}, "a part of Y has whole tiles of 16 tokens"),
        ({"PART": 256}, "parts of Y go out beside pairs of steps"),
        ({"NT": 31, "PART": 248}, "a part of Y has whole tiles of 16 tokens"),
    ],
)
def test_parts_that_cannot_leave_are_refused(compiler, changed, said):
    constants = module.constants(torch.bfloat16, False) | changed
    with pytest.raises(nvrtc.NvrtcError, match=said):
        nvrtc.compile_source("gemm.cu", constants, "sm_90a")


def test_the_launch_packs_the_fields_of_the_source():
    body = re.sub("//.*", "", re.search(r"struct Arguments \{(.*?)\n\};", SOURCE, re.DOTALL)[1])
    assert re.findall(r"Map (\w+);", body) == [f"{m}_map" for m in MAPPED]
    fields = "places bias made tokens outputs inputs rank band scale"
    fields += " corner_outputs[CORNERS] corner_ranks[CORNERS]"
    assert re.findall(r"([\w\[\]]+)[,;]", body)[len(MAPPED) :] == fields.split()
    assert module._ARGUMENTS.size == 128  # as compilers lay it out, where maps are aligned so
    found = re.findall(r"(GROUPS|BLOCKS|RANKS|CORNERS) = (\d+)", SOURCE)
    sizes = {name: int(n) for name, n in found}
    assert sizes.pop("RANKS") == module._RANKS
    assert sizes.pop("CORNERS") == module._CORNERS
    assert sizes == {"GROUPS": module._ROWS // 64, "BLOCKS": module._BLOCKS}
    assert 128 * (sizes["GROUPS"] + 1) == module._THREADS


def test_shared_memory_holds_the_tiles_and_the_barriers():
    x, w = 64 * 256 * 2, 128 * 64 * 2 + 128 * 128 // 8
    y = 2 * module._BUFFERS * 64 * module._PART * 2
    barriers = 16 * (module._STAGES + module._A_STAGES) + 16
    assert module._STAGES * x + module._A_STAGES * w + y + barriers == module._SHARED
    assert module._SHARED <= 227 * 1024  # of an H200
    assert module.LEAST_COLUMNS == 64 * module._TOKENS // module._PART


def place_of(number, pairs, parts, block, band):
    """``place_of`` of the source."""
    first = number // (band * parts) * band
    within, height = number - first * parts, min(band, pairs - first)
    return (2 * (first + within % height) + block) * 128, within // height * 256


def ranks_of(corner_outputs, corner_ranks, rank, row):
    """``ranks_of`` of the source: the first, and how many."""
    top, first, end = row // 256 * 256, 0, rank
    for output, corner in zip(corner_outputs, corner_ranks, strict=True):
        if output <= top:
            first = corner
        if output >= top + 256:
            end = min(end, corner)
    return first, end - first


@pytest.mark.parametrize(
    ("outputs", "corners"),
    [
        (6144, (4096, 64, 5120, 128)), (28672, (14336, 64)), (700, (300, 8, 310, 24, 500, 32)),
        (4096, ()), (1000, (100, 1, 200, 2, 300, 3, 400, 4)),
    ],
)  # fmt: skip
def test_a_tile_reads_what_is_not_zero_in_blocks_on_a_diagonal(outputs, corners):
    rank = 200
    table = module._corner_table(corners)
    both = table[: module._CORNERS], table[module._CORNERS :]
    assert len(both[0]) == len(both[1])
    starts, ranks = [0, *corners[::2], outputs], [0, *corners[1::2], rank]
    read = {row: ranks_of(*both, rank, row) for row in range(0, outputs, 128)}
    for number, (low, high) in enumerate(itertools.pairwise(starts)):
        for row in {low // 128 * 128, *range(low // 128 * 128, high, 128)}:
            first, count = read[row]
            assert first <= ranks[number] and ranks[number + 1] <= first + count <= rank
    if corners == (4096, 64, 5120, 128):  # and no more where tiles end with blocks
        assert set(read.values()) == {(0, 64), (64, 64), (128, 72)}
    if len(corners) > 2 * module._CORNERS:
        assert set(read.values()) == {(0, rank)}


class Blocks:
    """Stands for the compiled kernel: what each block makes and waits for, by the same numbers.

    Clusters begin where there is room, take turns, and end; one that waits for Z keeps its room.
    """

    def __init__(self, x, w_r, bias):
        self.x, self.w_r, self.bias, self.maps, self.made = x, w_r, bias, [], 0

    def tensor_map(self, address, kind, columns, rows, pitch, box_columns, box_rows):
        assert pitch == 2 * columns and box_columns == 64
        assert kind == {torch.bfloat16: "bf16", torch.float16: "fp16"}[self.x.dtype]
        self.maps.append((rows, columns, box_rows))
        return bytes(128)

    def __call__(self, blocks, threads, argument, stream, cluster, early):
        assert early and threads == 384 and cluster == 2 and len(argument) == MAPS + 128
        given = module._ARGUMENTS.unpack(argument[MAPS:])
        made, tokens, outputs, inputs, rank, band, self.scale, *self.corners = given[2:]
        assert (tokens, outputs, inputs) == (self.x.shape[0], *self.w_r.shape)
        pairs, parts, added = -(-outputs // 256), -(-tokens // 256), -(-rank // 64)
        makings = added * -(-parts // 2) if made else 0
        assert blocks == 2 * (makings + min(66, pairs * parts))
        for room in (1, 2, 7, 65, blocks // 2):
            self.rank, self.counts = rank, torch.zeros(tokens, outputs, dtype=torch.int32)
            self.z = torch.zeros(tokens, rank, dtype=torch.int32)
            there = torch.zeros(max(1, self.made), dtype=torch.int32)
            waiting, begun = list(range(blocks // 2)), []
            while waiting or begun:
                while waiting and len(begun) < room:  # in any order: it is they who take a number
                    waiting.pop(torch.randint(len(waiting), ()).item())
                    begun.append(self.works(int(there[0]), makings, pairs * parts, blocks // 2))
                    there[0] += 1
                before = sum(map(len, begun))
                for works in begun:
                    self.turn(works[0], makings, added, pairs, parts, band, there) and works.pop(0)
                begun = [works for works in begun if works]
                assert sum(map(len, begun)) < before  # no one waits for ever
            assert (self.counts == 1).all() and (self.z == bool(made)).all()

    @staticmethod
    def works(number, makings, tiles, clusters):
        """What a cluster does that begins after so many others: it makes Z, or tiles."""
        if number < makings:
            return [(True, number)]
        each = range(number - makings, tiles, clusters - makings)
        return [(False, tile) for tile in each]

    def turn(self, work, makings, added, pairs, parts, band, there):
        """Do a work, unless it has to wait."""
        makes, number = work
        if makes:
            for block in (0, 1):
                token, first = (number // added * 2 + block) * 256, number % added * 64
                self.z[token : token + 256, first : first + 64] += 1
                there[1 + token // 256] += 2
            return True
        places = [place_of(number, pairs, parts, block, band) for block in (0, 1)]
        if makings and there[1 + places[0][1] // 256] < 2 * added:
            return False
        for row, token in places:
            self.counts[token : token + 256, row : row + 128] += 1
        return True


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("tokens", "outputs", "rank", "joined"),
    [
        (129, 64, 0, False), (256, 256, 8, False), (300, 448, 40, True), (9000, 2880, 0, False),
        (2000, 36864, 144, False), (2000, 1536, 576, True), (16384, 4096, 64, True),
    ],
)  # fmt: skip
def test_every_tile_is_the_work_of_one_block(
    hopper, monkeypatch, tokens, outputs, rank, joined, dtype
):
    weight = torch.zeros(outputs, 512, dtype=dtype)
    x = torch.zeros(tokens, 512, dtype=dtype)
    blocks = Blocks(x, weight, None)
    monkeypatch.setattr(nvrtc, "tensor_map", blocks.tensor_map)
    monkeypatch.setattr(module, "_kernel", lambda dtype, adapted, device: blocks)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 0, raising=False)
    new_zeros = torch.Tensor.new_zeros

    def counts(tensor, size, **settings):
        blocks.made = size
        return new_zeros(tensor, size, **settings)

    monkeypatch.setattr(torch.Tensor, "new_zeros", counts)
    packed = torch.zeros(layout.packed_numel(outputs, 512), dtype=dtype)
    up = torch.zeros(rank, outputs, dtype=dtype).t() if rank else None
    z = torch.zeros(tokens, rank, dtype=dtype) if rank and not joined else None
    down = torch.zeros(rank, 512, dtype=dtype) if joined else None
    corners = (outputs // 2, rank // 2) if rank else ()
    y = gemm(packed, x, None, outputs, up, z, down, 0.5, corners)
    nowhere = 2**31 - 1
    half = [[size // 2] if rank else [nowhere] for size in (outputs, rank)]
    assert blocks.corners == [*half[0], nowhere, nowhere, *half[1], nowhere, nowhere]
    assert y.shape == (tokens, outputs) and y.dtype == dtype
    assert (blocks.rank, blocks.scale) == (rank, 0.5)
    adapter = [(outputs, rank, 128), (tokens, rank, 128)] if rank else []
    adapter += [(rank, 512, 64), (tokens, rank, module._PART)] if joined else []
    assert blocks.maps == [
        (outputs, 256, 128), (tokens, 512, 128), (tokens, outputs, module._PART), *adapter
    ]  # fmt: skip


def test_of_blocks_at_work_both_operands_stay_in_the_cache():
    """Of 66 clusters at 14336 x 4096 with 16 384 tokens: 50 MB hold what a wave reads."""
    for wave in range(0, 56 * 64 - 66, 66):
        places = [place_of(number, 56, 64, 0, module._BAND) for number in range(wave, wave + 66)]
        rows, tokens = ({place[i] for place in places} for i in (0, 1))
        assert len(rows) * 256 * 4096 * 9 / 8 + len(tokens) * 256 * 2 * 4096 < 50e6


def test_no_tokens_need_no_launch():
    packed, x = torch.zeros(64 * 512 // 16 * 9), torch.empty(0, 512)
    assert gemm(packed, x, None, 64).shape == (0, 64)


@pytest.mark.parametrize("lane", range(32))
def test_a_lane_finds_its_metadata_in_the_operand(lane):
    """``places_of`` of the source, byte by byte, against the metadata as we store it."""
    linear = torch.nn.Linear(64, 64)
    metadata = slope.SlopeLinear.from_linear(linear).metadata
    tile = layout.arrange_metadata(metadata)
    nibbles = torch.stack((metadata & 15, metadata >> 4), -1).view(64, 16)
    for warp in range(4):
        at = 256 * (lane // 2 % 2) + warp * 64 + lane // 4 * 8
        eight = [int(byte) for byte in tile[at : at + 8]]
        four = eight[lane % 2 :: 2]
        word = sum((byte & 15) << 4 * i | (byte >> 4) << 16 + 4 * i for i, byte in enumerate(four))
        row, group = 16 * warp + lane // 4, 8 * (lane // 2 % 2) + 4 * (lane % 2)
        wanted = (*nibbles[row, group : group + 4], *nibbles[row + 8, group : group + 4])
        assert word == sum(int(nibble) << 4 * i for i, nibble in enumerate(wanted))


def test_nibbles_are_gathered_as_the_source_does():
    for four in itertools.product((0x00, 0x5A, 0xE4, 0xFF), repeat=4):
        word = sum(byte << 8 * i for i, byte in enumerate(four))
        low, high = word & 0x0F0F0F0F, word >> 4 & 0x0F0F0F0F
        low, high = low | low >> 4, high | high >> 4
        made = (
            low & 0xFF | (low >> 16 & 0xFF) << 8 | (high & 0xFF) << 16 | (high >> 16 & 0xFF) << 24
        )
        assert made == sum(
            (byte & 15) << 4 * i | (byte >> 4) << 16 + 4 * i for i, byte in enumerate(four)
        )


@pytest.mark.parametrize(
    ("case", "capability", "missing", "said"),
    [
        ((4096, 4096, 4096), (9, 0), None, None),
        ((129, 64, 512), (9, 0), None, None),
        ((4096, 4096, 4096), (8, 0), None, "the kernel is made for compute capability 9.0"),
        ((4096, 4096, 4096), (10, 0), None, "the kernel is made for compute capability 9.0"),
        ((4096, 4096, 4096), (9, 0), "cannot load libnvrtc.so.13", "cannot load libnvrtc.so.13"),
        (
            (4096, 4090, 4096), (9, 0), None,
            "the operand has whole tiles of 64, the layer is 4090 x 4096",
        ),
        ((4096, 4096, 448), (9, 0), None, "448 columns, the kernel takes 512 or more"),
        (
            (128, 4096, 4096), (9, 0), None,
            "128 tokens would leave half of the kernel's tiles of 256 empty",
        ),
    ],
)  # fmt: skip
def test_what_it_cannot_do_is_said(hopper, monkeypatch, case, capability, missing, said):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(nvrtc, "why_missing", lambda: missing)
    assert why_no_gemm(*case, 0) == said


def test_a_scale_goes_where_z_can_be_rounded():
    for dtype, least, most in (
        (torch.bfloat16, 2.0**-60, 2.0**60), (torch.float16, 2.0**-10, 1.0)
    ):  # fmt: skip
        for scale, takes in ((least, True), (-most, True), (most * 2, False), (least / 2, False)):
            assert takes_scale(scale, dtype) == takes
        assert takes_scale(1 / 576, dtype)  # the default of a rank
        assert not takes_scale(0.0, dtype)


def test_what_is_no_adapter_is_refused():
    x, packed = torch.zeros(200, 512), torch.zeros(layout.packed_numel(64, 512))
    up, z, down = torch.zeros(64, 8), torch.zeros(200, 8), torch.zeros(8, 512)
    for given, said in (
        ({"up": up}, "an adapter is up with z or with down, not up; give it so"),
        ({"z": z}, "not z;"),
        ({"up": up, "z": z, "down": down}, "not down, up, z;"),
        ({"up": up.t(), "z": z}, r"up is \(8, 64\) in torch.float32 on cpu; give it as \(64, 64\)"),
        ({"up": up, "z": z[1:]}, r"z is \(199, 8\) in .*; give it as \(200, 8\)"),
        (
            {"up": up, "down": down.half()},
            r"down is \(8, 512\) in torch.float16 on cpu; give it as",
        ),
    ):
        with pytest.raises(ValueError, match=said):
            gemm(packed, x, None, 64, **given)


@pytest.mark.parametrize("corners", [(8,), (0, 4), (32, 0), (64, 4), (32, 8), (40, 4, 32, 6)])
def test_corners_that_do_not_lie_in_up_are_refused(corners):
    x, packed = torch.zeros(200, 512), torch.zeros(layout.packed_numel(64, 512))
    up, z = torch.zeros(64, 8), torch.zeros(200, 8)
    with pytest.raises(ValueError, match=r"are not outputs and ranks in turns, rising, within 64"):
        gemm(packed, x, None, 64, up, z, corners=corners)


def test_an_adapter_needs_rows_of_whole_16_bytes():
    assert [takes_adapter(rank) for rank in (0, 1, 8, 12, 144)] == [False, False, True, False, True]


@pytest.mark.parametrize(("outputs", "inputs"), [(64, 448), (96, 512)])
def test_an_operand_that_it_cannot_read_is_refused(outputs, inputs):
    packed = torch.zeros(layout.packed_numel(outputs, inputs), dtype=torch.bfloat16)
    x = torch.zeros(200, inputs, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=f"{outputs} x {inputs} has fewer than 512 columns or no"):
        gemm(packed, x, None, outputs)
