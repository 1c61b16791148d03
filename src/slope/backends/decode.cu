// Y = X (W^R)^T for few tokens on the sparse tensor cores, and Z = X down^T beside it.
//
// Compiled at run time by NVRTC, without headers of CUDA, for one choice of the constants below:
//   NT      tiles of 8 tokens of a block
//   MT      tiles of 16 outputs of a warp
//   WM, WK  warps of a block along the outputs and along the inputs
//   STAGES  steps in flight
//   BF16    1 for bf16, 0 for fp16
//   GROUPED 1 for wgmma: four warps along the outputs share X, which the tensor cores then read
//           out of shared memory themselves (sm_90a)
//   TMA     1 where the tensor memory accelerator copies tiles, at the word of one more warp; warps
//           along the inputs then take turns (GROUPED). 0 for copies by all threads
//   ADAPTED 1 where this launch adds scale Z up^T to Y, and one ahead of it makes Z (TMA)
//   STAYS   1 where a block makes several tiles, one after another, and begins to copy the next while
//           it writes one (TMA, all inputs of a tile, WK = 1)
//
// A block owns ROWS outputs of TOKENS tokens and walks over the inputs in steps of STEP bytes of a
// row of A, which is W^R compressed (STEP columns) or down (STEP / 2 columns). Tiles stand in shared
// memory in the order of global memory; a chunk of 16 bytes is swapped with others of its row, so
// that ldmatrix meets no bank twice. wgmma wants X in columns of 128 bytes, each swapped alike. The
// inputs may be split among the blocks of a cluster, which then add their sums out of each other's
// shared memory. Both instructions want for a 16 x 32 tile 32 bits of metadata of every row: of each
// four lanes a pair gives them, lane h of it half h of row g below, of row g + 8 above, as they stand
// in memory.

#include "tiles.cuh"

constexpr int TOKENS = 8 * NT;
constexpr int ROWS = 16 * MT * WM;
constexpr int WIDE = TMA ? 1 : WK;  // warps side by side in a step
constexpr int STEP = 128 * WIDE;
constexpr int THREADS = 32 * WM * WK;
constexpr int A_BYTES = ROWS * STEP;
constexpr int X_BYTES = TOKENS * 2 * STEP;
constexpr int STAGE = A_BYTES + X_BYTES + ROWS * STEP / 8;
constexpr int SUM_STRIDE = ROWS + 4;
constexpr int GROUPS = TOKENS * ROWS / 4;
// With 128 sums a ninth warp would leave so few registers that the compiler waits for every wgmma. A
// third group of four then copies with few, and hands the others over.
constexpr bool HANDS_OVER = TMA && MT * NT > 16;
constexpr int COPYING = TMA ? (HANDS_OVER ? 128 : 32) : 0;  // threads
static_assert(!HANDS_OVER || THREADS <= 256, "more cannot have 232 registers, and would wait for ever");
constexpr int FLIGHT = 4;  // groups of sums that a thread asks another block for at once
constexpr int SUMS_BYTES = 4 * WK * TOKENS * SUM_STRIDE;
constexpr int BOX = 128 * TOKENS;  // bytes of 64 outputs of Y
constexpr int Y_BYTES = ROWS / 64 * BOX;
// Y takes the place of stages, and sums of warps the one behind it, unless stages are filled again.
constexpr int Y_AT = STAYS ? STAGES * STAGE : 0;
constexpr int BARRIERS = STAYS                           ? Y_AT + Y_BYTES
                         : STAGES * STAGE > SUMS_BYTES ? STAGES * STAGE
                                                       : SUMS_BYTES;  // begin there
static_assert(!TMA || GROUPED, "the accelerator lays X out as wgmma wants it");
static_assert(!ADAPTED || TMA, "tiles of up come by the accelerator");
static_assert(!STAYS || (TMA && WK == 1), "sums of warps would stand where tiles are copied");
// Else a warp would ask for a phase of a stage while an earlier one, of another warp, is pending.
static_assert(!TMA || STAGES % WK == 0, "a stage is always read by the same warps");

