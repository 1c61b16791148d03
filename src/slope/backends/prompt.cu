// Y = X (W^R)^T for many tokens on the sparse tensor cores, and scale Z up^T with it.
//
// Compiled at run time by NVRTC, without headers of CUDA, for compute capability 9.0 (sm_90a) and one
// choice of the constants below:
//   NT       tiles of 8 tokens of a block
//   STAGES   steps in flight
//   BUFFERS  parts of Y of a group that may be on their way out of shared memory
//   ADAPTED  1 where scale Z up^T is added
//   BF16     1 for bf16, 0 for fp16
//   SHAPE, SUMS, OPERANDS, METADATA  operands of wgmma, made for NT together with the constants
//
// A block owns ROWS outputs of TOKENS tokens, which two groups of four warps share by the outputs, and
// walks over the inputs in steps of 64 columns. What the tensor cores read out of shared memory for X
// takes all the time that they need to multiply, so X is wide: W^R is then read once for 256 tokens. Two
// blocks of a cluster have the same tokens: each copies half of X into both. One warp copies, groups
// multiply and leave a step when the next one has begun. A block stays for several tiles, and copies the
// next while it writes one.
//
// W^R is cuSPARSELt's operand: kept values row by row, then metadata in tiles of 64 rows by 64 columns of
// 512 bytes.

#include "tiles.cuh"

constexpr int BLOCKS = 2;  // of a cluster
constexpr int TOKENS = 8 * NT, ROWS = 64 * GROUPS, THREADS = 128 * GROUPS;
constexpr int X_BYTES = 128 * TOKENS, A_BYTES = 64 * ROWS, TILE_PLACES = 512;
constexpr int STAGE = (X_BYTES + A_BYTES + GROUPS * TILE_PLACES + 1023) / 1024 * 1024;
constexpr int PART = 64, PARTS = TOKENS / PART;  // tokens of a part of Y
constexpr int Y_AT = STAGES * STAGE, Y_PART = 128 * PART;
constexpr int BARRIERS = Y_AT + GROUPS * BUFFERS * Y_PART;  // begin there
static_assert(STAGE % 1024 == 0 && TOKENS % PART == 0, "tiles of X and Y begin at swapped eights of rows");

struct Arguments {
    Map values_map;  // boxes of 32 x ROWS
    Map x_map;       // boxes of 64 x TOKENS / BLOCKS
    Map y_map;       // boxes of 64 x PART
    Map up_map;      // boxes of 32 x ROWS
    Map z_map;       // boxes of 32 x TOKENS / BLOCKS
    const char* places;  // metadata
    const u16* bias;     // (outputs), or null
    int tokens, outputs, inputs, rank;
    int band;  // pairs of tiles of outputs whose tokens come one after another
    float scale;
};

// The same of a tile of 64 bytes beside each other.
__device__ __forceinline__ u64 narrow_descriptor(u32 at) {
    return static_cast<u64>((at & 0x3ffff) >> 4) | 1ull << 16 | 32ull << 32 | 2ull << 62;
}

// That many bytes further.
__device__ __forceinline__ u64 further(u64 descriptor, u32 bytes) {
    return descriptor & 0xffffffff00000000 | static_cast<u32>(descriptor) + bytes / 16;
}

template <int PAIR>
__device__ __forceinline__ void multiply_sparse(float (&d)[NT][4], u64 a, u64 b, u32 places, int add) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " ADD ", 0;\n"
                 "wgmma.mma_async.sp.sync.aligned." SHAPE "k32.f32." KIND "." KIND " " OPERANDS
                 ", " METADATA ", p, 1, 1, 0, 0;\n}"
                 : SUMS
                 : "l"(a), "l"(b), "r"(places), "n"(PAIR), "r"(add));
}

__device__ __forceinline__ void multiply_dense(float (&d)[NT][4], u64 a, u64 b, int add) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " DENSE_ADD ", 0;\n"
                 "wgmma.mma_async.sync.aligned." SHAPE "k16.f32." KIND "." KIND " " OPERANDS
                 ", p, 1, 1, 0, 0;\n}"
                 : SUMS
                 : "l"(a), "l"(b), "r"(add));
}

// A box into the same place of both blocks, whose barriers count it.
__device__ __forceinline__ void copy_to_both(u32 to, const Map& map, int column, int row, u32 barrier) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
                 ".multicast::cluster [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(to), "l"(&map), "r"(column),
                 "r"(row), "r"(barrier), "h"(static_cast<u16>((1 << BLOCKS) - 1))
                 : "memory");
}

__device__ __forceinline__ void copy_bytes(u32 to, const char* from, u32 bytes, u32 barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
                 "l"(from), "r"(bytes), "r"(barrier)
                 : "memory");
}

