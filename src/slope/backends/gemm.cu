// Y = X (W^R)^T for many tokens on the sparse tensor cores, and Z up^T with it, Z = scale X down^T.
//
// Compiled at run time by NVRTC, without headers of CUDA, for compute capability 9.0 (sm_90a) and one
// choice of the constants below:
//   NT        tiles of 8 tokens of a block
//   STAGES    tiles of 64 columns of X in flight
//   A_STAGES  tiles of 128 columns of W^R in flight
//   PART      tokens of Y that leave shared memory together
//   BUFFERS   of these that may be on their way, of a group
//   ADAPTED   1 where Z up^T is added
//   BF16      1 for bf16, 0 for fp16
//   SHAPE, SUMS, OPERANDS, METADATA, ADD, DENSE_ADD  operands of wgmma, made for NT with the constants
//   HALF_SHAPE, HALF_SUMS, HALF_OPERANDS, HALF_ADD   those of half as many tokens
//
// A block owns ROWS outputs of TOKENS tokens, which two groups of four warps share by the outputs, and
// walks over the inputs in steps of 64 columns. What the tensor cores read out of shared memory of X
// takes all the time that they need to multiply, so X is wide: W^R is then read once for 256 tokens. Two
// blocks of a cluster have the same tokens: each copies half of X into both. One warp copies; a group
// leaves a step when the next one has begun. A block makes several tiles one after another, and Y of one
// leaves it rounded, in parts, while the tensor cores are at work on the first steps of the next.
//
// Z is given, or made by clusters of the same launch, 64 ranks of 256 tokens a block, each block for itself;
// a tile adds it last, and the copying warp alone waits for it. Which clusters make Z is decided by the order
// in which they begin, and they end then: when one waits, all that it waits for have begun and wait for no
// other, however few there is room for.
//
// W^R, or W^{R,C} transposed for the input gradient, is cuSPARSELt's operand: kept values row by row, then
// metadata in tiles of 64 rows by 64 columns.

#include "tiles.cuh"

constexpr int GROUPS = 2, BLOCKS = 2;  // of a block, of a cluster
constexpr int TOKENS = 8 * NT, ROWS = 64 * GROUPS, THREADS = 128 * GROUPS;
constexpr int X_BYTES = 128 * TOKENS, A_BYTES = 128 * ROWS;
constexpr int PLACES = 512;  // bytes of a tile of metadata
constexpr int A_STAGE = A_BYTES + 2 * GROUPS * PLACES;
constexpr int PARTS = TOKENS / PART, Y_PART = 128 * PART;
constexpr int RANKS = 64, DOWN_BYTES = 128 * RANKS;  // of Z that a block makes together; of 64 columns of down
constexpr int CORNERS = 3;
constexpr int A_AT = STAGES * X_BYTES, Y_AT = A_AT + A_STAGES * A_STAGE;
constexpr int BARRIERS = Y_AT + GROUPS * BUFFERS * Y_PART;  // begin there
static_assert(TOKENS % PART == 0 && PART % 16 == 0, "a part of Y has whole tiles of 16 tokens");
static_assert(A_STAGE % 1024 == 0 && X_BYTES / BLOCKS % 1024 == 0, "eights of rows are swapped");
static_assert(PARTS % 2 == 0, "parts of Y go out beside pairs of steps");

struct Arguments {
    Map values_map;  // boxes of 64 x ROWS
    Map x_map;       // boxes of 64 x TOKENS / BLOCKS
    Map y_map;       // boxes of 64 x PART
    Map up_map;      // boxes of 64 x ROWS
    Map z_map;       // boxes of 64 x TOKENS / BLOCKS
    Map down_map;    // boxes of 64 x RANKS
    Map z_out_map;   // boxes of 64 x PART
    const char* places;  // metadata
    const u16* bias;     // (outputs), or null
    u32* made;           // null if Z is given; else zeros: how many clusters have begun, then how many parts of Z
                         // there are of each TOKENS tokens
    int tokens, outputs, inputs, rank;
    int band;  // pairs of tiles of outputs whose tokens come one after another
    float scale;  // of the adapter, where Z is made
    // Where up is blocks on a diagonal: at which output and rank each but the first begins, or beyond all.
    int corner_outputs[CORNERS], corner_ranks[CORNERS];
};

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