struct Arguments {
#if TMA
    Map values_map;    // boxes of 64 x ROWS, swapped by 128 bytes
    Map metadata_map;  // boxes of 16 bytes x ROWS, as they are
    Map x_map;         // boxes of 64 x TOKENS, swapped by 128 bytes
    Map up_map;        // boxes of 64 x ROWS, likewise
    Map z_map;         // boxes of 64 x TOKENS, likewise
    Map y_map;         // boxes of 64 x TOKENS, likewise
#endif
    const char* values;    // (outputs, inputs / 2)
    const char* metadata;  // (outputs, inputs / 8)
    const char* x;         // (tokens, inputs), rows x_stride bytes apart
    const u16* bias;       // (outputs), or null
    const char* down;      // (rank, inputs), or null
    u16* y;                // (tokens, outputs), or null where partial sums are wanted
    float* partial;        // (splits, tokens, outputs); a cluster is one split
    float* low;            // (low_splits, tokens, rank), or null
    u16* z;                // (tokens, rank), where nothing but X down^T is wanted, or null
    long long x_stride;
    int tokens, outputs, inputs, rank, splits, low_splits;
    float scale;
    int boxes;    // whether Y is written as boxes: by blocks that share no columns (TMA)
    int x_first;  // whether tiles of the same X are numbered one after another, else those of the same A (TMA)
};

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

// This thread's part of a tile of ROWS_ rows, WIDTH bytes of which belong to a step. In shared memory
// PITCH bytes of a row lie together, the next row's behind them, and what is left of WIDTH behind
// those of all rows. A pass of all threads copies DOWN rows.
template <int BYTES, int WIDTH, int ROWS_, int PITCH>
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
        constexpr int TOGETHER = PITCH / BYTES;
        const int chunk = across % TOGETHER;
        to = at + across / TOGETHER * (ROWS_ * PITCH) + first * PITCH +
             BYTES * (BYTES == 16 ? chunk ^ (first & 7) : chunk);
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

__device__ __forceinline__ void load_words(u32 (&to)[2], u32 from) {
    asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(to[0]), "=r"(to[1]) : "r"(from));
}

template <int PAIR>
__device__ __forceinline__ void multiply_sparse(float (&d)[4], const u32 (&a)[4], const u32 (&b)[4],
                                                u32 metadata) {
    asm volatile("mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32." KIND "." KIND
                 ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9, %10, %11}, {%0, %1, %2, %3}, "
                 "%12, %13;"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]),
                   "r"(b[3]), "r"(metadata), "n"(PAIR));
}

__device__ __forceinline__ void multiply_dense(float (&d)[4], const u32 (&a)[4],
                                               const u32 (&b)[4]) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." KIND "." KIND
                 ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

#if GROUPED
// Of wgmma, made for NT together with the constants: SHAPE is m64n, SUMS are the operands of 4 NT sums,
// OPERANDS the names of these, of four registers of A and of the place of X, METADATA the names of the
// metadata and of the pair of lanes that have it.
template <int PAIR>
__device__ __forceinline__ void group_sparse(float (&d)[NT][4], const u32 (&a)[4], u64 b,
                                             u32 metadata) {
    asm volatile("wgmma.mma_async.sp.sync.aligned." SHAPE "k32.f32." KIND "." KIND " " OPERANDS
                 ", " METADATA ", 1, 1, 1, 0;"
                 : SUMS
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(metadata), "n"(PAIR));
}

