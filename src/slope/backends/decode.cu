// Y = X (W^R)^T for a few tokens on the sparse tensor cores, and Z = X down^T beside it.
//
// Compiled at run time by NVRTC, without headers, for one choice of the constants below:
//   NT      tiles of 8 tokens
//   MT      tiles of 16 outputs of a warp
//   WM, WK  warps of a block along the outputs and along the inputs
//   STAGES  steps in flight
//   SHARED  1 if tiles of outputs fetch X together, for which there must be clusters
//   BF16    1 for bf16, 0 for fp16
//
// A block owns ROWS outputs and walks over the inputs in steps of STEP bytes of a row of A, which is
// W^R compressed (STEP columns) or down (STEP / 2 columns). Rows of A stand in shared memory as in
// global memory, those of X in boxes of 128 bytes of every row; a chunk of 16 bytes is swapped with
// others of its 128, so that ldmatrix meets no bank twice. mma.sp wants for its 16 x 32 tile 32 bits
// of metadata of every row: lane 4 g + h gives half h of row g below, of row g + 8 above, as they
// stand in memory.
//
// From compute capability 9.0 on, blocks form clusters. Those that split the inputs of a tile add
// their sums out of each other's shared memory. And tiles of outputs that read the same X fetch it
// together (SHARED), because with many tokens X crosses the L2 cache more often than the weight: each
// block has a share of the boxes copied to all of them. A warp of its own does that: full barriers
// say that a stage has arrived, empty ones that all have read it.

typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned long long u64;

constexpr int TOKENS = 8 * NT;
constexpr int ROWS = 16 * MT * WM;
constexpr int STEP = 128 * WK;
constexpr int THREADS = 32 * WM * WK;
constexpr int A_BYTES = ROWS * STEP;
constexpr int X_BOX = TOKENS * 128;
constexpr int X_BYTES = TOKENS * 2 * STEP;
constexpr int STAGE = (A_BYTES + X_BYTES + ROWS * STEP / 8 + 1023) / 1024 * 1024;
constexpr int SUM_STRIDE = ROWS + 4;
constexpr int GROUPS = TOKENS * ROWS / 4;
constexpr int SUMS = 4 * WK * TOKENS * SUM_STRIDE;
constexpr int BARRIERS = STAGES * STAGE > SUMS ? STAGES * STAGE : SUMS;  // where they stand

struct __align__(64) Arguments {
    u64 map[16];           // a tensor map of x, where tiles fetch it together
    const char* values;    // (outputs, inputs / 2)
    const char* metadata;  // (outputs, inputs / 8)
    const char* x;         // (tokens, inputs), rows x_stride bytes apart
    const u16* bias;       // (outputs), or null
    const char* down;      // (rank, inputs), or null
    u16* y;                // (tokens, outputs), or null where partial sums are wanted
    float* partial;        // (splits, tokens, outputs); a cluster is one split
    float* low;            // (low_splits, tokens, rank)
    long long x_stride;
    int tokens, outputs, inputs, rank, splits, low_splits;
    int share;  // tiles of outputs that read the same X; divides the blocks of a cluster
};

__device__ __forceinline__ u32 shared_address(const void* p) {
    return static_cast<u32>(__cvta_generic_to_shared(p));
}

// The source is not read where it lies outside; zeros are written then.
template <int BYTES>
__device__ __forceinline__ void copy(u32 to, const char* from, bool inside) {
    const int bytes = inside ? BYTES : 0;
    if (BYTES == 16)
        asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from),
                     "r"(bytes));
    else
        asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(to), "l"(from),
                     "r"(bytes));
}

// This thread's part of a tile of ROWS_ rows, WIDTH bytes of which belong to a step; PITCH bytes
// lie between rows in shared memory, BOX bytes between 128 and 128 of a row. A pass of all threads
// copies DOWN rows.
template <int BYTES, int WIDTH, int ROWS_, int PITCH, int BOX>
struct Tile {
    static constexpr int ACROSS = WIDTH / BYTES;
    static constexpr int DOWN = THREADS / ACROSS;
    const char* from;
    long long stride;  // bytes of DOWN rows
    int columns, rows, first;  // bytes and rows that are left from this thread's first on
    u32 to;

