// What kernels of tiles share: numbers of 16 bits, barriers in shared memory, boxes that the tensor memory
// accelerator copies, and how wgmma is told of them. BF16 is 1 for bf16, 0 for fp16.

typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned long long u64;

#if BF16
#define KIND "bf16"
#else
#define KIND "f16"
#endif

struct alignas(64) Map {
    char bytes[128];
};

__device__ __forceinline__ u32 shared_address(const void* p) {
    return static_cast<u32>(__cvta_generic_to_shared(p));
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

// Two numbers that lie beside each other.
__device__ __forceinline__ u32 pair_of(float low, float high) {
    u32 pair;
    asm("cvt.rn." KIND "x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

__device__ __forceinline__ void wait_for(u32 barrier, u32 parity) {
    u32 done;
    do {
        asm volatile("{\n.reg .pred p;\n"
                     "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
                     "selp.u32 %0, 1, 0, p;\n}"
                     : "=r"(done)
                     : "r"(barrier), "r"(parity)
                     : "memory");
    } while (!done);
}

__device__ __forceinline__ void expect(u32 barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
                 : "memory");
}

__device__ __forceinline__ void arrive(u32 barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// A box at a column and a row, there and back; zeros stand for what lies outside, and are not written.
__device__ __forceinline__ void copy_box(u32 to, const Map& map, int column, int row, u32 barrier) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes "
                 "[%0], [%1, {%2, %3}], [%4];" ::"r"(to), "l"(&map), "r"(column), "r"(row),
                 "r"(barrier)
                 : "memory");
}

__device__ __forceinline__ void return_box(const Map& map, int column, int row, u32 from) {
    asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%1, %2}], [%3];" ::"l"(
                     &map), "r"(column), "r"(row), "r"(from)
                 : "memory");
}

// Four tiles of 8 outputs x 8 tokens, turned, so that a row of 16 bytes has 8 outputs of a token.
__device__ __forceinline__ void turn4(u32 to, u32 a, u32 b, u32 c, u32 d) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(to),
                 "r"(a), "r"(b), "r"(c), "r"(d)
                 : "memory");
}

// Of a tile, K beside K in 128 bytes, rows swapped by eights, for wgmma.
__device__ __forceinline__ u64 descriptor(u32 at) {
    return static_cast<u64>((at & 0x3ffff) >> 4) | 1ull << 16 | 64ull << 32 | 1ull << 62;
}
