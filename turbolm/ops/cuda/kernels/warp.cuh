// What the lanes of a warp do together, and numbers in pairs. All 32 lanes take part.

template <typename T>
__device__ __forceinline__ T from_lane(T value, int lane) {
    return __shfl_sync(0xffffffff, value, lane);
}

template <typename T>
__device__ __forceinline__ T from_lane_xor(T value, int mask) {
    return __shfl_xor_sync(0xffffffff, value, mask);
}

__device__ __forceinline__ bool is_any(bool value) { return __any_sync(0xffffffff, value); }

// 32: nowhere.
__device__ __forceinline__ int first_lane_where(bool value) { return __clz(__brev(__ballot_sync(0xffffffff, value))); }

// 1 + 2 + … as a lane sees it: the sum of the values of this lane and those before.
__device__ __forceinline__ int sum_up_to_lane(int value, int lane) {
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
        int before = __shfl_up_sync(0xffffffff, value, step);
        if (lane >= step) value += before;
    }
    return value;
}

// `low` and `high` rounded, in one word: to float16, and to elements.
__device__ __forceinline__ u32 pack_halves(float low, float high) {
    u32 pair;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}
__device__ __forceinline__ u32 pack_elements(float low, float high) {
#if ELEMENT_FP16
    return pack_halves(low, high);
#else
    u32 pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
#endif
}

__device__ __forceinline__ float low_half(u32 pair) { return half_to_float((u16)pair); }
__device__ __forceinline__ float high_half(u32 pair) { return half_to_float((u16)(pair >> 16)); }
__device__ __forceinline__ float sum_of_halves(u32 pair) { return low_half(pair) + high_half(pair); }

// Bytes 0 and 2, or 1 and 3, as the low bytes of two halves.
__device__ __forceinline__ u32 even_bytes(u32 bytes) { return bytes & 0x00ff00ff; }
__device__ __forceinline__ u32 odd_bytes(u32 bytes) { return __byte_perm(bytes, 0, 0x4341); }

// The lower two bytes, e4m3, as float16.
__device__ __forceinline__ u32 numbers_of_fp8(u32 bytes) {
    u32 pair;
#if __CUDA_ARCH__ >= 890
    asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(pair) : "h"((u16)bytes));
#else
    pair = 0;  // no variant of fp8 is made for such a GPU
#endif
    return pair;
}

// Of an 8 x 8 matrix, of which lane (g, c) has the pair c of row g, the transposed.
__device__ __forceinline__ u32 transpose(u32 pair) {
    u32 transposed;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(transposed) : "r"(pair));
    return transposed;
}

// Halves of two words in one: the low ones, the high ones.
__device__ __forceinline__ u32 low_halves(u32 a, u32 b) { return __byte_perm(a, b, 0x5410); }
__device__ __forceinline__ u32 high_halves(u32 a, u32 b) { return __byte_perm(a, b, 0x7632); }

__device__ __forceinline__ float power_of_two(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ uint4 read_global(const void* from) { return *static_cast<const uint4*>(from); }

// 16 bytes from `from` + FROM to shared `to` + TO; zeros where not `present` (then nothing is read).
template <int TO, int FROM>
__device__ __forceinline__ void copy_async_or_zero(u32 to, const void* from, bool present) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0 + %3], [%1 + %4], 16, %2;" ::"r"(to), "l"(from),
                 "r"(present ? 16 : 0), "n"(TO), "n"(FROM)
                 : "memory");
}

// What other CTAs wrote before they counted.
__device__ __forceinline__ float4 read_fresh(const float* from) {
    return __ldcg(reinterpret_cast<const float4*>(from));
}
__device__ __forceinline__ float read_fresh_float(const float* from) { return __ldcg(from); }

// Counts one up, after all that this warp wrote; the count before. `counter` of lane 0.
__device__ __forceinline__ int count_up(int* counter, int lane) {
    __threadfence();
    __syncwarp();
    int before = 0;
    if (lane == 0) before = atomicAdd(counter, 1);
    before = from_lane(before, 0);
    __threadfence();
    return before;
}