    __device__ __forceinline__ Tile(const char* matrix, long long pitch, int row, int rows_, int bytes,
                                    int begin, u32 at) {
        const int across = threadIdx.x % ACROSS;
        first = threadIdx.x / ACROSS;
        from = matrix + (row + first) * pitch + begin + BYTES * across;
        stride = DOWN * pitch;
        columns = bytes - begin - BYTES * across;
        rows = rows_ - row - first;
        to = at + first * PITCH +
             (BYTES == 16 ? across / 8 * BOX + 16 * (across % 8 ^ first & 7) : BYTES * across);
    }

    __device__ __forceinline__ void fetch(u32 stage) {
#pragma unroll
        for (int j = 0; j * DOWN < ROWS_; ++j) {
            if (ROWS_ % DOWN && first + j * DOWN >= ROWS_) break;
            const u32 swapped = BYTES == 16 ? to ^ (16 * (j * DOWN & 7)) : to;
            copy<BYTES>(stage + swapped + j * DOWN * PITCH, from + j * stride,
                        columns > 0 && rows > j * DOWN);
        }
        from += WIDTH;
        columns -= WIDTH;
    }
};

__device__ __forceinline__ void load4(u32 (&to)[4], u32 from) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(from));
}

__device__ __forceinline__ void load2(u32 (&to)[4], u32 from) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(to[0]), "=r"(to[1])
                 : "r"(from));
}

__device__ __forceinline__ void load_words(u32 (&to)[4], u32 from) {
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(from));
}

#if BF16
#define KIND "bf16"
#else
#define KIND "f16"
#endif

__device__ __forceinline__ void multiply_sparse(float (&d)[4], const u32 (&a)[4], const u32 (&b)[4],
                                                u32 metadata) {
    asm volatile("mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32." KIND "." KIND
                 ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9, %10, %11}, {%0, %1, %2, %3}, "
                 "%12, 0x0;"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]),
                   "r"(b[3]), "r"(metadata));
}

__device__ __forceinline__ void multiply_dense(float (&d)[4], const u32 (&a)[4],
                                               const u32 (&b)[4]) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." KIND "." KIND
                 ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ __forceinline__ float to_float(u16 bits) {
    float number;
#if BF16
    number = __uint_as_float(static_cast<u32>(bits) << 16);
#else
    asm("cvt.f32.f16 %0, %1;" : "=f"(number) : "h"(bits));
#endif
    return number;
}

__device__ __forceinline__ u16 from_float(float number) {
    u16 bits;
    asm("cvt.rn." KIND ".f32 %0, %1;" : "=h"(bits) : "f"(number));
    return bits;
}

__device__ __forceinline__ float bias_of(const Arguments& arg, int output) {
    return arg.bias ? to_float(arg.bias[output]) : 0;
}

__device__ __forceinline__ float4 add(float4 a, float4 b) {
    return {a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w};
}

#if __CUDA_ARCH__ >= 900
__device__ __forceinline__ int cluster_blocks() {
    u32 blocks;
    asm("mov.u32 %0, %%cluster_nctaid.x;" : "=r"(blocks));
    return blocks;
}

__device__ __forceinline__ void cluster_barrier() {
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::
                     : "memory");
}

__device__ __forceinline__ u32 address_in(u32 block, u32 own) {
    u32 at;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(at) : "r"(own), "r"(block));
    return at;
}

// Four sums of the blocks from `first` on, in their order.
__device__ __forceinline__ float4 sum_of_blocks(const float4* own, int first, int blocks) {
    float4 sum = {};
    for (int block = first; block < first + blocks; ++block) {
        float4 part;
        asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
                     : "=f"(part.x), "=f"(part.y), "=f"(part.z), "=f"(part.w)
                     : "r"(address_in(block, shared_address(own))));
        sum = add(sum, part);
    }
    return sum;
}

// A kernel that was launched to follow this one may come in where there is room, and waits itself.
__device__ __forceinline__ void let_next_begin() { asm volatile("griddepcontrol.launch_dependents;"); }

__device__ __forceinline__ void init_barrier(u32 barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals));
}