// At the barrier of that block of the cluster.
__device__ __forceinline__ void arrive_at(u32 barrier, u32 block) {
    asm volatile("{\n.reg .b32 at;\nmapa.shared::cluster.u32 at, %0, %1;\n"
                 "mbarrier.arrive.shared::cluster.b64 _, [at];\n}" ::"r"(barrier), "r"(block)
                 : "memory");
}

__device__ __forceinline__ void cluster_meet() {
    asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}

__device__ __forceinline__ void turn4(u32 to, const u32 (&tiles)[4]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(to),
                 "r"(tiles[0]), "r"(tiles[1]), "r"(tiles[2]), "r"(tiles[3])
                 : "memory");
}

// This lane's metadata of a step. Bytes are group 0 of rows g and g + 8, group 4 of these, group 1 and so on:
// a lane wants four groups of row g below, of row g + 8 above. The first two lanes of four have those of the
// first 32 columns, the others those of the rest.
__device__ __forceinline__ u32 places_of(u32 tile) {
    const u32 lane = threadIdx.x % 32, at = tile + 256 * (lane / 2 % 2) + threadIdx.x / 32 % 4 * 64 + lane / 4 * 8;
    u32 first, second;
    asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(first), "=r"(second) : "r"(at));
    const u32 bytes = __byte_perm(first, second, lane % 2 ? 0x7531 : 0x6420);
    // Nibbles of a row together: those at even places, then those at odd ones.
    u32 low = bytes & 0x0f0f0f0f, high = bytes >> 4 & 0x0f0f0f0f;
    low |= low >> 4, high |= high >> 4;
    return __byte_perm(low, high, 0x6420);
}

// Where a step's tiles are, and its barriers.
struct Stage {
    u32 tiles = 0, barrier = 0, parity = 0;
    __device__ __forceinline__ void next() {
        const bool last = barrier == 8 * (STAGES - 1);
        tiles = last ? 0 : tiles + STAGE;
        barrier = last ? 0 : barrier + 8;
        parity ^= last;
    }
};

struct Place {
    int row, token;
};

// Tiles of a band of outputs come token by token, so that both operands of those at work stay in the cache.
__device__ __forceinline__ Place place_of(const Arguments& arg, int number, int pairs, int parts, int block) {
    const int first = number / (arg.band * parts) * arg.band, within = number - first * parts;
    const int height = min(arg.band, pairs - first);
    return {(BLOCKS * (first + within % height) + block) * ROWS, within / height * TOKENS};
}