__device__ __forceinline__ void group_dense(float (&d)[NT][4], const u32 (&a)[4], u64 b) {
    asm volatile("wgmma.mma_async.sync.aligned." SHAPE "k16.f32." KIND "." KIND " " OPERANDS
                 ", 1, 1, 1, 0;"
                 : SUMS
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
#endif

__device__ __forceinline__ u16 from_float(float number) {
    u16 bits;
    asm("cvt.rn." KIND ".f32 %0, %1;" : "=h"(bits) : "f"(number));
    return bits;
}

__device__ __forceinline__ float bias_of(const Arguments& arg, int output) {
    if (!arg.bias) return 0;
    u16 bits;  // not through a cache that the kernel ahead has not emptied
    asm volatile("ld.global.cg.u16 %0, [%1];" : "=h"(bits) : "l"(arg.bias + output));
    return to_float(bits);
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

// All blocks of the cluster are here. What they wrote before need not be seen.
__device__ __forceinline__ void cluster_meet() {
    asm volatile("barrier.cluster.arrive.relaxed.aligned;\nbarrier.cluster.wait.aligned;" :::
                     "memory");
}

// They are here, and shared memory is as each of them left it. The full release and acquire would
// wait for global memory too, in about the time of a step.
__device__ __forceinline__ void cluster_barrier() {
#if __CUDACC_VER_MAJOR__ * 100 + __CUDACC_VER_MINOR__ >= 1208
    asm volatile("fence.release.sync_restrict::shared::cta.cluster;" ::: "memory");
    cluster_meet();
    asm volatile("fence.acquire.sync_restrict::shared::cluster.cluster;" ::: "memory");
#else
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" :::
                     "memory");
#endif
}

// Four sums of another block of the cluster.
__device__ __forceinline__ float4 sums_of(const float4* own, u32 block) {
    u32 at;
    float4 part;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(at) : "r"(shared_address(own)), "r"(block));
    asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(part.x), "=f"(part.y), "=f"(part.z), "=f"(part.w)
                 : "r"(at));
    return part;
}

// The next kernel of the stream, if it is one that waits itself, may come in where there is room.
__device__ __forceinline__ void let_next_begin() { asm volatile("griddepcontrol.launch_dependents;"); }
__device__ __forceinline__ void wait_for_previous() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
#else
__device__ __forceinline__ int cluster_blocks() { return 1; }
__device__ __forceinline__ void cluster_meet() {}
__device__ __forceinline__ void cluster_barrier() {}
__device__ __forceinline__ float4 sums_of(const float4* own, u32) { return *own; }
__device__ __forceinline__ void let_next_begin() {}
__device__ __forceinline__ void wait_for_previous() {}
#endif

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

// This lane's metadata of a step, for row g and row g + 8. The first two lanes of four have those of the
// first 64 columns, the others those of the rest.
__device__ __forceinline__ void load_places(u32 (&lower)[MT][2], u32 (&upper)[MT][2], u32 stage) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int row = (WK == 1 ? warp : warp % WM) * 16 * MT, wk = TMA ? 0 : warp / WM;
    const u32 at = stage + A_BYTES + X_BYTES + (row + lane / 4) * (STEP / 8) + 16 * wk +
                   8 * (lane / 2 % 2);
#pragma unroll
    for (int m = 0; m < MT; ++m) {
        load_words(lower[m], at + 2 * m * STEP);
        load_words(upper[m], at + (2 * m + 1) * STEP);
    }
}

// Which half of a word this lane gives.
__device__ __forceinline__ u32 own_half() { return threadIdx.x & 1 ? 0x7632 : 0x5410; }

// Where this lane reads 16 bytes of A, for the first 16 rows of its warp and the first 32 bytes.
__device__ __forceinline__ u32 place_of_a(u32 stage) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int row = (WK == 1 ? warp : warp % WM) * 16 * MT, wk = TMA ? 0 : warp / WM;
    return stage + (row + lane % 16) * STEP + 128 * wk + 16 * (lane / 16 ^ lane % 8);
}

#if GROUPED
struct Fragments {
    u32 a[4][MT][4], places[4][MT];
};

// A step's A.
template <bool SPARSE>
__device__ __forceinline__ void load(Fragments& step, u32 stage, int columns) {
    const u32 at = place_of_a(stage), half = own_half();
    u32 lower[MT][2], upper[MT][2];
    if (SPARSE) load_places(lower, upper, stage);
#pragma unroll
    for (int k = 0; k < 4; ++k)
#pragma unroll
        for (int m = 0; m < MT; ++m) {
            load4(step.a[k][m], (at ^ 32 * k) + 16 * m * STEP);
            // Beyond the last column there are zeros, whose places must be in order too.
            step.places[k][m] = !SPARSE || 32 * k >= columns
                                    ? 0x44444444
                                    : __byte_perm(lower[m][k % 2], upper[m][k % 2], half);
        }
}

