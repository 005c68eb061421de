// y[t, n] = x[t, k] @ w[n, k]^T for many rows of x ("tokens"), by Hopper's tensor cores.
//
// Rows of w are the m dimension of wgmma.m64nNk16, A. Of 4 bits, a warpgroup takes them from registers: a word of codes
// (int4.cuh) becomes a lane's fragment there. Of 16 bits (GROUPS 0), rows as they are, from shared memory. Tokens are
// its n dimension, B, in shared memory. Of 16 rows of a tile, 8 are of the first half of w, 8 of the second, so that a
// gate meets its value.
//
//   tile   64 * WARPGROUPS rows of w by TOKENS rows of x, whose sums a CTA's registers hold
//   item   128 k of a tile (of 16 bits: 64)
//
// All items of all tiles, laid end to end, are cut into equal shares, one per CTA (stream-K: Osama et al., 2023). A
// tile that a cut divides belongs to the CTA that has its first item, which has it last of all: by then the others,
// who have their part of it first, have left their sums in global memory. They are added in the order of k.
//
// Items come through STAGES buffers. A warp copies its own units (of 16 bits: all threads copy w), all threads copy x.
// At one barrier per item all learn that the item is there, and that the last but one is used up: its buffer is filled
// again, while products of the last may still be under way.
//
// Constants of the compiler's command line: ELEMENT_FP16, TOKENS (16, 32, 64, 128 or 256), WARPGROUPS, STAGES,
// FRAGMENTS (A in registers, 2 or 4), OUTPUT (1: elements [t, n], 2: float32 [t, n], 3: gated, elements [t, n / 2]),
// ACTIVATION, GROUPS (0: w of 16 bits).

#include "ptx.cuh"

#include "activation.cuh"
#include "int4.cuh"
#include "wgmma.cuh"

constexpr int THREADS = 128 * WARPGROUPS;
constexpr int ROW_TILES = 4 * WARPGROUPS;  // of 16 rows
constexpr bool DENSE = GROUPS == 0;
constexpr int ITEM_K = DENSE ? 64 : 128;
constexpr int ITEM_CHUNKS = ITEM_K / 8;  // of 16 bytes
constexpr int X_HALF_BYTES = TOKENS * 128;  // 64 k
constexpr int X_BYTES = ITEM_K / 64 * X_HALF_BYTES;
constexpr int GROUP_BYTES = 64 * 128;  // of 16-bit w: a warpgroup's rows
constexpr int W_BYTES = DENSE ? WARPGROUPS * GROUP_BYTES : ROW_TILES * INT4_UNIT_BYTES;
constexpr int AHEAD = STAGES - 2;  // items
constexpr int PASS_TOKENS = THREADS / ITEM_CHUNKS;
constexpr bool GATED = OUTPUT == 3;

using Sums = float[TOKENS / 8][4];

struct Arguments {
    const u16* x;     // [t, k], rows `x_stride` apart
    const void* w;    // units [n / 16, k / 128, ·], or elements [n, k]
    const u16* bias;  // [n] or null
    void* out;
    float* partials;  // [CTAs, TOKENS / 8, THREADS, 4]
    u32* flags;       // [CTAs] whether those are there; 0 between launches
    int x_stride;
    int t, n, k;
    int token_tiles;
    int share, share_extra;  // items of every CTA; the first `share_extra` CTAs have one more
    u32 code_mask;           // see int4.cuh
};

__device__ __forceinline__ int first_item(const Arguments& a, int cta) {
    return cta * a.share + min(cta, a.share_extra);
}

// Where the next item comes from.
struct Source {
    const u16* x;   // this thread's first chunk
    const char* w;  // this lane's, in the codes; or this thread's first chunk
    int tokens;     // of x, from this thread's first on
    int row_tiles;  // of 16-bit w, likewise
    int tile, unit;

    __device__ __forceinline__ void seek(const Arguments& a, int units) {
        const int thread = threadIdx.x, row_tile = tile / a.token_tiles;
        const int token = (tile - row_tile * a.token_tiles) * TOKENS + thread / ITEM_CHUNKS;
        x = a.x + (long long)token * a.x_stride + unit * ITEM_K + thread % ITEM_CHUNKS * 8;
        tokens = a.t - token;
        if (DENSE) {
            const int w_tile = row_tile * ROW_TILES + thread / 128, i = thread / 8 % 16;
            const long long row = w_tile * 8 + (i < 8 ? i : a.n / 2 + i - 8);
            w = static_cast<const char*>(a.w) + (row * a.k + unit * ITEM_K + thread % 8 * 8) * 2;
            row_tiles = a.n / 16 - w_tile;
        } else {
            const int w_tile = min(row_tile * ROW_TILES + (thread >> 5), a.n / 16 - 1);
            const long long place = (long long)w_tile * units + unit;
            w = static_cast<const char*>(a.w) + place * INT4_UNIT_BYTES + (thread & 31) * 16;
        }
    }