__device__ __forceinline__ void publish_barriers() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void wait(u32 barrier, int parity) {
    u32 done;
    do {
        asm volatile(
            "{\n.reg .pred p;\n"
            "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\n"
            "selp.u32 %0, 1, 0, p;\n}"
            : "=r"(done)
            : "r"(barrier), "r"(parity)
            : "memory");
    } while (!done);
}

__device__ __forceinline__ void expect(u32 barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
                 : "memory");
}

__device__ __forceinline__ void arrive_at(u32 block, u32 barrier) {
    asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(
                     address_in(block, barrier))
                 : "memory");
}

// A box of X to the same place in all blocks of the mask; what lies outside is zero.
__device__ __forceinline__ void copy_box(u32 to, const u64* map, int column, u32 barrier, u16 blocks) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
        ".multicast::cluster [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(to), "l"(map), "r"(column), "r"(0),
        "r"(barrier), "h"(blocks)
        : "memory");
}
#else
__device__ __forceinline__ int cluster_blocks() { return 1; }
__device__ __forceinline__ void cluster_barrier() {}
__device__ __forceinline__ float4 sum_of_blocks(const float4* own, int, int) { return *own; }
__device__ __forceinline__ void let_next_begin() {}
__device__ __forceinline__ void init_barrier(u32, int) {}
__device__ __forceinline__ void publish_barriers() {}
__device__ __forceinline__ void wait(u32, int) {}
__device__ __forceinline__ void expect(u32, int) {}
__device__ __forceinline__ void arrive_at(u32, u32) {}
__device__ __forceinline__ void copy_box(u32, const u64*, int, u32, u16) {}
#endif

// Of the threads that multiply, not of the warp that fetches.
__device__ __forceinline__ void barrier() {
    asm volatile("bar.sync 1, %0;" ::"n"(THREADS) : "memory");
}

// Four outputs of a token in shared memory, by the first warps along the inputs.
__device__ __forceinline__ float4* group(float* shared, int number) {
    const int t = number / (ROWS / 4), r = number % (ROWS / 4) * 4;
    return reinterpret_cast<float4*>(shared + t * SUM_STRIDE + r);
}

__device__ __forceinline__ float4 sum_of_warps(float* shared, int number) {
    float4 sum = *group(shared, number);
#pragma unroll
    for (int k = 1; k < WK; ++k) sum = add(sum, *group(shared + k * TOKENS * SUM_STRIDE, number));
    return sum;
}

template <bool SPARSE>
__device__ __forceinline__ void compute(float (&sums)[MT][NT][4], u32 stage, int columns) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int row = warp % WM * 16 * MT, wk = warp / WM;
    const u32 at_a = stage + (row + lane % 16) * STEP + 128 * wk + 16 * (lane / 16 ^ lane % 8);
    const int chunk = SPARSE ? lane / 8 : lane / 8 % 2;
    const u32 at_x = stage + A_BYTES + (SPARSE ? 2 : 1) * wk * X_BOX + lane % 8 * 128 +
                     16 * (chunk ^ lane % 8);
    const u32 at_e = stage + A_BYTES + X_BYTES + (row + lane / 4) * (STEP / 8) + 16 * wk;
    u32 lower[MT][4], upper[MT][4];
    if (SPARSE) {
#pragma unroll
        for (int m = 0; m < MT; ++m) {
            load_words(lower[m], at_e + 2 * m * STEP);
            load_words(upper[m], at_e + (2 * m + 1) * STEP);
        }
    }
    const u32 half = lane & 1 ? 0x7632 : 0x5410;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
        if ((SPARSE ? 32 : 16) * k >= columns) break;
        u32 b[NT][4];
#pragma unroll
        for (int n = 0; n < NT; ++n) {
            const u32 at =
                (SPARSE ? (at_x + k / 2 * X_BOX) ^ 64 * (k % 2) : at_x ^ 32 * k) + 8 * n * 128;
            if (SPARSE) load4(b[n], at);
            else load2(b[n], at);
        }
#pragma unroll
        for (int m = 0; m < MT; ++m) {
            u32 a[4];
            load4(a, (at_a ^ 32 * k) + 16 * m * STEP);
            const u32 metadata = SPARSE ? __byte_perm(lower[m][k], upper[m][k], half) : 0;
#pragma unroll
            for (int n = 0; n < NT; ++n) {
                if (SPARSE) multiply_sparse(sums[m][n], a, b[n], metadata);
                else multiply_dense(sums[m][n], a, b[n]);
            }
        }
    }
}