extern "C" __global__ void __launch_bounds__(THREADS + 128, 1)
    slope_prompt(const __grid_constant__ Arguments arg) {
    extern __shared__ __align__(1024) char memory[];
    const u32 base = shared_address(memory), full = base + BARRIERS, empty = full + 8 * STAGES;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int block = blockIdx.x % BLOCKS, clusters = gridDim.x / BLOCKS;
    const int pairs = (arg.outputs + BLOCKS * ROWS - 1) / (BLOCKS * ROWS);
    const int parts = (arg.tokens + TOKENS - 1) / TOKENS, tiles = pairs * parts;
    const int steps = arg.inputs / 64, before = ADAPTED ? (arg.rank + 31) / 32 : 0;
    asm volatile("griddepcontrol.launch_dependents;");
    if (threadIdx.x == 0) {
        for (int s = 0; s < STAGES; ++s) {
            asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(full + 8 * s));
            asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(empty + 8 * s),
                         "n"(BLOCKS * 4 * GROUPS));
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    cluster_meet();
    asm volatile("griddepcontrol.wait;" ::: "memory");
    Stage stage;
    if (warp >= THREADS / 32) {
        if (GROUPS == 3) asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
        if (warp == THREADS / 32 && lane == 0) {
            const int width = arg.inputs / 64;
            for (int number = blockIdx.x / BLOCKS; number < tiles; number += clusters) {
                const Place tile = place_of(arg, number, pairs, parts, block);
                const int own = tile.token + block * (TOKENS / BLOCKS);
                const int there = min(GROUPS, max(0, (arg.outputs - tile.row + 63) / 64));
                const char* places = arg.places + static_cast<long long>(tile.row / 64) * width * TILE_PLACES;
                for (int step = -before; step < steps; ++step, stage.next()) {
                    const u32 x = base + stage.tiles, a = x + X_BYTES, done = full + stage.barrier;
                    wait_for(empty + stage.barrier, stage.parity ^ 1);
                    if (ADAPTED && step < 0) {
                        const int column = 32 * (step + before);
                        expect(done, X_BYTES / 2 + A_BYTES);
                        copy_to_both(x + block * (X_BYTES / 2 / BLOCKS), arg.z_map, column, own, done);
                        copy_box(a, arg.up_map, column, tile.row, done);
                        continue;
                    }
                    expect(done, X_BYTES + A_BYTES + there * TILE_PLACES);
                    copy_to_both(x + block * (X_BYTES / BLOCKS), arg.x_map, 64 * step, own, done);
                    copy_box(a, arg.values_map, 32 * step, tile.row, done);
                    for (int g = 0; g < there; ++g)
                        copy_bytes(a + A_BYTES + g * TILE_PLACES,
                                   places + (static_cast<long long>(g) * width + step) * TILE_PLACES, TILE_PLACES, done);
                }
            }
        }
    } else {
        if (GROUPS == 3) asm volatile("setmaxnreg.inc.sync.aligned.u32 160;");
        const int group = warp / 4;
        const bool speaks = threadIdx.x % 128 == 0;
        const u32 own_a = base + X_BYTES + group * (64 * 64);
        const u32 own_places = base + X_BYTES + A_BYTES + group * TILE_PLACES;
        const u64 x_tile = descriptor(base), z_tile = narrow_descriptor(base), a_tile = narrow_descriptor(own_a);
        const u32 y = base + Y_AT + group * (BUFFERS * Y_PART);
        const u32 corner = 128 * (8 * (lane / 16) + lane % 8) +
                           16 * ((2 * (warp % 4) + lane / 8 % 2) ^ lane % 8);
        int buffer = 0;
        float sums[NT][4];
        Stage last;
        auto leave = [&]() {
            if (lane < BLOCKS) arrive_at(empty + last.barrier, lane);
            last.next();
        };
        for (int number = blockIdx.x / BLOCKS; number < tiles; number += clusters) {
            const Place tile = place_of(arg, number, pairs, parts, block);
            const int own = tile.row + 16 * warp + lane / 4;
            float bias[2] = {};
            for (int i = 0; i < 2; ++i)
                if (arg.bias && own + 8 * i < arg.outputs) {
                    u16 bits;
                    asm volatile("ld.global.cg.u16 %0, [%1];" : "=h"(bits) : "l"(arg.bias + own + 8 * i));
                    bias[i] = to_float(bits);
                }
            if (ADAPTED) {
                for (int step = 0; step < before; ++step, stage.next()) {
                    const u64 a = further(a_tile, stage.tiles), z = further(z_tile, stage.tiles);
                    wait_for(full + stage.barrier, stage.parity);
                    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
                    multiply_dense(sums, a, z, step);
                    multiply_dense(sums, further(a, 32), further(z, 32), 1);
                    asm volatile("wgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 0;" ::: "memory");
                    leave();
                }
#pragma unroll
                for (int n = 0; n < NT; ++n)
#pragma unroll
                    for (int i = 0; i < 4; ++i) sums[n][i] *= arg.scale;
            }
            // The tensor cores read the registers of two steps while those of the next are made ready.
            u32 first = 0, second = 0, third = 0;
            auto prepare = [&](u32& places) {
                wait_for(full + stage.barrier, stage.parity);
                places = places_of(own_places + stage.tiles);
            };
            auto add = [&](u32& places, u32& next, u32& before_it, int step) {
                const u64 a = further(a_tile, stage.tiles), x = further(x_tile, stage.tiles);
                asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
                multiply_sparse<0>(sums, a, x, places, ADAPTED || step);
                multiply_sparse<1>(sums, further(a, 32), further(x, 64), places, 1);
                asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
                stage.next();
                if (step + 1 < steps) prepare(next);
                asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
                asm volatile("" : "+r"(before_it));
                if (step) leave();
            };
            prepare(first);
            for (int step = 0;; step += 3) {
                add(first, second, third, step);
                if (step + 1 >= steps) break;
                add(second, third, first, step + 1);
                if (step + 2 >= steps) break;
                add(third, first, second, step + 2);
                if (step + 3 >= steps) break;
            }
            asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
            asm volatile("" : "+r"(first), "+r"(second), "+r"(third));
            leave();
#pragma unroll
            for (int part = 0; part < PARTS; ++part) {
                const u32 to = y + buffer * Y_PART;
                if (++buffer == BUFFERS) buffer = 0;
                if (speaks) asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(BUFFERS - 1) : "memory");
                asm volatile("bar.sync %0, 128;" ::"r"(1 + group) : "memory");
#pragma unroll
                for (int n = 0; n < PART / 8; n += 2) {
                    u32 turned[4];
#pragma unroll
                    for (int j = 0; j < 4; ++j) {
                        const float(&sum)[4] = sums[part * (PART / 8) + n + j / 2];
                        turned[j] = pair_of(sum[2 * (j % 2)] + bias[j % 2], sum[2 * (j % 2) + 1] + bias[j % 2]);
                    }
                    turn4(to + corner + 1024 * n, turned);
                }
                asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
                asm volatile("bar.sync %0, 128;" ::"r"(1 + group) : "memory");
                if (speaks) {
                    return_box(arg.y_map, tile.row + 64 * group, tile.token + PART * part, to);
                    asm volatile("cp.async.bulk.commit_group;");
                }
            }
        }
        if (speaks) asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
    }
    __syncwarp();
    cluster_meet();  // a block that is gone cannot be copied to
}