    __device__ __forceinline__ void advance(const Arguments& a, int units) {
        x += ITEM_K;
        w += DENSE ? ITEM_K * 2 : INT4_UNIT_BYTES;
        if (++unit == units) {
            unit = 0;
            tile++;
            seek(a, units);
        }
    }

    __device__ __forceinline__ void copy_x(const Arguments& a, u32 to_shared) const {
        const int row = threadIdx.x / ITEM_CHUNKS, chunk = threadIdx.x % ITEM_CHUNKS;
        const u32 to = to_shared + chunk / 8 * X_HALF_BYTES + row * 128 + ((chunk ^ row) % 8) * 16;
#pragma unroll
        for (int pass = 0; pass < TOKENS; pass += PASS_TOKENS)
            if (pass < tokens && (TOKENS >= PASS_TOKENS || row < TOKENS))
                copy_async(to + pass * 128, x + (long long)pass * a.x_stride);
    }

    __device__ __forceinline__ void copy_w(const Arguments& a, u32 to_shared) const {
        if (DENSE) {
            const int row = threadIdx.x / 8;
            const u32 to = to_shared + row * 128 + ((threadIdx.x ^ row) % 8) * 16;
            const long long pass_bytes = (long long)WARPGROUPS * 8 * a.k * 2;
#pragma unroll
            for (int pass = 0; pass < 4; pass++)
                if (pass * WARPGROUPS < row_tiles)
                    copy_async_once<0>(to + pass * 16 * WARPGROUPS * 128, w + pass * pass_bytes);
            return;
        }
        const int lane = threadIdx.x & 31;
        const u32 to = to_shared + (threadIdx.x >> 5) * INT4_UNIT_BYTES + lane * 16;
        copy_async_constant<0>(to, w);
        copy_async_constant<512>(to + 512, w);
        if (lane < GROUPS * 4) copy_async_constant<INT4_CODE_BYTES>(to + INT4_CODE_BYTES, w);
    }
};

#if GROUPS == 0

// The sums of this warpgroup's rows += an item. At most one item's products are still under way afterwards.
__device__ __forceinline__ void multiply_item(const Arguments&, Sums& sums, u32 x, u32 w) {
    const u64 tokens = describe_rows(x), rows = describe_rows(w);
    fence_products();
#pragma unroll
    for (int step = 0; step < 4; step++) multiply_add_rows(sums, rows + step * 2, tokens + step * 2);
    commit_products();
    wait_for_products<1>();
}

#else

// The sums of this warpgroup's rows += an item. At most FRAGMENTS - 1 products are still under way afterwards.
__device__ __forceinline__ void multiply_item(const Arguments& a, Sums& sums, u32 x, u32 w_unit) {
    constexpr int GROUP_STEPS = 8 / GROUPS;
    const int lane = threadIdx.x & 31;
    const u64 rows = describe_rows(x);
    u32 minus_zero_g, minus_zero_g8, scale_g, scale_g8;
    uint4 codes;
    u32 fragments[FRAGMENTS][4];
#pragma unroll
    for (int step = 0; step < 8; step++) {
        if (step % 4 == 0) codes = read_shared(w_unit + step / 4 * 512 + lane * 16);
        if (step % GROUP_STEPS == 0) {
            const uint2 words = read_shared_pair(w_unit + INT4_CODE_BYTES + step / GROUP_STEPS * 64 + (lane >> 2) * 8);
            const Int4Row g(words.x), g8(words.y);
            minus_zero_g = g.minus_zero, minus_zero_g8 = g8.minus_zero;
            scale_g = to_element(g.scale) * 0x10001, scale_g8 = to_element(g8.scale) * 0x10001;
        }
        u32(&f)[4] = fragments[step % FRAGMENTS];
        const u32 word = step % 4 == 0 ? codes.x : step % 4 == 1 ? codes.y : step % 4 == 2 ? codes.z : codes.w;
        int4_fragment(word, a.code_mask, minus_zero_g, minus_zero_g8, f);
        f[0] = multiply_pairs(f[0], scale_g);
        f[1] = multiply_pairs(f[1], scale_g8);
        f[2] = multiply_pairs(f[2], scale_g);
        f[3] = multiply_pairs(f[3], scale_g8);
        fence_products();
        multiply_add_rows(sums, f, rows + step / 4 * (X_HALF_BYTES >> 4) + step % 4 * 2);
        commit_products();
        wait_for_products<FRAGMENTS - 1>();
    }
}

#endif

__device__ __forceinline__ float4* partial_sums(const Arguments& a, int cta) {
    return reinterpret_cast<float4*>(a.partials) + (long long)cta * (TOKENS / 8) * THREADS + threadIdx.x;
}

