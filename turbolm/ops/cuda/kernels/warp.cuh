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

// 1 + 2 + … as a lane sees it: the sum of the values of this lane and those before.
__device__ __forceinline__ int sum_up_to_lane(int value, int lane) {
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
        int before = __shfl_up_sync(0xffffffff, value, step);
        if (lane >= step) value += before;
    }
    return value;
}

// `low` and `high` rounded, in one word.
__device__ __forceinline__ u32 pack_elements(float low, float high) {
    u32 pair;
#if ELEMENT_FP16
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
#else
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
#endif
    return pair;
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