// Of half the tokens.
__device__ __forceinline__ void multiply_half(float (&d)[NT][4], u64 a, u64 b, int add) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " HALF_ADD ", 0;\n"
                 "wgmma.mma_async.sync.aligned." HALF_SHAPE "k16.f32." KIND "." KIND " " HALF_OPERANDS
                 ", p, 1, 1, 0, 0;\n}"
                 : HALF_SUMS
                 : "l"(a), "l"(b), "r"(add));
}

// The compiler may not move what uses the sums to before this place.
__device__ __forceinline__ void hold(float (&d)[NT][4]) { asm volatile("" : SUMS); }

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

// How many clusters have begun before this one, said by its first block to both.
__device__ __forceinline__ void take_number(u32* begun, u32 to) {
    u32 number, at;
    asm volatile("atom.relaxed.gpu.global.add.u32 %0, [%1], 1;" : "=r"(number) : "l"(begun) : "memory");
    for (u32 block = 0; block < BLOCKS; ++block) {
        asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(at) : "r"(to), "r"(block));
        asm volatile("st.shared::cluster.u32 [%0], %1;" ::"r"(at), "r"(number) : "memory");
    }
}

// Z that TMA has written and this thread has seen complete is there for who reads the count.
__device__ __forceinline__ void announce(u32* count) {
    asm volatile("fence.proxy.async;\nred.release.gpu.global.add.u32 [%0], 1;" ::"l"(count) : "memory");
}

__device__ __forceinline__ void wait_for_count(const u32* count, u32 wanted) {
    u32 there;
    do asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(there) : "l"(count) : "memory");
    while (there < wanted);
    asm volatile("fence.proxy.async;" ::: "memory");
}

