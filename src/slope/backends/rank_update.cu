// Y += scale Z up^T in place, where Y is so large that its bytes decide: each is read and written once.
//
// Compiled at run time by NVRTC, without headers of CUDA, for compute capability 9.0 (sm_90a) and one
// choice of the constants below:
//   CHUNKS  of 64 ranks; the last may be less
//   Y_STAGES, Z_STAGES  tiles in flight
//   BF16    1 for bf16, 0 for fp16
//   SUMS, OPERANDS  operands of 32 sums, and the names of these and of the places of Z and up
//
// A block owns a strip of OUTPUTS columns of Y and some tiles of TOKENS rows one after another. Its part
// of up stays in shared memory. One warp asks the tensor memory accelerator for tiles of Y, another for
// those of Z; two groups of four warps, each for 64 columns, multiply and add to the tile of Y where it
// stands, from where the accelerator takes it back. All tiles are columns of 128 bytes, each swapped by
// eights of rows, as wgmma wants Z and up; so a tile of Y meets no bank twice.

#include "tiles.cuh"

constexpr int TOKENS = 64, GROUPS = 2, OUTPUTS = 64 * GROUPS, THREADS = 128 * GROUPS;
constexpr int COLUMN = 128 * TOKENS;  // bytes of 64 columns of a tile
constexpr int Y_BYTES = GROUPS * COLUMN, Z_BYTES = CHUNKS * COLUMN, UP_BYTES = CHUNKS * 128 * OUTPUTS;
constexpr int Z_AT = UP_BYTES, Y_AT = Z_AT + Z_STAGES * Z_BYTES;
constexpr int BARRIERS = Y_AT + Y_STAGES * Y_BYTES;  // begin there
static_assert(Y_STAGES > 2, "a tile of Y is given back one tile later");

struct Arguments {
    Map y_map;   // boxes of 64 x TOKENS
    Map z_map;   // likewise
    Map up_map;  // boxes of 64 x OUTPUTS
    int strips;  // of Y
    int tiles;   // of TOKENS rows of Y
    int share;   // of these, of a block
    float scale;
};

__device__ __forceinline__ void multiply(float (&d)[32], u64 z, u64 up) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32." KIND "." KIND " " OPERANDS
                 ", 1, 1, 1, 0, 0;"
                 : SUMS
                 : "l"(z), "l"(up));
}

__device__ __forceinline__ void add_to(u32 at, float low, float high, float scale) {
    u32 pair;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(pair) : "r"(at));
    pair = pair_of(to_float(static_cast<u16>(pair)) + scale * low,
                   to_float(static_cast<u16>(pair >> 16)) + scale * high);
    asm volatile("st.shared.u32 [%0], %1;" ::"r"(at), "r"(pair) : "memory");
}

// Places of a number of tiles, and what tells when one is full and when LEAVING have left it, so that it
// may be filled.
template <int STAGES, int BYTES, int LEAVING>
struct Ring {
    u32 tiles, full, empty;

    __device__ __forceinline__ void begin() const {
        for (int s = 0; s < STAGES; ++s) {
            asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(full + 8 * s));
            asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(empty + 8 * s), "n"(LEAVING));
        }
    }
    __device__ __forceinline__ u32 tile(int number) const { return tiles + number % STAGES * BYTES; }
    __device__ __forceinline__ void wait_full(int number) const {
        wait_for(full + 8 * (number % STAGES), number / STAGES & 1);
    }
    __device__ __forceinline__ void leave(int number) const { arrive(empty + 8 * (number % STAGES)); }
    // The boxes of a tile from a column on, once its place is empty.
    __device__ __forceinline__ void fetch(const Map& map, int number, int column, int row) const {
        const u32 barrier = full + 8 * (number % STAGES);
        wait_for(empty + 8 * (number % STAGES), (number / STAGES & 1) ^ 1);
        expect(barrier, BYTES);
        for (int box = 0; box < BYTES / COLUMN; ++box)
            copy_box(tile(number) + box * COLUMN, map, column + 64 * box, row, barrier);
    }
};

extern "C" __global__ void __launch_bounds__(THREADS + 64, 1)
    slope_rank_update(const __grid_constant__ Arguments arg) {
    extern __shared__ __align__(1024) char memory[];
    const u32 up = shared_address(memory), barriers = up + BARRIERS;
    const Ring<Y_STAGES, Y_BYTES, GROUPS> y{up + Y_AT, barriers, barriers + 8 * Y_STAGES};
    const Ring<Z_STAGES, Z_BYTES, 4 * GROUPS> z{up + Z_AT, y.empty + 8 * Y_STAGES,
                                                y.empty + 8 * (Y_STAGES + Z_STAGES)};
    const u32 up_full = z.empty + 8 * Z_STAGES;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int output = blockIdx.x % arg.strips * OUTPUTS;
    const int begin = blockIdx.x / arg.strips * arg.share;
    const int count = min(arg.share, arg.tiles - begin), token = begin * TOKENS;
    asm volatile("griddepcontrol.launch_dependents;");
    if (threadIdx.x == 0) {
        y.begin();
        z.begin();
        asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(up_full));
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
    if (warp >= THREADS / 32) {
        if (lane) return;
        asm volatile("griddepcontrol.wait;" ::: "memory");
        if (warp == THREADS / 32) {
            for (int number = 0; number < count; ++number)
                y.fetch(arg.y_map, number, output, token + number * TOKENS);
            return;
        }
        expect(up_full, UP_BYTES);
        for (int c = 0; c < CHUNKS; ++c)
            copy_box(up + c * (128 * OUTPUTS), arg.up_map, 64 * c, output, up_full);
        for (int number = 0; number < count; ++number)
            z.fetch(arg.z_map, number, 0, token + number * TOKENS);
        return;
    }
    const int group = warp / 4, row = warp % 4 * 16 + lane / 4;
    const bool speaks = threadIdx.x % 128 == 0;
    wait_for(up_full, 0);
    for (int number = 0; number < count; ++number) {
        float sums[32] = {};
        z.wait_full(number);
        asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
        for (int k = 0; k < 4 * CHUNKS; ++k)
            multiply(sums, descriptor(z.tile(number) + k / 4 * COLUMN + k % 4 * 32),
                     descriptor(up + k / 4 * (128 * OUTPUTS) + group * (128 * 64) + k % 4 * 32));
        asm volatile("wgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 0;" ::: "memory");
        if (lane == 0) z.leave(number);
        y.wait_full(number);
        const u32 tile = y.tile(number) + group * COLUMN;
#pragma unroll
        for (int n = 0; n < 8; ++n) {
            const u32 at = tile + 128 * row + 16 * (n ^ row % 8) + 4 * (lane % 4);
            add_to(at, sums[4 * n], sums[4 * n + 1], arg.scale);
            add_to(at + 128 * 8, sums[4 * n + 2], sums[4 * n + 3], arg.scale);
        }
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
        asm volatile("bar.sync %0, 128;" ::"r"(1 + group) : "memory");
        if (!speaks) continue;
        return_box(arg.y_map, output + 64 * group, token + number * TOKENS, tile);
        asm volatile("cp.async.bulk.commit_group;");
        // The tile before went back meanwhile, and its place may be filled again.
        asm volatile("cp.async.bulk.wait_group.read 1;" ::: "memory");
        if (number) y.leave(number - 1);
    }
    if (speaks) asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}