__device__ __forceinline__ void leave_sums(const Arguments& a, const Sums& sums) {
    float4* to = partial_sums(a, blockIdx.x);
#pragma unroll
    for (int i = 0; i < TOKENS / 8; i++) to[i * THREADS] = {sums[i][0], sums[i][1], sums[i][2], sums[i][3]};
    publish(a.flags + blockIdx.x);
}

// From the CTAs that have the items of this tile from `item` to `last_item`.
__device__ __forceinline__ void collect_sums(const Arguments& a, Sums& sums, int item, int last_item) {
    for (int cta = blockIdx.x + 1; item < last_item; cta++) {
        await(a.flags + cta);
        const float4* from = partial_sums(a, cta);
#pragma unroll
        for (int i = 0; i < TOKENS / 8; i++) {
            const float4 part = read_fresh(from + i * THREADS);
            sums[i][0] += part.x, sums[i][1] += part.y, sums[i][2] += part.z, sums[i][3] += part.w;
        }
        item = first_item(a, cta + 1);
    }
}

__device__ __forceinline__ void store(const Arguments& a, long long at, float value) {
    if (OUTPUT == 2)
        static_cast<float*>(a.out)[at] = value;
    else
        static_cast<u16*>(a.out)[at] = to_element(value);
}

__device__ __forceinline__ void store_sums(const Arguments& a, const Sums& sums, int tile) {
    const int lane = threadIdx.x & 31, half = a.n / 2, row_tile = tile / a.token_tiles;
    const int w_tile = row_tile * ROW_TILES + (threadIdx.x >> 5);
    if (w_tile >= a.n / 16) return;
    const int feature = w_tile * 8 + (lane >> 2), width = GATED ? half : a.n;
    const int token = (tile - row_tile * a.token_tiles) * TOKENS + (lane & 3) * 2;
    const float bias_g = a.bias == nullptr ? 0.0f : to_float(a.bias[feature]);
    const float bias_g8 = a.bias == nullptr ? 0.0f : to_float(a.bias[feature + half]);
    long long at = (long long)token * width + feature;
#pragma unroll
    for (int i = 0; i < TOKENS / 8; i++, at += 8 * width) {
#pragma unroll
        for (int e = 0; e < 2; e++) {
            if (token + i * 8 + e >= a.t) continue;
            if (GATED) {
                store(a, at + e * width, activate(sums[i][e]) * sums[i][e + 2]);
            } else {
                store(a, at + e * width, sums[i][e] + bias_g);
                store(a, at + e * width + half, sums[i][e + 2] + bias_g8);
            }
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) wide(const __grid_constant__ Arguments a) {
    extern __shared__ __align__(1024) char shared[];
    const u32 x_shared = shared_address(shared), w_shared = x_shared + STAGES * X_BYTES;
    // This warp's, or warpgroup's, in a stage.
    const u32 w_own = DENSE ? (threadIdx.x >> 7) * GROUP_BYTES : (threadIdx.x >> 5) * INT4_UNIT_BYTES;
    const int units = a.k / ITEM_K;
    const int first = first_item(a, blockIdx.x), last = first_item(a, blockIdx.x + 1);

    Source source;
    source.tile = first / units;
    source.unit = first - source.tile * units;
    int tile = source.tile, unit = source.unit;
    source.seek(a, units);

    // Weights are constant: they may be read while the kernel before still runs.
    Source early = source;
#pragma unroll 1
    for (int stage = 0; stage < min(AHEAD, last - first); stage++) {
        early.copy_w(a, w_shared + stage * W_BYTES);
        early.advance(a, units);
    }
    let_next_kernel_start();
    wait_for_previous_kernel();
#pragma unroll 1
    for (int stage = 0; stage < AHEAD; stage++) {
        if (first + stage < last) {
            source.copy_x(a, x_shared + stage * X_BYTES);
            source.advance(a, units);
        }
        commit_copies();
    }

    int stage = 0, next_stage = AHEAD;
#pragma unroll 1
    for (int item = first; item < last; tile++, unit = 0) {
        const int first_unit = unit, end = min(item + units - unit, last);
        unit += end - item;
        Sums sums = {};
#pragma unroll 1
        for (; item < end; item++) {
            wait_for_copies<AHEAD - 1>();
            show_to_products();
            __syncthreads();
            if (item + AHEAD < last) {
                source.copy_w(a, w_shared + next_stage * W_BYTES);
                source.copy_x(a, x_shared + next_stage * X_BYTES);
                source.advance(a, units);
            }
            commit_copies();
            multiply_item(a, sums, x_shared + stage * X_BYTES, w_shared + stage * W_BYTES + w_own);
            stage = stage + 1 == STAGES ? 0 : stage + 1;
            next_stage = next_stage + 1 == STAGES ? 0 : next_stage + 1;
        }
        wait_for_products<0>();
        settle(sums);
        if (first_unit > 0) {
            leave_sums(a, sums);
        } else {
            collect_sums(a, sums, item, item + units - unit);
            store_sums(a, sums, tile);
        }
    }
    wait_for_copies<0>();
}