// Begins to add a step's product; the registers of neither may be touched until it is finished.
template <bool SPARSE>
__device__ __forceinline__ void begin_product(float (&sums)[MT][NT][4], const Fragments& step,
                                              u32 stage) {
    const int wk = TMA ? 0 : threadIdx.x / 32 / WM;
    const u32 x = stage + A_BYTES + (SPARSE ? 2 : 1) * wk * (128 * TOKENS);
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
    for (int k = 0; k < 4; ++k) {
        const u64 b = descriptor(x + (SPARSE ? k / 2 * (128 * TOKENS) + k % 2 * 64 : k * 32));
#pragma unroll
        for (int m = 0; m < MT; ++m) {
            if (!SPARSE) group_dense(sums[m], step.a[k][m], b);
            else if (k < 2) group_sparse<0>(sums[m], step.a[k][m], b, step.places[k][m]);
            else group_sparse<1>(sums[m], step.a[k][m], b, step.places[k][m]);
        }
    }
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void finish_product() {
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
}
#endif

#if !TMA
template <bool SPARSE>
__device__ __forceinline__ void compute(float (&sums)[MT][NT][4], u32 stage, int columns) {
#if GROUPED
    Fragments step;
    load<SPARSE>(step, stage, columns);
    begin_product<SPARSE>(sums, step, stage);
    finish_product();
#else
    const int lane = threadIdx.x % 32, wk = threadIdx.x / 32 / WM;
    const u32 at_a = place_of_a(stage), half = own_half();
    u32 lower[MT][2], upper[MT][2];
    if (SPARSE) load_places(lower, upper, stage);
    const int chunk = SPARSE ? lane / 8 : lane / 8 % 2;
    const u32 at_x = stage + A_BYTES + lane % 8 * 2 * STEP + (SPARSE ? 256 : 128) * wk +
                     16 * (chunk ^ lane % 8);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
        if ((SPARSE ? 32 : 16) * k >= columns) break;
        u32 b[NT][4];
#pragma unroll
        for (int n = 0; n < NT; ++n) {
            const u32 at = (at_x ^ (SPARSE ? 64 : 32) * k) + 8 * n * 2 * STEP;
            if (SPARSE) load4(b[n], at);
            else load2(b[n], at);
        }
#pragma unroll
        for (int m = 0; m < MT; ++m) {
            u32 a[4];
            load4(a, (at_a ^ 32 * k) + 16 * m * STEP);
            const u32 metadata = SPARSE ? __byte_perm(lower[m][k % 2], upper[m][k % 2], half) : 0;
#pragma unroll
            for (int n = 0; n < NT; ++n) {
                if (!SPARSE) multiply_dense(sums[m][n], a, b[n]);
                else if (k < 2) multiply_sparse<0>(sums[m][n], a, b[n], metadata);
                else multiply_sparse<1>(sums[m][n], a, b[n], metadata);
            }
        }
    }
#endif
}
#endif

