// The instructions that C++ has no words for. ELEMENT_FP16 chooses float16, else bfloat16.

typedef unsigned int u32;
typedef unsigned long long u64;
typedef unsigned short u16;

constexpr u64 EVICT_FIRST = 0x12F0000000000000;  // what createpolicy.fractional.L2::evict_first gives for 1.0

// Programmatic dependent launch: from here on, what earlier kernels wrote may be read, what they read written.
__device__ __forceinline__ void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__device__ __forceinline__ void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}

__device__ __forceinline__ void prefetch_to_l2(const void* address, u32 bytes) {
#if __CUDA_ARCH__ >= 900
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(address), "r"(bytes));
#endif
}

__device__ __forceinline__ void copy_async(u32 to_shared, const void* from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to_shared), "l"(from) : "memory");
}

// For what is read once.
template <int OFFSET>
__device__ __forceinline__ void copy_async_once(u32 to_shared, const char* from) {
    asm volatile("cp.async.cg.shared.global.L2::cache_hint.L2::128B [%0], [%1 + %3], 16, %2;" ::"r"(to_shared),
                 "l"(from), "l"(EVICT_FIRST), "n"(OFFSET)
                 : "memory");
}

// For what other CTAs read as well.
template <int OFFSET>
__device__ __forceinline__ void copy_async_constant(u32 to_shared, const char* from) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1 + %2], 16;" ::"r"(to_shared), "l"(from), "n"(OFFSET)
                 : "memory");
}

// Shared memory is named by its 32-bit addresses: half the registers of pointers.
__device__ __forceinline__ u32 shared_address(const void* pointer) { return (u32)__cvta_generic_to_shared(pointer); }

__device__ __forceinline__ uint4 read_shared(u32 address) {
    return *static_cast<const uint4*>(__cvta_shared_to_generic(address));
}

__device__ __forceinline__ u32 read_shared_word(u32 address) {
    return *static_cast<const u32*>(__cvta_shared_to_generic(address));
}

__device__ __forceinline__ uint2 read_shared_pair(u32 address) {
    return *static_cast<const uint2*>(__cvta_shared_to_generic(address));
}

// Four 8 x 8 matrices of 128 bytes, one after the other, as fragments: element pair c of row g of each. The
// address: of lane 0, plus 16 bytes per lane.
__device__ __forceinline__ uint4 read_matrices(u32 address) {
    uint4 r;
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r.x), "=r"(r.y), "=r"(r.z), "=r"(r.w)
                 : "r"(address)
                 : "memory");
    return r;
}

// What lanes copied or wrote into shared memory, the others may read; what they read may be overwritten.
__device__ __forceinline__ void sync_warp() { __syncwarp(); }

__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int PENDING>
__device__ __forceinline__ void wait_for_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

#if __CUDA_ARCH__ >= 900

// A barrier that `copy_bulk` completes, again and again: 8 bytes of shared memory, made by the lane that copies.
__device__ __forceinline__ void make_barrier(u32 barrier) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(barrier) : "memory");
}

// Copies see the barriers that this lane made.
__device__ __forceinline__ void show_barriers() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

// By one lane; for what is read once. bytes: a multiple of 16.
__device__ __forceinline__ void copy_bulk(u32 to_shared, const void* from, u32 bytes, u32 barrier) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::"r"(
            to_shared),
        "l"(from), "r"(bytes), "r"(barrier), "l"(EVICT_FIRST)
        : "memory");
}

// Until the barrier's copy of this parity (of how many came before it) is there.
__device__ __forceinline__ void wait_for_bulk(u32 barrier, u32 parity) {
    asm volatile(
        "{\n.reg .pred there;\nagain:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 there, [%0], %1;\n@!there bra again;\n}" ::"r"(barrier),
        "r"(parity)
        : "memory");
}

#endif

// What other CTAs wrote before they published.
__device__ __forceinline__ float4 read_fresh(const float4* from) { return __ldcg(from); }

// What all threads of this CTA wrote, the CTA that awaits the flag may read.
__device__ __forceinline__ void publish(u32* flag) {
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) asm volatile("st.release.gpu.global.u32 [%0], 1;" ::"l"(flag) : "memory");
}

// Until another CTA publishes; takes the flag back. All threads take part.
__device__ __forceinline__ void await(u32* flag) {
    if (threadIdx.x == 0) {
        u32 value;
        do asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(flag) : "memory");
        while (value == 0);
        *flag = 0;
    }
    __syncthreads();
}

// Of float16, and of elements.
__device__ __forceinline__ void multiply_add_halves(float (&sum)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void multiply_add(float (&sum)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
#if ELEMENT_FP16
    multiply_add_halves(sum, a0, a1, a2, a3, b0, b1);
#else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
#endif
}

// Bytes 0 and 1, or 2 and 3, as the low bytes of two halves.
__device__ __forceinline__ u32 spread_low_bytes(u32 bytes) { return __byte_perm(bytes, 0, 0x4140); }
__device__ __forceinline__ u32 spread_high_bytes(u32 bytes) { return __byte_perm(bytes, 0, 0x4342); }

// Of two elements each.
__device__ __forceinline__ u32 add_pairs(u32 a, u32 b) {
    u32 sum;
#if ELEMENT_FP16
    asm("add.rn.f16x2 %0, %1, %2;" : "=r"(sum) : "r"(a), "r"(b));
#else
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(sum) : "r"(a), "r"(0x3f803f80u), "r"(b));
#endif
    return sum;
}

__device__ __forceinline__ u32 multiply_pairs(u32 a, u32 b) {
    u32 product;
#if ELEMENT_FP16
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(product) : "r"(a), "r"(b));
#else
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(product) : "r"(a), "r"(b), "r"(0x80008000u));  // -0
#endif
    return product;
}

__device__ __forceinline__ float half_to_float(u16 bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
}

__device__ __forceinline__ float to_float(u16 bits) {
#if ELEMENT_FP16
    return half_to_float(bits);
#else
    return __uint_as_float((u32)bits << 16);
#endif
}

__device__ __forceinline__ u16 to_element(float value) {
    u16 bits;
#if ELEMENT_FP16
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
#else
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
#endif
    return bits;
}