__device__ __forceinline__ void cluster_meet() {
    asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
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

// Where the tiles of a step are, and their barriers.
template <int TILES, int BYTES>
struct Ring {
    u32 tile = 0, barrier = 0, parity = 0;
    __device__ __forceinline__ void next() {
        const bool last = barrier == 8 * (TILES - 1);
        tile = last ? 0 : tile + BYTES;
        barrier = last ? 0 : barrier + 8;
        parity ^= last;
    }
};

struct Place {
    int row, token;
};

struct Ranks {
    int first, count;
};

// Those that are not zeros in up, of the outputs of the pair of tiles that one of these rows belongs to.
__device__ __forceinline__ Ranks ranks_of(const Arguments& arg, int row) {
    const int top = row / (BLOCKS * ROWS) * (BLOCKS * ROWS);
    int first = 0, end = arg.rank;
    for (int i = 0; i < CORNERS; ++i) {
        if (arg.corner_outputs[i] <= top) first = arg.corner_ranks[i];
        if (arg.corner_outputs[i] >= top + BLOCKS * ROWS) end = min(end, arg.corner_ranks[i]);
    }
    return {first, end - first};
}

// Tiles of a band of outputs come token by token, so that both operands of those at work stay in the cache.
__device__ __forceinline__ Place place_of(const Arguments& arg, int number, int pairs, int parts, int block) {
    const int first = number / (arg.band * parts) * arg.band, within = number - first * parts;
    const int height = min(arg.band, pairs - first);
    return {(BLOCKS * (first + within % height) + block) * ROWS, within / height * TOKENS};
}

extern "C" __global__ void __launch_bounds__(THREADS + 128, 1)
    slope_gemm(const __grid_constant__ Arguments arg) {
    extern __shared__ __align__(1024) char memory[];
    const u32 base = shared_address(memory), full = base + BARRIERS, empty = full + 8 * STAGES;
    const u32 a_full = empty + 8 * STAGES, a_empty = a_full + 8 * A_STAGES;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int block = blockIdx.x % BLOCKS;
    const int pairs = (arg.outputs + BLOCKS * ROWS - 1) / (BLOCKS * ROWS);
    const int parts = (arg.tokens + TOKENS - 1) / TOKENS, tiles = pairs * parts;
    const int steps = arg.inputs / 64, making_ranks = ADAPTED ? (arg.rank + RANKS - 1) / RANKS : 0;
    // Of a cluster, each for the tokens of two tiles.
    const int makings = ADAPTED && arg.made ? making_ranks * ((parts + BLOCKS - 1) / BLOCKS) : 0;
    const int clusters = gridDim.x / BLOCKS - makings;  // that make tiles
    const u32 turn = a_empty + 8 * A_STAGES;
    asm volatile("griddepcontrol.launch_dependents;");
    if (threadIdx.x == 0) {
        auto begin = [](u32 barrier, int arrivals) {
            asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals));
        };
        for (int s = 0; s < STAGES; ++s) begin(full + 8 * s, 1), begin(empty + 8 * s, BLOCKS * 4 * GROUPS);
        for (int s = 0; s < A_STAGES; ++s) begin(a_full + 8 * s, 1), begin(a_empty + 8 * s, 4 * GROUPS);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
#if ADAPTED
    int number = blockIdx.x / BLOCKS;
    if (makings) {
        cluster_meet();  // the other block has begun, and may be written to
        asm volatile("griddepcontrol.wait;" ::: "memory");
        if (block == 0 && threadIdx.x == 0) take_number(arg.made, turn);
    }
    cluster_meet();
    if (makings) asm volatile("ld.shared.u32 %0, [%1];" : "=r"(number) : "r"(turn) : "memory");
    const bool makes = number < makings;
    // Tokens of this block, and the first of the ranks.
    const int making_token = makes ? (number / making_ranks * BLOCKS + block) * TOKENS : 0;
    const int making_rank = makes ? number % making_ranks * RANKS : 0;
    number = makes ? tiles : number - makings;
    auto first_tile = [&]() { return number; };
#else
    auto first_tile = []() -> int { return blockIdx.x / BLOCKS; };
    cluster_meet();
#endif
    asm volatile("griddepcontrol.wait;" ::: "memory");
    Ring<STAGES, X_BYTES> x;
    Ring<A_STAGES, A_STAGE> a;
    if (warp >= THREADS / 32) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
        const bool copies = warp == THREADS / 32 && lane == 0;
#if ADAPTED
        for (int step = 0; copies && makes && step < steps; ++step) {
            if (step % 2 == 0) {
                const u32 to = base + A_AT + a.tile, done = a_full + a.barrier;
                const bool pair = step + 1 < steps;
                wait_for(a_empty + a.barrier, a.parity ^ 1);
                expect(done, pair ? 2 * DOWN_BYTES : DOWN_BYTES);
                copy_box(to, arg.down_map, 64 * step, making_rank, done);
                if (pair) copy_box(to + DOWN_BYTES, arg.down_map, 64 * (step + 1), making_rank, done);
                a.next();
            }
            wait_for(empty + x.barrier, x.parity ^ 1);
            expect(full + x.barrier, X_BYTES);
            for (int i = 0; i < BLOCKS; ++i)
                copy_box(base + x.tile + i * (X_BYTES / BLOCKS), arg.x_map, 64 * step,
                         making_token + i * (TOKENS / BLOCKS), full + x.barrier);
            x.next();
        }
#endif
        for (int number = first_tile(); copies && number < tiles; number += clusters) {
            const Place tile = place_of(arg, number, pairs, parts, block);
            const int own = tile.token + block * (TOKENS / BLOCKS);
            const int there = min(GROUPS, max(0, (arg.outputs - tile.row + 63) / 64));
            const char* places = arg.places + static_cast<long long>(tile.row / 64) * steps * PLACES;
            // Beside W^R the metadata of so many steps, none beside up.
            auto copy_a = [&](const Map& map, int column, int metadata) {
                const u32 to = base + A_AT + a.tile, done = a_full + a.barrier;
                wait_for(a_empty + a.barrier, a.parity ^ 1);
                expect(done, A_BYTES + there * metadata * PLACES);
                copy_box(to, map, column, tile.row, done);
                for (int g = 0; metadata && g < there; ++g)
                    copy_bytes(to + A_BYTES + g * (2 * PLACES),
                               places + (static_cast<long long>(g) * steps + column / 32) * PLACES,
                               metadata * PLACES, done);
                a.next();
            };
            auto copy_x = [&](const Map& map, int column) {
                wait_for(empty + x.barrier, x.parity ^ 1);
                expect(full + x.barrier, X_BYTES);
                copy_to_both(base + x.tile + block * (X_BYTES / BLOCKS), map, column, own, full + x.barrier);
                x.next();
            };
            for (int step = 0; step < steps; ++step) {
                if (step % 2 == 0) copy_a(arg.values_map, 32 * step, min(2, steps - step));
                copy_x(arg.x_map, 64 * step);
            }
#if ADAPTED
            const Ranks ranks = ranks_of(arg, tile.row);
            for (int done = 0; done < ranks.count; done += RANKS) {
                copy_a(arg.up_map, ranks.first + done, 0);
                if (makings && done == 0)
                    wait_for_count(arg.made + 1 + tile.token / TOKENS, GROUPS * making_ranks);
                copy_x(arg.z_map, ranks.first + done);
            }
#endif
        }
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
        const int group = warp / 4;
        const bool speaks = threadIdx.x % 128 == 0;
        const u64 x_tile = descriptor(base), a_tile = descriptor(base + A_AT + group * (64 * 128));
        const u32 own_places = base + A_AT + A_BYTES + group * (2 * PLACES);
        const u32 y = base + Y_AT + group * (BUFFERS * Y_PART);
        const u32 corner = 128 * (8 * (lane / 16) + lane % 8) +
                           16 * ((2 * (warp % 4) + lane / 8 % 2) ^ lane % 8);
        Ring<STAGES, X_BYTES> x_left;
        Ring<A_STAGES, A_STAGE> a_left;
        auto leave_x = [&]() {
            if (lane < BLOCKS) arrive_at(empty + x_left.barrier, lane);
            x_left.next();
        };
        auto leave_a = [&]() {
            if (lane == 0) arrive(a_empty + a_left.barrier);
            a_left.next();
        };
        float sums[NT][4];
        u32 rounded[NT][2];
        Place made = {-1, 0};  // the tile of what is rounded, none before the first
        int buffer = 0;
        auto give = [&](const Map& map, int part, int column, int token) {
            const u32 to = y + buffer * Y_PART;
            if (++buffer == BUFFERS) buffer = 0;
            if (speaks) asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(BUFFERS - 1) : "memory");
            asm volatile("bar.sync %0, 128;" ::"r"(1 + group) : "memory");
#pragma unroll
            for (int n = 0; n < PART / 8; n += 2) {
                const auto& tiles_of = rounded[part * (PART / 8) + n];
                const auto& next_to_it = rounded[part * (PART / 8) + n + 1];
                turn4(to + corner + 1024 * n, tiles_of[0], tiles_of[1], next_to_it[0], next_to_it[1]);
            }
            asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
            asm volatile("bar.sync %0, 128;" ::"r"(1 + group) : "memory");
            if (!speaks) return;
            return_box(map, column, token + PART * part, to);
            asm volatile("cp.async.bulk.commit_group;");
        };
        auto give_y = [&](int part) { give(arg.y_map, part, made.row + 64 * group, made.token); };