// Four sums of a token, rounded or not.
template <bool SPARSE>
__device__ __forceinline__ void write(const Arguments& arg, float4 sum, int number, int row, int rows,
                                      int token, int slab) {
    const int t = number / (ROWS / 4) + token, r = number % (ROWS / 4) * 4 + row;
    if (t >= arg.tokens || r >= rows) return;
    const long long at = static_cast<long long>(t) * rows + r;
    const long long skipped = static_cast<long long>(slab) * arg.tokens * rows;
    if (!SPARSE && arg.z) {  // the rank is divisible by 8, as TMA wants
        *reinterpret_cast<ushort4*>(arg.z + at) = make_ushort4(
            from_float(sum.x), from_float(sum.y), from_float(sum.z), from_float(sum.w));
    } else if (!SPARSE) {
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

// The warps along the inputs are added in order, then the blocks of a cluster.
template <bool SPARSE>
__device__ __forceinline__ void add_up(const Arguments& arg, char* memory, float (&sums)[MT][NT][4],
                                       int row, int rows, int token, int split, int splits) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, wk = warp / WM;
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
    __syncthreads();
    const bool together = (SPARSE || arg.z) && cluster_blocks() > 1;
    if (together) {
        for (int i = threadIdx.x; WK > 1 && i < GROUPS; i += THREADS)
            group(shared, i)[0] = sum_of_warps(shared, i);
        cluster_barrier();
    }
    const int first = together ? split * THREADS : 0;
    const int stride = together ? splits * THREADS : THREADS;
    for (int i = first + threadIdx.x; i < GROUPS; i += FLIGHT * stride) {
        float4 sum[FLIGHT] = {};
        // In the order of the blocks; what is on its way together hides how far they are.
        for (u32 block = 0; together && block < splits; ++block) {
            float4 part[FLIGHT];
#pragma unroll
            for (int j = 0; j < FLIGHT; ++j)
                part[j] = sums_of(group(shared, min(i + j * stride, GROUPS - 1)), block);
#pragma unroll
            for (int j = 0; j < FLIGHT; ++j) sum[j] = add(sum[j], part[j]);
        }
#pragma unroll
        for (int j = 0; j < FLIGHT; ++j) {
            if (i + j * stride >= GROUPS) break;
            if (!together) sum[j] = sum_of_warps(shared, i + j * stride);
            write<SPARSE>(arg, sum[j], i + j * stride, row, rows, token, together ? 0 : split);
        }
    }
    if (together) cluster_meet();  // the others may still read this block's sums
}

#if !TMA
// sums = rows of A times X over this split, from a token on.
template <bool SPARSE>
__device__ __forceinline__ void product(const Arguments& arg, char* memory, const char* a, int row,
                                        int rows, int token, int split, int splits) {
    const int wk = threadIdx.x / 32 / WM;
    const int width = SPARSE ? STEP : STEP / 2;  // columns of a step
    const int steps = (arg.inputs + width - 1) / width;
    const int share = (steps + splits - 1) / splits;
    const int begin = split * share;
    const int end = min(begin + share, steps);
    const u32 base = shared_address(memory);
    constexpr int X_STEP = SPARSE ? 2 * STEP : STEP;
    const int a_row = SPARSE ? arg.inputs : 2 * arg.inputs;
    Tile<16, STEP, ROWS, STEP> weight(a, a_row, row, rows, a_row, begin * STEP, base);
    Tile<16, X_STEP, TOKENS, GROUPED ? 128 : 2 * STEP> inputs(
        arg.x, arg.x_stride, token, arg.tokens, 2 * arg.inputs, begin * X_STEP, base + A_BYTES);
    Tile<8, STEP / 8, ROWS, STEP / 8> places(arg.metadata, arg.inputs / 8, row, rows, arg.inputs / 8,
                                             begin * STEP / 8, base + A_BYTES + X_BYTES);
    auto fetch = [&](int step, int stage) {
        if (step < end) {
            weight.fetch(stage * STAGE);
            inputs.fetch(stage * STAGE);
            if (SPARSE) places.fetch(stage * STAGE);
        }
        asm volatile("cp.async.commit_group;");
    };
    wait_for_previous();
    // Not before: the next launch then takes X for written, and waits for Z alone.
    if (!SPARSE && arg.z) let_next_begin();
    float sums[MT][NT][4] = {};
#pragma unroll
    for (int s = 0; s < STAGES - 1; ++s) fetch(begin + s, s);
    int read = 0, write = STAGES - 1;
    for (int step = begin; step < end; ++step) {
        asm volatile("cp.async.wait_group %0;" ::"n"(STAGES - 2));
        // What was copied is read by another path than ldmatrix takes.
        if (GROUPED) asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
        __syncthreads();
        fetch(step + STAGES - 1, write);
        compute<SPARSE>(sums, base + read * STAGE, arg.inputs - step * width - wk * (width / WK));
        read = read + 1 == STAGES ? 0 : read + 1;
        write = write + 1 == STAGES ? 0 : write + 1;
    }
    asm volatile("cp.async.wait_group 0;");
    __syncthreads();
    add_up<SPARSE>(arg, memory, sums, row, rows, token, split, splits);
}
#else
// Whether a phase of a barrier has ended, the same for all lanes.
__device__ __forceinline__ bool is_over(u32 barrier, u32 parity) {
    u32 done;
    asm volatile("{\n.reg .pred p;\n"
                 "mbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2;\n"
                 "selp.u32 %0, 1, 0, p;\n}"
                 : "=r"(done)
                 : "r"(barrier), "r"(parity)
                 : "memory");
    return __all_sync(0xffffffff, done);
}

__device__ __forceinline__ void multiply(float (&sums)[MT][NT][4], float factor) {
#pragma unroll
    for (int m = 0; m < MT; ++m)
#pragma unroll
        for (int n = 0; n < NT; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) sums[m][n][i] *= factor;
}

// Two tiles, where their number is odd.
__device__ __forceinline__ void turn2(u32 to, const u32 (&tiles)[4]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(to),
                 "r"(tiles[0]), "r"(tiles[1])
                 : "memory");
}