// Where a block stands among those of its cluster: `share` tiles, each split among `splits` blocks.
struct Place {
    int member, share, split, splits;

    __device__ __forceinline__ int block(int other) const { return other * splits + split; }
};

// What the warp beside the others does: its share of the boxes of X, for every step.
template <int X_STEP>
__device__ __forceinline__ void fetch_inputs(const Arguments& arg, u32 base, u32 full, u32 empty,
                                             int begin, int end, const Place& place) {
    u16 blocks = 0;
    for (int other = 0; other < place.share; ++other) blocks |= 1 << place.block(other);
    constexpr int BOXES = X_STEP / 128;
    const int lane = threadIdx.x % 32, box = place.member + place.share * lane;
    for (int step = begin; step < end; ++step) {
        const int use = (step - begin) / STAGES, stage = (step - begin) % STAGES;
        if (use) wait(empty + 8 * stage, (use - 1) & 1);
        if (lane == 0) expect(full + 8 * stage, BOXES * X_BOX);
        __syncwarp();
        if (box < BOXES)
            copy_box(base + stage * STAGE + A_BYTES + box * X_BOX, arg.map,
                     step * (X_STEP / 2) + 64 * box, full + 8 * stage, blocks);
    }
}

// sums = rows of A times X over a split; then the warps along the inputs are added in order, and the
// blocks of a cluster that split them. `part` is the split, of `parts`, inside the cluster or not.
template <bool SPARSE>
__device__ __forceinline__ void product(const Arguments& arg, char* memory, const char* a, int row,
                                        int rows, int part, int parts, const Place& place) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, wk = warp / WM;
    const int width = SPARSE ? STEP : STEP / 2;  // columns of a step
    const int steps = (arg.inputs + width - 1) / width;
    const int each = (steps + parts - 1) / parts;
    const int begin = part * each;
    const int end = min(begin + each, steps);
    const u32 base = shared_address(memory);
    const u32 full = base + BARRIERS, empty = full + 8 * STAGES;
    constexpr int X_STEP = SPARSE ? 2 * STEP : STEP;
    const int a_row = SPARSE ? arg.inputs : 2 * arg.inputs;
    Tile<16, STEP, ROWS, STEP, 128> weight(a, a_row, row, rows, a_row, begin * STEP, base);
    Tile<16, X_STEP, TOKENS, 128, X_BOX> inputs(arg.x, arg.x_stride, 0, arg.tokens, 2 * arg.inputs,
                                                begin * X_STEP, base + A_BYTES);
    Tile<8, STEP / 8, ROWS, STEP / 8, 0> places(arg.metadata, arg.inputs / 8, row, rows,
                                                arg.inputs / 8, begin * STEP / 8,
                                                base + A_BYTES + X_BYTES);
    auto fetch = [&](int step, int stage) {
        if (step < end) {
            weight.fetch(stage * STAGE);
            if (!SHARED) inputs.fetch(stage * STAGE);
            if (SPARSE) places.fetch(stage * STAGE);
        }
        asm volatile("cp.async.commit_group;");
    };
    if (warp < WM * WK) {
#pragma unroll
        for (int s = 0; s < STAGES - 1; ++s) fetch(begin + s, s);
    }
    if (SHARED) {
        if (threadIdx.x < STAGES) {
            init_barrier(full + 8 * threadIdx.x, 1);
            init_barrier(empty + 8 * threadIdx.x, place.share);
            publish_barriers();
        }
        if (place.share > 1) cluster_barrier();
        else __syncthreads();
        if (warp == WM * WK) {
            fetch_inputs<X_STEP>(arg, base, full, empty, begin, end, place);
            return;
        }
    }
    float sums[MT][NT][4] = {};
    int read = 0, write = STAGES - 1, parity = 0;
    for (int step = begin; step < end; ++step) {
        asm volatile("cp.async.wait_group %0;" ::"n"(STAGES - 2));
        barrier();
        if (SHARED && step > begin && threadIdx.x < place.share)
            arrive_at(place.block(threadIdx.x), empty + 8 * write);
        fetch(step + STAGES - 1, write);
        if (SHARED) wait(full + 8 * read, parity);
        compute<SPARSE>(sums, base + read * STAGE, arg.inputs - step * width - wk * (width / WK));
        read = read + 1 == STAGES ? 0 : read + 1;
        write = write + 1 == STAGES ? 0 : write + 1;
        parity ^= read == 0;
    }
    asm volatile("cp.async.wait_group 0;");
    barrier();
    float* shared = reinterpret_cast<float*>(memory);