#if ADAPTED
        auto make = [&](int step, int second) {
            const u64 down = further(descriptor(base + A_AT), a.tile + second * DOWN_BYTES);
            const u64 at = further(x_tile, x.tile + group * (X_BYTES / GROUPS));
            if (!second) wait_for(a_full + a.barrier, a.parity);
            wait_for(full + x.barrier, x.parity);
            asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
            for (int k = 0; k < 4; ++k) multiply_half(sums, further(down, 32 * k), further(at, 32 * k), step + k > 0);
            asm volatile("wgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 1;" ::: "memory");
            if (step) leave_x();
            if (step && !second) leave_a();
            x.next();
            if (second) a.next();
        };
        if (makes) {
            for (int step = 0; step < steps; step += 2) {
                make(step, 0);
                if (step + 1 < steps) make(step + 1, 1);
            }
            asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
            hold(sums);
#pragma unroll
            for (int n = 0; n < NT / GROUPS; ++n)
#pragma unroll
                for (int i = 0; i < 2; ++i)
                    rounded[n][i] = pair_of(arg.scale * sums[n][2 * i], arg.scale * sums[n][2 * i + 1]);
#pragma unroll
            for (int part = 0; part < PARTS / GROUPS; ++part)
                give(arg.z_out_map, part, making_rank, making_token + group * (TOKENS / GROUPS));
            if (speaks) {
                asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
                announce(arg.made + 1 + making_token / TOKENS);
            }
        }