// What this thread has given back has been read, and its place may be written again.
__device__ __forceinline__ void wait_for_boxes() {
    asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
}

// These four warps have 64 MT outputs.
__device__ __forceinline__ void meet_four(int wm) {
    asm volatile("bar.sync %0, 128;" ::"r"(1 + wm / 4) : "memory");
}

// Y of this block, which has all the inputs: sums of the warps along them are added in the registers of the
// first, rounded and turned in shared memory, and the accelerator writes boxes. All have read the stages
// that this overwrites.
__device__ __forceinline__ void write_boxes(const Arguments& arg, char* memory, float (&sums)[MT][NT][4],
                                            int row, int token) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, wk = warp / WM;
    const int wm = WK == 1 ? warp : warp % WM;  // the compiler does not see that it is the same
    const bool speaks = wm % 4 == 0 && lane == 0;
    const u32 y = shared_address(memory) + Y_AT;
    if (STAYS) {
        if (speaks) wait_for_boxes();
        meet_four(wm);
    }
    if (WK > 1) {
        float4* parts = reinterpret_cast<float4*>(memory + Y_BYTES) + lane;
        auto part = [&](int k, int m, int n) -> float4& {
            return parts[32 * ((((k - 1) * WM + wm) * MT + m) * NT + n)];
        };
#pragma unroll
        for (int m = 0; m < MT; ++m)
#pragma unroll
            for (int n = 0; n < NT; ++n)
                if (wk > 0)
                    part(wk, m, n) = {sums[m][n][0], sums[m][n][1], sums[m][n][2], sums[m][n][3]};
        __syncthreads();
        if (wk > 0) return;
#pragma unroll
        for (int k = 1; k < WK; ++k)
#pragma unroll
            for (int m = 0; m < MT; ++m)
#pragma unroll
                for (int n = 0; n < NT; ++n) {
                    const float4 more = part(k, m, n);
                    sums[m][n][0] += more.x;
                    sums[m][n][1] += more.y;
                    sums[m][n][2] += more.z;
                    sums[m][n][3] += more.w;
                }
    }
#pragma unroll
    for (int m = 0; m < MT; ++m) {
        const int first = 16 * (MT * wm + m);  // output of the block
        const int own = row + first + lane / 4;
        const float low = own < arg.outputs ? bias_of(arg, own) : 0;
        const float high = own + 8 < arg.outputs ? bias_of(arg, own + 8) : 0;
        // Of a tile each lane names a row: of token lane % 8, tiles of 8 outputs side by side.
        const int chunk = first % 64 / 8 + lane / 8 % 2;
        const u32 at = y + first / 64 * BOX + 128 * (8 * (lane / 16) + lane % 8) +
                       16 * (chunk ^ lane % 8);
#pragma unroll
        for (int n = 0; n < NT; n += 2) {
            u32 tiles[4];
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const float(&sum)[4] = sums[m][n + j / 2 < NT ? n + j / 2 : n];
                const float bias = j % 2 ? high : low;
                tiles[j] = pair_of(sum[2 * (j % 2)] + bias, sum[2 * (j % 2) + 1] + bias);
            }
            if (n + 1 < NT) turn4(at + 1024 * n, tiles[0], tiles[1], tiles[2], tiles[3]);
            else turn2(at + 1024 * n, tiles);
        }
    }
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    meet_four(wm);
    if (!speaks) return;
    for (int box = wm / 4 * MT; box < (wm / 4 + 1) * MT; ++box)
        return_box(arg.y_map, row + 64 * box, token, y + box * BOX);
    asm volatile("cp.async.bulk.commit_group;");
    if (!STAYS) wait_for_boxes();
}