#pragma unroll
    for (int m = 0; m < MT; ++m)
#pragma unroll
        for (int n = 0; n < NT; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int r = (warp % WM) * 16 * MT + 16 * m + lane / 4 + 8 * (i / 2);
                const int t = 8 * n + 2 * (lane % 4) + i % 2;
                shared[(wk * TOKENS + t) * SUM_STRIDE + r] = sums[m][n][i];
            }
    barrier();
    const bool together = place.splits > 1;
    if (together) {
        for (int i = threadIdx.x; WK > 1 && i < GROUPS; i += THREADS)
            group(shared, i)[0] = sum_of_warps(shared, i);
        cluster_barrier();
    }
    const int first = together ? part * THREADS : 0;
    const int stride = together ? parts * THREADS : THREADS;
    for (int i = first + threadIdx.x; i < GROUPS; i += stride) {
        const int t = i / (ROWS / 4), r = i % (ROWS / 4) * 4 + row;
        if (t >= arg.tokens || r >= rows) continue;
        const float4 sum = together
                               ? sum_of_blocks(group(shared, i), place.member * parts, parts)
                               : sum_of_warps(shared, i);
        const long long at = static_cast<long long>(t) * rows + r;
        const long long skipped = static_cast<long long>(together ? 0 : part) * arg.tokens * rows;
        if (!SPARSE) {
            const float each[4] = {sum.x, sum.y, sum.z, sum.w};
            for (int j = 0; j < min(4, rows - r); ++j) arg.low[skipped + at + j] = each[j];
        } else if (arg.y) {  // outputs are divisible by 4, as 2:4 wants
            const float bias[4] = {bias_of(arg, r), bias_of(arg, r + 1), bias_of(arg, r + 2),
                                   bias_of(arg, r + 3)};
            *reinterpret_cast<ushort4*>(arg.y + at) =
                make_ushort4(from_float(sum.x + bias[0]), from_float(sum.y + bias[1]),
                             from_float(sum.z + bias[2]), from_float(sum.w + bias[3]));
        } else {
            *reinterpret_cast<float4*>(arg.partial + skipped + at) = sum;
        }
    }
    if (place.share * place.splits > 1) cluster_barrier();  // others may still reach into this block
}

extern "C" __global__ void __launch_bounds__(THREADS + 32 * SHARED)
    slope_decode(const __grid_constant__ Arguments arg) {
    extern __shared__ __align__(1024) char memory[];
    let_next_begin();
    const int tiles = (arg.outputs + ROWS - 1) / ROWS, cluster = cluster_blocks();
    const int low_tiles = (arg.rank + ROWS - 1) / ROWS, low_blocks = low_tiles * arg.low_splits;
    const int first = (low_blocks + cluster - 1) / cluster * cluster;
    const int block = blockIdx.x;
    // A row of down is longer than one of W^R compressed, so these blocks come first, in more parts.
    if (block < low_blocks) {
        product<false>(arg, memory, arg.down, block % low_tiles * ROWS, arg.rank, block / low_tiles,
                       arg.low_splits, Place{0, 1, block % cluster, 1});
    } else if (block >= first) {
        const int rank = block % cluster, splits = cluster / arg.share;
        const int groups = (tiles + arg.share - 1) / arg.share, number = (block - first) / cluster;
        const Place place{rank / splits, arg.share, rank % splits, splits};
        const int part = splits > 1 ? place.split : number / groups;
        product<true>(arg, memory, arg.values, (number % groups * arg.share + place.member) * ROWS,
                      arg.outputs, part, arg.splits, place);
    }
}
