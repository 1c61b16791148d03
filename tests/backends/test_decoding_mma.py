"""The compiled decode kernel: that it compiles, how it is cut up, and when it is refused."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from machine_code import instructions_of, stack_of, touching_sums_in_flight

from slope.backends import decoding, decoding_mma, nvrtc
from slope.backends.decoding_mma import MmaLaunch, cuts_for, decode_mma, launches, why_no_mma
from slope.backends.tuning import bucket

GPU = {"shared_memory_per_block_optin": 227 * 1024}  # of an H200, and of later ones
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@pytest.fixture
def with_cuda(monkeypatch):
    known = (
        decoding_mma._why_no_compiler, decoding_mma._shared_memory, decoding_mma._has_wgmma,
    )  # fmt: skip
    for cached in known:
        cached.cache_clear()
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(nvrtc, "why_missing", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(**GPU))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (12, 0))
    yield
    for cached in known:
        cached.cache_clear()


@pytest.fixture
def hopper(with_cuda, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))


def test_what_touches_sums_in_flight_is_found():
    product = "HGMMA.SP.64x16x32.F32.BF16 R24, R8, gdesc[UR4], R24, R12, 0x0, gsb0"
    wait, move = "WARPGROUP.DEPBAR.LE gsb0, 0x0", "MOV R40, R31"
    assert touching_sums_in_flight([move, product, "MOV R40, R32", wait, move]) == []
    assert touching_sums_in_flight([product, move, wait]) == [move]


@pytest.mark.parametrize(
    ("architecture", "table"),
    [
        *((name, decoding_mma._CUTS) for name in ("sm_80", "sm_90", "sm_100", "sm_120")),
        ("sm_90a", decoding_mma._GROUPED),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_every_cut_compiles(compiler, tmp_path, architecture, table):
    names = {name for names in table.values() for name in names.split()}
    cuts = [MmaLaunch.parse(name) for name in sorted(names)]
    many = [cut for cut in cuts if cut.tma and cut.token_tiles * cut.row_tiles >= 8]  # registers
    cuts += [cut._replace(low_splits=1) for cut in many]
    for number, cut in enumerate(cuts):
        assert cut.grouped == (architecture == "sm_90a")
        code = nvrtc.compile_source(
            "decode.cu", decoding_mma.constants(cut, (BF16, FP16)[number % 2]), architecture
        )
        assert code.startswith(b"\x7fELF") and b"slope_decode" in code
        path = tmp_path / "kernel.cubin"
        path.write_bytes(code)
        # Without TMA ptxas may spill what is used before and behind the loop, for more warps.
        assert stack_of(path) <= (0 if cut.tma else 16), cut
        if cut.grouped:
            lines = instructions_of(path)
            assert any("HGMMA.SP" in line for line in lines), cut
            assert not touching_sums_in_flight(lines), cut


def test_what_cannot_be_compiled_says_where(compiler):
    with pytest.raises(nvrtc.NvrtcError, match=r"NVRTC cannot compile decode\.cu for sm_90: .*NT"):
        nvrtc.compile_source("decode.cu", {"MT": 1}, "sm_90")


def test_warps_that_take_turns_must_find_their_stage_again(compiler):
    cut = MmaLaunch.parse("16.1.4.2.5t")
    with pytest.raises(nvrtc.NvrtcError, match="a stage is always read by the same warps"):
        nvrtc.compile_source("decode.cu", decoding_mma.constants(cut, BF16), "sm_90a")


def test_the_struct_is_that_of_the_source():
    source = Path(decoding_mma.__file__).with_name("decode.cu").read_text()
    body = source[source.index("Arguments {") :].partition("};")[0]
    names = re.findall(r"(\w+)[,;]", re.sub("//.*", "", body))
    maps = [f"{name}_map" for name in ("values", "metadata", "x", "up", "z", "y")]
    assert names == [*maps, *decoding_mma._FIELDS.split()]
    # As compilers lay it out, where maps are aligned to 64 bytes.
    assert decoding_mma._ARGUMENTS.size == 8 * 9 + 8 + 4 * 9 + 4
    assert (6 * len(decoding_mma._NO_MAP) + 120 + len(decoding_mma._PADDING)) == 896


SHAPES = (
    (64, 64),
    (768, 3072),
    (2048, 8192),
    (4096, 14336),
    (5120, 5120),
    (9216, 9216),
    (28672, 768),
)


@pytest.mark.parametrize("memory", [99, 163, 227])
def test_cuts(with_cuda, monkeypatch, memory):
    monkeypatch.setitem(GPU, "shared_memory_per_block_optin", memory * 1024)
    for tokens in range(1, decoding.MAX_TOKENS + 1):
        cuts = cuts_for(tokens, 0)
        assert cuts or (memory == 99 and tokens > 16)
        for cut in cuts:
            assert cut.shared <= memory * 1024 and cut.threads <= 1024 and not cut.grouped
            assert cut.parts(tokens) == 1 and 8 * cut.token_tiles <= bucket(max(8, tokens))
    assert not cuts_for(65, 0)


def test_cuts_with_wgmma(hopper):
    for tokens in (1, 8, 9, 16, 17, 32, 33, 64, 65, 1024, 4096):
        cuts = cuts_for(tokens, 0)
        assert cuts and all(cut.shared <= 227 * 1024 and cut.threads <= 1024 for cut in cuts)
        kinds = {cut.grouped for cut in cuts}
        assert kinds == ({False, True} if tokens <= 32 else {True})
        assert all(cut.parts(tokens) == 1 for cut in cuts if not cut.tma) or tokens > 64
        # Four warps share X, whose columns begin at a multiple of 1024 bytes.
        assert all(cut.row_warps % 4 == 0 for cut in cuts if cut.grouped)
        assert all(16 * cut.rows * cut.column_warps % 1024 == 0 for cut in cuts if cut.grouped)
        # A stage is always read by the same warps.
        assert all(cut.stages % cut.column_warps == 0 for cut in cuts if cut.tma)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_launches(hopper, shape):
    for tokens in (1, 16, 17, 32, 64, 1024, 4096):
        found = [MmaLaunch.parse(name) for name in launches(tokens, *shape, 0, 0)]
        served = set(cuts_for(tokens, 0))
        if shape[1] % 128:
            served = {cut for cut in served if not cut.tma}
        elif tokens > 16:
            served = {cut for cut in served if cut.tma}
        assert {one._replace(splits=1, x_first=False) for one in found} == served
        for one in found:
            rows, parts = -(-shape[0] // one.rows), one.parts(tokens)
            other = one._replace(x_first=not one.x_first)
            both = one.tma and min(rows, parts) > 1 and shape[0] * shape[1] <= 6 << 20
            both = both and one.splits <= 2
            assert (other in found) == both and (both or not one.x_first)
            assert 1 <= one.splits <= decoding_mma.LARGEST_CLUSTER
            if one.splits > 1:
                assert 128 * one.column_warps * one.splits <= shape[1]
                assert -(-shape[0] // one.rows) * one.parts(tokens) * one.splits <= 1300
        # With an adapter each in two ways; for many tokens also without it.
        few = 4 if shape[1] == 14336 else 2
        by_threads, beside = {few, 2 * few}, {0} if tokens > 64 else set()
        by_tma = {2, min(8, shape[1] // 128)}
        expected = {
            one._replace(low_splits=low)
            for one in found
            for low in beside | (by_tma if one.tma else by_threads)
        }
        assert {MmaLaunch.parse(name) for name in launches(tokens, *shape, 24, 0)} == expected
        # Rows of 20 numbers begin at no multiple of 16 bytes.
        odd = [MmaLaunch.parse(name) for name in launches(tokens, *shape, 20, 0)]
        assert all(one.low_splits == 0 for one in odd if one.tma)
        assert any(one.low_splits for one in odd) and any(not one.tma for one in odd)
    # One step cannot be split, and rows of 8 bytes of metadata are not for TMA.
    copied_by_threads = [str(cut) for cut in cuts_for(64, 0) if not cut.tma]
    assert launches(64, 64, 64, 0, 0) == copied_by_threads
    assert "8.1.4.1.4t/6" in launches(64, 768, 768, 0, 0)  # a step for each
    small = launches(1024, 768, 3072, 0, 0)
    assert "16.1.8.1.4tx/2" in small and "16.1.8.1.4tx/3" not in small
    assert not any("x" in name for name in launches(1024, 4096, 4096, 0, 0))


def test_the_figures_of_a_cut():
    cut = MmaLaunch(1, 1, 1, 4, 4)
    assert (cut.rows, cut.threads) == (16, 128)
    assert cut.shared == 4 * (16 * 512 + 8 * 1024 + 16 * 64)
    assert [cut.parts(tokens) for tokens in (1, 8, 9, 64)] == [1, 1, 2, 8]
    wide = MmaLaunch(16, 1, 8, 1, 4, splits=3, grouped=True)
    assert str(wide) == "16.1.8.1.4g/3" and MmaLaunch.parse(str(wide)) == wide
    assert MmaLaunch.parse("1.1.1.4.4") == cut == MmaLaunch.parse("1.1.1.4.4/1")
    assert MmaLaunch.parse("1.1.1.4.4/2/3") == cut._replace(splits=2, low_splits=3)
    x_first = MmaLaunch.parse("16.1.12.1.3px")
    assert str(x_first._replace(splits=2)) == "16.1.12.1.3px/2"
    stays = MmaLaunch.parse("16.1.12.1.3p")
    assert x_first == stays._replace(x_first=True)
    assert stays == MmaLaunch(16, 1, 12, 1, 3, grouped=True, tma=True, stays=True)
    assert str(stays) == "16.1.12.1.3p/1"
    assert stays.shared == 3 * (192 * 128 + 128 * 256 + 192 * 16) + 2 * 128 * 192 + 16 * 3
    # One warp copies; where others need its registers, a group of four.
    names = "16.1.12.1.3t", "16.2.8.1.3t", "8.2.8.1.4t", "16.2.8.1.3g"
    assert [MmaLaunch.parse(name).threads for name in names] == [416, 384, 288, 256]


def refusal(tokens=1, shape=(64, 128), dtype=BF16, values=BF16):
    return why_no_mma(tokens, *shape, dtype, values, 0)


def test_refusals_with_wgmma(hopper):
    assert refusal(65) is refusal(1024) is refusal(4096) is None
    assert refusal(8192) == "8192 tokens, the decode kernel takes up to 4096"
    for tokens, outputs in ((1024, 50304), (2048, 3072), (4096, 1536)):
        assert refusal(tokens, (outputs, 128)) is None
        wider = refusal(max(tokens, 2048), (outputs + 64, 128))
        most = {2048: 1024, 4096: 2048}[max(tokens, 2048)]
        said = f"tokens, the decode kernel takes up to {most} of {outputs + 64} outputs"
        assert wider == f"{max(tokens, 2048)} {said}"


def test_registers_that_copying_warps_hand_over_are_enough(compiler):
    cut = MmaLaunch.parse("24.1.12.1.3t")  # 384 threads of 232 registers are more than there are
    with pytest.raises(nvrtc.NvrtcError, match="would wait for ever"):
        nvrtc.compile_source("decode.cu", decoding_mma.constants(cut, BF16), "sm_90a")


def test_refusals(with_cuda, monkeypatch):
    assert refusal() is refusal(64) is None
    assert refusal(65) == "65 tokens, the decode kernel takes up to 64"
    assert refusal(shape=(64, 96)) == "in_features=96 is not divisible by 64"
    assert refusal(shape=(70, 128)) == "out_features=70 is not divisible by 4"
    assert "casts nothing, and float32 values are needed as bfloat16" in refusal(values=FP32)
    decoding_mma._shared_memory.cache_clear()
    monkeypatch.setitem(GPU, "shared_memory_per_block_optin", 99 * 1024)
    assert refusal(8) is None
    assert refusal(64) == "64 tokens take more than the GPU's 101376 bytes of shared memory"


@pytest.mark.parametrize(
    ("version", "reason"),
    [
        (None, "CUDA None compiles no mma.sp::ordered_metadata, CUDA 12.5 does"),
        ("12.4", "CUDA 12.4 compiles no mma.sp"),
        ("99.1", r"cannot load libnvrtc.so.99: "),
    ],
)
def test_a_compiler_that_is_too_old_or_missing_is_a_reason(monkeypatch, version, reason):
    monkeypatch.setattr(torch.version, "cuda", version)
    for cached in (nvrtc._compiler, decoding_mma._why_no_compiler):
        cached.cache_clear()
    assert reason in refusal()
    if version is None:
        assert nvrtc.why_missing() == "this torch was built without CUDA, so it has no NVRTC"
    decoding_mma._why_no_compiler.cache_clear()


def argument_of(argument):
    """What a launch is given, by the names of the source, behind six maps if there are."""
    assert len(argument) in (120, 896)
    numbers = decoding_mma._ARGUMENTS.unpack_from(argument, 6 * 128 * (len(argument) == 896))
    return SimpleNamespace(**dict(zip(decoding_mma._FIELDS.split(), numbers, strict=True)))


@pytest.fixture
def launched(monkeypatch):
    """What is launched, and handed to the second launch, on a GPU with clusters or without."""

    def prepare(clusters, room=True):
        seen, finished = [], []

        class Kernel:
            def __init__(self, cut, dtype, device):
                assert dtype == BF16 and cut.splits == 1
                self.cut = cut

            def holds(self, threads, cluster):
                assert clusters and threads == self.cut.threads and cluster > 1
                return room

            def __call__(self, blocks, threads, argument, stream, cluster, early):
                assert early == clusters
                seen.append((self.cut, blocks, threads, argument_of(argument), stream, cluster))

        def finish(partial, *given, **options):
            finished.append(partial.shape[0])

        decoding_mma._plan.cache_clear()
        monkeypatch.setattr(decoding_mma, "_kernel", Kernel)
        monkeypatch.setattr(decoding_mma, "_has_clusters", lambda device: clusters)
        monkeypatch.setattr(decoding_mma, "finish", finish)
        monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 7, raising=False)
        return seen, finished

    yield prepare
    decoding_mma._plan.cache_clear()


@pytest.mark.parametrize("rank", [0, 5])
def test_what_is_launched(launched, rank):
    """The grid and every pointer, with operands that lie apart or begin in the middle of a word."""
    seen, finished = launched(clusters=False)
    x = torch.zeros(3, 260, dtype=BF16)[:, 4:]  # rows 520 bytes apart
    values = torch.zeros(128 * 64 + 1, dtype=BF16)[1:].view(64, 128)
    metadata = torch.zeros(64, 32, dtype=torch.uint8)
    bias = torch.zeros(64, dtype=BF16)
    down = torch.zeros(rank, 256, dtype=BF16) if rank else None
    up = torch.zeros(64, rank, dtype=BF16) if rank else None
    launch = MmaLaunch(1, 1, 1, 4, 4, low_splits=int(rank > 0))
    y = decode_mma(x, values, metadata, bias, down, up, 0.5, launch)
    assert y.shape == (3, 64) and y.dtype == BF16
    ((cut, blocks, threads, argument, stream, cluster),) = seen
    tiles = -(-64 // cut.rows) + (rank > 0)
    assert (blocks, threads, stream, cluster) == (tiles, cut.threads, 7, 1)
    assert (argument.splits, argument.low_splits) == (1, int(rank > 0))
    assert (argument.tokens, argument.outputs, argument.inputs, argument.rank) == (3, 64, 256, rank)
    assert argument.x_stride == 512 and argument.x % 16 == argument.values % 16 == 0
    assert argument.metadata == metadata.data_ptr() and argument.bias == bias.data_ptr()
    assert (argument.down == 0, argument.y == 0) == (not rank, rank > 0)
    assert finished == [1] * (rank > 0)
    empty = decode_mma(x[:0], values, metadata, None, None, None, 1.0, MmaLaunch(1, 1, 1, 4, 4))
    assert empty.shape == (0, 64) and len(seen) == 1


@pytest.mark.parametrize(
    ("clusters", "splits", "rank", "blocks", "cluster", "parts"),
    [
        (True, 1, 0, 5, 1, []),
        (True, 3, 0, 15, 3, []),
        (True, 9, 0, 45, 1, [9]),  # too many for a cluster
        (True, 2, 20, 12, 2, [1]),  # two blocks of down stand in a cluster of their own
        (True, 4, 20, 24, 4, [1]),
        (False, 3, 0, 15, 1, [3]),
        (False, 2, 20, 12, 1, [2]),
    ],
)
def test_clusters(launched, clusters, splits, rank, blocks, cluster, parts):
    seen, finished = launched(clusters)
    x, values = torch.zeros(3, 256, dtype=BF16), torch.zeros(80, 128, dtype=BF16)
    metadata = torch.zeros(80, 32, dtype=torch.uint8)
    down = torch.zeros(rank, 256, dtype=BF16) if rank else None
    up = torch.zeros(80, rank, dtype=BF16) if rank else None
    launch = MmaLaunch(1, 1, 1, 4, 4, splits, low_splits=min(rank, 1))
    decode_mma(x, values, metadata, None, down, up, 1.0, launch)
    ((_, grid, threads, argument, _, together),) = seen
    assert (grid, together, finished) == (blocks, cluster, parts)
    assert threads == launch.threads and argument.splits == splits
    assert (argument.y == 0) == bool(parts)


def test_a_part_of_a_gpu_without_room_for_the_cluster_adds_in_a_second_launch(launched):
    seen, finished = launched(True, room=False)
    x, values = torch.zeros(3, 256, dtype=BF16), torch.zeros(80, 128, dtype=BF16)
    metadata = torch.zeros(80, 32, dtype=torch.uint8)
    decode_mma(x, values, metadata, None, None, None, 1.0, MmaLaunch(1, 1, 1, 4, 4, 3))
    ((_, blocks, _, _, _, cluster),) = seen
    assert (blocks, cluster, finished) == (15, 1, [3])


def test_tma_is_told_of_tiles(launched, monkeypatch):
    seen, _ = launched(True)
    maps = []

    def tensor_map(*given):
        maps.append(given)
        return bytes(128)

    monkeypatch.setattr(nvrtc, "tensor_map", tensor_map)
    x, values = torch.zeros(17, 256, dtype=BF16), torch.zeros(300, 128, dtype=BF16)
    metadata = torch.zeros(300, 32, dtype=torch.uint8)
    launch = MmaLaunch(4, 1, 4, 2, 4, 2, True, tma=True, x_first=True)
    decode_mma(x, values, metadata, None, None, None, 1.0, launch)
    ((cut, grid, threads, argument, _, together),) = seen
    assert (grid, threads, together) == (5 * 2, 32 * (4 * 2 + 1), 2)
    assert argument.splits == 2 and argument.boxes == 0
    assert argument.x_first == 1 and not cut.x_first  # one kernel does both
    assert maps == [
        (values.data_ptr(), "bf16", 128, 300, 256, 64, 64),
        (metadata.data_ptr(), "u8", 32, 300, 32, 16, 64),
        (x.data_ptr(), "bf16", 256, 17, 512, 64, 32),
    ]


@pytest.mark.parametrize(
    ("outputs", "splits", "rank", "boxes"),
    [(304, 1, 0, 1), (304, 1, 8, 1), (300, 1, 0, 0), (304, 2, 0, 0), (304, 9, 0, 0)],
)
def test_tma_writes_y_where_blocks_share_no_columns(
    launched, monkeypatch, outputs, splits, rank, boxes
):
    seen, _ = launched(True)
    maps = []
    monkeypatch.setattr(nvrtc, "tensor_map", lambda *given: maps.append(given) or bytes(128))
    x, values = torch.zeros(17, 2048, dtype=BF16), torch.zeros(outputs, 1024, dtype=BF16)
    metadata = torch.zeros(outputs, 256, dtype=torch.uint8)
    down = torch.zeros(rank, 2048, dtype=BF16) if rank else None
    up = torch.zeros(outputs, rank, dtype=BF16) if rank else None
    launch = MmaLaunch(4, 1, 4, 2, 4, splits, True, low_splits=2 * (rank > 0), tma=True)
    y = decode_mma(x, values, metadata, None, down, up, 1.0, launch)
    *ahead, (_, _, _, argument, _, _) = seen
    assert argument.boxes == boxes and all(not given.boxes for _, _, _, given, _, _ in ahead)
    of_y = (y.data_ptr(), "bf16", outputs, 17, 2 * outputs, 64, 32)
    assert (of_y in maps) == bool(boxes)


@pytest.mark.parametrize(
    "x", [torch.zeros(1, 260, dtype=BF16)[:, 4:], torch.zeros(256, 1).bfloat16().t()]
)
def test_tma_is_told_no_stride_of_a_single_token(launched, monkeypatch, x):
    launched(True)
    maps = []
    monkeypatch.setattr(nvrtc, "tensor_map", lambda *given: maps.append(given) or bytes(128))
    values, metadata = torch.zeros(64, 128, dtype=BF16), torch.zeros(64, 32, dtype=torch.uint8)
    launch = MmaLaunch.parse("1.1.4.2.8t")
    decode_mma(x, values, metadata, None, None, None, 1.0, launch)
    assert [given[1:] for given in maps if given[3] == 1][0] == ("bf16", 256, 1, 512, 64, 8)


@pytest.mark.parametrize(("tokens", "blocks"), [(17, 5), (700, 5 * 22), (4000, 132)])
def test_blocks_that_stay_are_no_more_than_multiprocessors(launched, monkeypatch, tokens, blocks):
    seen, _ = launched(True)
    monkeypatch.setattr(decoding_mma, "_multiprocessors", lambda device: 132)
    monkeypatch.setattr(nvrtc, "tensor_map", lambda *given: bytes(128))
    x, values = torch.zeros(tokens, 256, dtype=BF16), torch.zeros(304, 128, dtype=BF16)
    metadata = torch.zeros(304, 32, dtype=torch.uint8)
    launch = MmaLaunch.parse("4.1.4.1.4p")
    decode_mma(x, values, metadata, None, None, None, 1.0, launch)
    ((_, grid, _, argument, _, _),) = seen
    assert grid == blocks and argument.boxes == 1
    for outputs, name in ((304, "4.1.4.1.4p/2"), (300, "4.1.4.1.4p")):
        with pytest.raises(
            ValueError, match=rf"{name}.* cannot make {outputs} outputs: .*without p"
        ):
            given = x, values[:outputs], metadata[:outputs], None, None, None, 1.0
            decode_mma(*given, MmaLaunch.parse(name))


@pytest.mark.parametrize(
    "cut",
    ["16.1.12.1.3p", "16.1.8.1.3p", "16.2.8.1.2p", "8.1.12.1.4p", "11.1.8.1.4p", "12.1.12.1.3p"],
)
@pytest.mark.parametrize("low_splits", [0, 1])
def test_cuts_of_blocks_that_stay_compile(compiler, tmp_path, cut, low_splits):
    launch = MmaLaunch.parse(cut)._replace(low_splits=low_splits)
    path = tmp_path / "kernel.cubin"
    constants = decoding_mma.constants(launch, BF16)
    path.write_bytes(nvrtc.compile_source("decode.cu", constants, "sm_90a"))
    assert stack_of(path) == 0 and not touching_sums_in_flight(instructions_of(path))


@pytest.mark.parametrize(("room", "cluster"), [(True, 4), (False, 1)])
def test_with_tma_x_down_is_made_by_a_launch_ahead(launched, monkeypatch, room, cluster):
    """Two tiles of 64 rows of down, two parts of the tokens."""
    seen, finished = launched(True, room)
    boxes = []
    monkeypatch.setattr(
        nvrtc, "tensor_map", lambda address, *box: boxes.append((address, box)) or bytes(128)
    )
    x, values = torch.zeros(100, 512, dtype=BF16), torch.zeros(300, 256, dtype=BF16)
    metadata = torch.zeros(300, 64, dtype=torch.uint8)
    down, up = torch.zeros(72, 512, dtype=BF16), torch.zeros(300, 72, dtype=BF16)
    launch = MmaLaunch.parse("16.1.8.1.4t/1/4")
    decode_mma(x, values, metadata, None, down, up, 0.5, launch)
    (low, blocks, threads, ahead, _, together), (cut, tiles, _, argument, _, alone) = seen
    assert str(low) == "8.1.4.2.3g/1" and (blocks, threads) == (2 * 2 * cluster, 256)
    assert (together, alone, tiles) == (cluster, 1, 3)
    assert (ahead.z, ahead.splits, ahead.outputs, ahead.rank) == (boxes[4][0], cluster, 72, 72)
    assert cut.low_splits == 1 and decoding_mma.constants(cut, BF16)["ADAPTED"] == 1
    assert (argument.scale, argument.rank, argument.low_splits) == (0.5, 72, 0)
    assert argument.z == argument.partial == 0 and argument.y
    assert finished == [] and boxes[3] == (up.data_ptr(), ("bf16", 72, 300, 144, 64, 128))
    assert boxes[4][1] == ("bf16", 72, 100, 144, 64, 128)


@pytest.mark.parametrize(
    ("name", "scale", "adds"),
    [
        ("8.1.4.2.8t/1/8", -0.5, True),
        ("8.1.4.2.8t/1/8", 0.0, False),
        ("8.1.4.2.8t/1/8", 1e-30, False),
        ("8.1.4.2.8g/1/8", 1e-30, True),
        ("8.1.4.2.8t/1", 1.0, False),
    ],
)
def test_sums_are_divided_by_scales_that_allow_it(name, scale, adds):
    assert decoding_mma.adds_adapter(MmaLaunch.parse(name), scale) == adds


@pytest.mark.parametrize(("splits", "rank", "blocks"), [(1, 0, 15), (2, 0, 30), (2, 20, 36)])
def test_more_tokens_than_a_block_takes_are_shared(launched, splits, rank, blocks):
    """Three parts of 8 tokens, of five tiles of outputs and two of down."""
    seen, _ = launched(True)
    x, values = torch.zeros(17, 256, dtype=BF16), torch.zeros(80, 128, dtype=BF16)
    metadata = torch.zeros(80, 32, dtype=torch.uint8)
    down = torch.zeros(rank, 256, dtype=BF16) if rank else None
    up = torch.zeros(80, rank, dtype=BF16) if rank else None
    launch = MmaLaunch(1, 1, 1, 4, 4, splits, low_splits=min(rank, 1))
    decode_mma(x, values, metadata, None, down, up, 1.0, launch)
    ((_, grid, _, argument, _, _),) = seen
    assert (grid, argument.tokens) == (blocks, 17)


class Driver:
    """Answers in turn; keeps the names of what was asked."""

    def __init__(self, *statuses):
        self.statuses, self.asked = list(statuses), []

    def __getattr__(self, name):
        def answer(*arguments):
            self.asked.append((name, arguments))
            if name == "cuOccupancyMaxActiveClusters":
                arguments[0]._obj.value = 2 if arguments[2]._obj.attributes[0].value[0] < 4 else 0
            return self.statuses.pop(0) if self.statuses else 0

        return answer


@pytest.fixture
def kernel():
    def made(*statuses):
        one = nvrtc.Kernel.__new__(nvrtc.Kernel)
        one._driver, one._shared, one._holds, one._configs = Driver(*statuses), 4096, {}, {}
        one._function = ctypes.c_void_p(1)
        return one

    return made


def test_what_the_driver_is_asked(kernel):
    one, argument = kernel(), bytes(112)
    one(6, 128, argument, 7)
    one(6, 128, argument, 7, 3, early=True)
    assert [one.holds(128, cluster) for cluster in (2, 4, 2)] == [True, False, True]
    (plain, clustered, *asked) = one._driver.asked
    configs = []
    for name, (config, *_) in (plain, clustered):
        assert name == "cuLaunchKernelEx"
        configs.append(config._obj)
        assert [*config._obj.grid, *config._obj.block] == [6, 1, 1, 128, 1, 1]
        assert (config._obj.shared, config._obj.stream) == (4096, 7)
    assert [config.number for config in configs] == [0, 2]
    by_key = {one.id: [*one.value[:3]] for one in configs[1].attributes[:2]}
    assert by_key == {4: [3, 1, 1], 6: [1, 0, 0]}
    assert len(asked) == 2  # the third was known


def test_a_thread_without_a_context_gets_one(kernel, monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    one = kernel(201)
    one(6, 128, bytes(112), 7)
    assert chosen == [1] and len(one._driver.asked) == 2
    with pytest.raises(nvrtc.NvrtcError, match="cuLaunchKernelEx returned CUDA error 700"):
        kernel(700)(6, 128, bytes(112), 7)


def test_the_driver_s_structs():
    attribute, config = nvrtc._Attribute, nvrtc._LaunchConfig
    assert (ctypes.sizeof(attribute), attribute.value.offset) == (72, 8)
    assert (config.stream.offset, config.attributes.offset, config.number.offset) == (32, 40, 48)
    assert ctypes.sizeof(config) == 56