// A map is on its way before it is needed.
__device__ __forceinline__ void ask_for(const Map& map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// The same of W^R by a block whose last warp does nothing but copy. A stage is full when its boxes
// have come, empty when all warps have read it. An adapter is some more steps, whose sums are to be
// scaled: what is there is divided by the scale first. The launch ahead, which makes Z, has let this one
// begin when X was written.
__device__ __forceinline__ void product_by_tma(const Arguments& arg, char* memory, int number, int split,
                                               int splits) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int steps = (arg.inputs + STEP - 1) / STEP;
    const int all = steps + (ADAPTED ? (arg.rank + 63) / 64 : 0), share = (all + splits - 1) / splits;
    const int begin = split * share, end = min(begin + share, all);
    const u32 base = shared_address(memory), full = base + BARRIERS, empty = full + 8 * STAGES;
    int row, token;
    auto find = [&]() {
        const int tiles = (arg.outputs + ROWS - 1) / ROWS, parts = (arg.tokens + TOKENS - 1) / TOKENS;
        const int together = arg.x_first ? tiles : parts;  // which share an operand
        const int slow = number / together, fast = number % together;
        row = (arg.x_first ? fast : slow) * ROWS, token = (arg.x_first ? slow : fast) * TOKENS;
        return number < tiles * parts;
    };
    find();
    int before = -begin;  // steps of the tiles before, less those of other blocks
    auto next_tile = [&]() {
        before += end - begin;
        number += gridDim.x;
        return STAYS && find();
    };
    auto stage_of = [&](int step) { return base + (before + step) % STAGES * STAGE; };
    auto full_of = [&](int step) { return full + 8 * ((before + step) % STAGES); };
    auto empty_of = [&](int step) { return empty + 8 * ((before + step) % STAGES); };
    auto parity_of = [&](int step) { return (before + step) / STAGES & 1; };
    if (threadIdx.x == 0) {
        for (int s = 0; s < STAGES; ++s) {
            asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(full + 8 * s));
            asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(empty + 8 * s), "n"(WM));
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    } else if (threadIdx.x == 32) {
        ask_for(arg.values_map);
        ask_for(arg.metadata_map);
        ask_for(arg.x_map);
        if (ADAPTED) ask_for(arg.up_map);
        if (ADAPTED) ask_for(arg.z_map);
        if (arg.boxes) ask_for(arg.y_map);
    }
    __syncthreads();
    if (!ADAPTED) wait_for_previous();
    if (warp >= WM * WK) {
        if (HANDS_OVER) asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
        if (warp > WM * WK) return;
        bool waited = false;
        do {
            for (int step = begin; step < end; ++step) {
                const u32 at = stage_of(step), done = full_of(step);
                wait_for(empty_of(step), parity_of(step) ^ 1);
#if ADAPTED
                if (step >= steps) {
                    const int column = 64 * (step - steps);
                    if (lane == 0) {
                        asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(done),
                                     "n"(A_BYTES + X_BYTES / 2)
                                     : "memory");
                        copy_box(at, arg.up_map, column, row, done);
                    }
                    if (!waited) wait_for_previous();
                    waited = true;
                    if (lane == 0) copy_box(at + A_BYTES, arg.z_map, column, token, done);
                    continue;
                }
#endif
                if (lane > 0) continue;
                asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(done),
                             "n"(STAGE)
                             : "memory");
                copy_box(at, arg.values_map, STEP / 2 * step, row, done);
                copy_box(at + A_BYTES + X_BYTES, arg.metadata_map, STEP / 8 * step, row, done);
                for (int half = 0; half < 2; ++half)
                    copy_box(at + A_BYTES + half * (128 * TOKENS), arg.x_map, STEP * step + 64 * half,
                             token, done);
            }
        } while (next_tile());
        return;
    }
    if (HANDS_OVER) asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    float sums[MT][NT][4];
    bool scaled;
    auto read = [&](Fragments& fragments, int step) {
        if (ADAPTED && step >= steps) load<false>(fragments, stage_of(step), STEP / 2);
        else load<true>(fragments, stage_of(step), STEP);  // the inputs are divisible by it
    };
    auto add = [&](const Fragments& fragments, int step) {
        if (ADAPTED && step >= steps) {
            if (!scaled) multiply(sums, 1 / arg.scale);
            scaled = true;
            begin_product<false>(sums, fragments, stage_of(step));
        } else {
            begin_product<true>(sums, fragments, stage_of(step));
        }
    };
    auto leave = [&](int step) {
        finish_product();
        if (lane == 0)
            asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(empty_of(step)) : "memory");
    };
    // Where warps do not take turns, the next step's A is read while the tensor cores are at work on
    // this one's, if it is there.
    auto add_and_read = [&](const Fragments& fragments, Fragments& next, int step) {
        if (step >= end) return;
        const int after = step + 1;
        add(fragments, step);
        const bool there = after < end && is_over(full_of(after), parity_of(after));
        if (there) read(next, after);
        leave(step);
        if (there || after >= end) return;
        wait_for(full_of(after), parity_of(after));
        read(next, after);
    };
    do {
        scaled = false;
#pragma unroll
        for (int m = 0; m < MT; ++m)
#pragma unroll
            for (int n = 0; n < NT; ++n)
#pragma unroll
                for (int i = 0; i < 4; ++i) sums[m][n][i] = 0;
        Fragments even, odd;
        if (WK == 1 && begin < end) {
            wait_for(full_of(begin), parity_of(begin));
            read(even, begin);
        }
        for (int step = begin; WK == 1 && step < end; step += 2) {
            add_and_read(even, odd, step);
            add_and_read(odd, even, step + 1);
        }
        for (int step = begin + warp / WM; WK > 1 && step < end; step += WK) {
            wait_for(full_of(step), parity_of(step));
            read(even, step);
            add(even, step);
            leave(step);
        }
        if (scaled) multiply(sums, arg.scale);
        if (!STAYS) __syncthreads();
        if (STAYS || arg.boxes) write_boxes(arg, memory, sums, row, token);
        else add_up<true>(arg, memory, sums, row, arg.outputs, token, split, splits);
    } while (next_tile());
    if (STAYS && warp % 4 == 0 && lane == 0) wait_for_boxes();
}
#endif