#endif
        for (int number = first_tile(); number < tiles; number += clusters) {
            const Place tile = place_of(arg, number, pairs, parts, block);
            const int own = tile.row + 16 * warp + lane / 4;
            float bias[2] = {};
            for (int i = 0; i < 2; ++i)
                if (arg.bias && own + 8 * i < arg.outputs) {
                    u16 bits;
                    asm volatile("ld.global.cg.u16 %0, [%1];" : "=h"(bits) : "l"(arg.bias + own + 8 * i));
                    bias[i] = to_float(bits);
                }
            u32 even = 0, odd = 0;
            auto prepare = [&](u32& places, int second) {
                if (!second) wait_for(a_full + a.barrier, a.parity);
                places = places_of(own_places + a.tile + second * PLACES);
                wait_for(full + x.barrier, x.parity);
            };
            // A step is left before the next is waited for: what takes its place is on its way the sooner.
            auto add = [&](u32& places, u32& other, int step, int second, int part) {
                const u64 w = further(a_tile, a.tile + 64 * second), at = further(x_tile, x.tile);
                asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
                multiply_sparse<0>(sums, w, at, places, step > 0);
                multiply_sparse<1>(sums, further(w, 32), further(at, 64), places, 1);
                asm volatile("wgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 1;" ::: "memory");
                asm volatile("" : "+r"(other));  // which the tensor cores have read now
                if (step) leave_x();
                if (step && !second) leave_a();
                if (part >= 0 && made.row >= 0) give_y(part);
                x.next();
                if (second) a.next();
                if (step + 1 < steps) prepare(other, !second);
            };
            prepare(even, 0);
#pragma unroll
            for (int part = 0; part < PARTS; part += 2) {
                add(even, odd, part, 0, part);
                add(odd, even, part + 1, 1, part + 1);
            }
            for (int step = PARTS; step < steps; step += 2) {
                add(even, odd, step, 0, -1);
                if (step + 1 < steps) add(odd, even, step + 1, 1, -1);
            }
#if ADAPTED
            if (steps % 2) a.next();
            for (int left = ranks_of(arg, tile.row).count; left > 0; left -= RANKS) {
                wait_for(a_full + a.barrier, a.parity);
                wait_for(full + x.barrier, x.parity);
                const u64 up = further(a_tile, a.tile), z = further(x_tile, x.tile);
                // Sums of sparse products are still in flight: those of dense ones have the same registers.
                asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
                auto multiply = [&](int k) { multiply_dense(sums, further(up, 32 * k), further(z, 32 * k), 1); };
                if (left >= RANKS) {
#pragma unroll
                    for (int k = 0; k < 4; ++k) multiply(k);
                } else {
                    for (int k = 0; 16 * k < left; ++k) multiply(k);
                }
                asm volatile("wgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 1;" ::: "memory");
                leave_x(), leave_a();
                a.next(), x.next();
            }
#endif
            asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
            asm volatile("" : "+r"(even), "+r"(odd));
            hold(sums);
            leave_x(), leave_a();
            if (!ADAPTED && steps % 2) a.next();
#pragma unroll
            for (int n = 0; n < NT; ++n)
#pragma unroll
                for (int i = 0; i < 2; ++i)
                    rounded[n][i] = pair_of(sums[n][2 * i] + bias[i], sums[n][2 * i + 1] + bias[i]);
            made = tile;
        }
#pragma unroll
        for (int part = 0; part < PARTS; ++part)
            if (!ADAPTED || made.row >= 0) give_y(part);  // some make Z alone
        if (speaks) asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
    }
    __syncwarp();
    cluster_meet();  // until the other has arrived at the last barrier of this one
}