extern "C" __global__ void __launch_bounds__(THREADS + COPYING, HANDS_OVER ? 1 : 0)
    slope_decode(const __grid_constant__ Arguments arg) {
    extern __shared__ __align__(1024) char memory[];
    if (!arg.z) let_next_begin();
    const int tiles = (arg.outputs + ROWS - 1) / ROWS, cluster = cluster_blocks();
    const int low_tiles = (arg.rank + ROWS - 1) / ROWS, parts = (arg.tokens + TOKENS - 1) / TOKENS;
    const int low_blocks = TMA ? 0 : low_tiles * parts * arg.low_splits;
    const int first = (low_blocks + cluster - 1) / cluster * cluster;
    const int block = blockIdx.x, number = (block - first) / cluster, rest = number / parts;
    // Tokens change fastest, so that rows of A are read again out of the L2 cache (by TMA: unless x_first).
    const int tile = rest % tiles;
    const int split = cluster > 1 ? (block - first) % cluster : rest / tiles;
#if TMA
    product_by_tma(arg, memory, number % (tiles * parts), split, arg.splits);
#else
    const int row = tile * ROWS, token = number % parts * TOKENS;
    if (arg.z) {
        product<false>(arg, memory, arg.down, row, arg.rank, token, split, arg.splits);
    } else if (block < low_blocks) {
        // A row of down is longer than one of W^R compressed: these come first, in more splits.
        const int beside = block / parts;
        product<false>(arg, memory, arg.down, beside % low_tiles * ROWS, arg.rank,
                       block % parts * TOKENS, beside / low_tiles, arg.low_splits);
    } else if (block >= first) {
        product<true>(arg, memory, arg.values, row, arg.outputs, token, split, arg.splits);
    }
#endif
}
