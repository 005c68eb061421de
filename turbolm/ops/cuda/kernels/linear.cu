// y[t, n] = x[t, k] @ w[n, k]^T for 1 to 64 rows of x, bound by the time to read w.
//
// Rows of w are the m dimension of mma.m16n8k16, rows of x ("tokens") its n dimension. 16 bytes, 8
// consecutive k of one row, serve as the fragments of two MMAs: that permutes k within 32 values, the same
// way for w and for x. Lane (g, c) = (lane / 4, lane % 4) always holds k = 8c .. 8c+7 of its row or token g.
//
//   unit   16 rows x 64 k of w: 2 KB, four times 16 bytes per lane (of 8 and 4 bits: 128 k, weights.cuh)
//   slice  what the warps of a CTA multiply between two looks at x: DEPTH units each
//   pass   the row tiles that a CTA works on at once: WARPS_M * TILES_M
//
// CTA (r, s) computes the r-th share of the row tiles over the s-th share of k. Each lane keeps its part of
// DEPTH units in flight in a ring of shared memory that nobody else touches, so weights wait for no
// barrier; the ring runs on over slices and passes. (A ring of registers is drained whenever it is read:
// the compiler gives all its loads one scoreboard.) Warps that share a row tile take turns in k and add up
// through shared memory, always in the same order.
//
// x is copied into shared memory once where all slices fit, else slice by slice into three buffers in turn.
//
// Constants given by the compiler's command line: ELEMENT_FP16, TOKENS, WARPS_M, WARPS_K, TILES_M, DEPTH,
// MIN_CTAS, OUTPUT (0: float32 parts [S, t, n], 1: elements [t, n], 2: float32 [t, n], 3: gated, elements
// [t, n / 2]), ACTIVATION, WEIGHTS (0: of 16 bits, 1: int4, 2: int8, 3: fp8), GROUPS (of int4).

#include "ptx.cuh"

#include "activation.cuh"
#include "int4.cuh"

constexpr int TILES_T = TOKENS / 8;
constexpr int NUM_THREADS = 32 * WARPS_M * WARPS_K;
constexpr int SLICE_UNITS = WARPS_K * DEPTH;
constexpr bool IS_INT4 = WEIGHTS == 1, IS_8_BIT = WEIGHTS >= 2;
constexpr int UNIT_K = WEIGHTS == 0 ? 64 : 128;
constexpr int X_BLOCKS = UNIT_K / 32;  // per unit and 8 tokens: 512 bytes in shared memory
constexpr int X_BUFFERS = 3;
constexpr int UNIT_BYTES_X = TOKENS * UNIT_K * 2;  // of x in shared memory
constexpr int PASS_TILES = WARPS_M * TILES_M;
constexpr bool GATED = OUTPUT == 3;
constexpr bool PAIRED = GATED || IS_INT4;  // rows 8 .. 15 of a tile are of the second half of w
constexpr int TILE_ROWS = GATED ? 8 : 16;  // output features per row tile
constexpr int TOKEN_STRIDE = 20;           // floats; 16 rows, padded so that a warp's stores meet no bank twice
constexpr int SUM_FLOATS = PASS_TILES * WARPS_K * TOKENS * TOKEN_STRIDE;

struct Arguments {
    const u16* x;     // [t, k], rows `x_stride` apart
    const void* w;    // [n, k], or units of 4 bits [n / 16, k / 128, ·]
    const u16* bias;  // [n] or null
    void* out;
    const float* scales;  // [n], of 8 bits
    int x_stride;
    int t, n, k;
    int tiles, tiles_extra;  // row tiles of every CTA; the first `tiles_extra` CTAs have one more
    int units, units_extra;  // the same of units of k, for gridDim.y
    int resident;            // whether shared memory holds all slices of x
    // Row tiles of a CTA, and units of each, that are brought into L2 before the kernel waits for x.
    int prefetch_first_tile, prefetch_tiles, prefetch_first_unit, prefetch_units;
    u32 code_mask;  // see int4.cuh
};

using Sums = float[TILES_M][TILES_T][4];

#include "weights.cuh"

// Units of x into shared memory as B fragments: 512 bytes per 32 k and 8 tokens, 16 per lane.
__device__ __forceinline__ void copy_x(const Arguments& a, u32 to_shared, int first_unit, int units) {
    const int lane = threadIdx.x & 31, blocks = units * X_BLOCKS * TILES_T;
    const u16* from = a.x + (lane >> 2) * a.x_stride + first_unit * UNIT_K;
#pragma unroll 2
    for (int block = threadIdx.x >> 5; block < blocks; block += WARPS_M * WARPS_K) {
        int token = block % TILES_T * 8;
        if (token + (lane >> 2) < a.t)
            copy_async(to_shared + block * 512 + Weights::x_place(lane) * 16,
                       from + token * a.x_stride + Weights::x_column(block / TILES_T, lane));
    }
}

__device__ __forceinline__ void store(const Arguments& a, int split, int token, int feature, float value, float up) {
    if (token >= a.t) return;
    if (GATED) {
        if (feature >= a.n / 2) return;
        if (IS_8_BIT) value *= a.scales[feature], up *= a.scales[feature + a.n / 2];
        long long at = (long long)token * (a.n / 2) + feature;
        static_cast<u16*>(a.out)[at] = to_element(activate(value) * up);
        return;
    }
    if (feature >= a.n) return;
    if (IS_8_BIT) value *= a.scales[feature];
    if (a.bias != nullptr && split == 0) value += to_float(a.bias[feature]);
    long long at = ((long long)split * a.t + token) * a.n + feature;
    if (OUTPUT == 1)
        static_cast<u16*>(a.out)[at] = to_element(value);
    else
        static_cast<float*>(a.out)[at] = value;
}

// The output feature of a row of a tile that isn't gated.
__device__ __forceinline__ int feature_of(const Arguments& a, int tile, int row) {
    if (PAIRED) return tile * 8 + (row & 7) + (row >> 3) * (a.n / 2);
    return tile * 16 + row;
}

// A warp that has a row tile to itself stores from registers: lane (g, c) has rows g, g + 8 and tokens 2c, 2c + 1.
__device__ __forceinline__ void store_registers(const Arguments& a, int split, int tile, float (&sums)[TILES_T][4],
                                                int lane) {
    int group = lane >> 2;
#pragma unroll
    for (int i = 0; i < TILES_T; i++) {
#pragma unroll
        for (int e = 0; e < 2; e++) {
            int token = i * 8 + (lane & 3) * 2 + e;
            if (GATED) {
                store(a, split, token, tile * 8 + group, sums[i][e], sums[i][e + 2]);
            } else {
                store(a, split, token, feature_of(a, tile, group), sums[i][e], 0.0f);
                store(a, split, token, feature_of(a, tile, group + 8), sums[i][e + 2], 0.0f);
            }
        }
    }
}

// shared: [WARPS_K][PASS_TILES][TOKENS][TOKEN_STRIDE] float
__device__ __forceinline__ void share_sums(float* shared, int tile, int warp_k, float (&sums)[TILES_T][4], int lane) {
    float* to = shared + (warp_k * PASS_TILES + tile) * TOKENS * TOKEN_STRIDE + (lane >> 2);
#pragma unroll
    for (int i = 0; i < TILES_T; i++) {
#pragma unroll
        for (int e = 0; e < 2; e++) {
            int token = i * 8 + (lane & 3) * 2 + e;
            to[token * TOKEN_STRIDE] = sums[i][e];
            to[token * TOKEN_STRIDE + 8] = sums[i][e + 2];
        }
    }
}

__device__ __forceinline__ float add_up(const float* from) {
    float sum = 0.0f;
#pragma unroll
    for (int w = 0; w < WARPS_K; w++) sum += from[w * PASS_TILES * TOKENS * TOKEN_STRIDE];
    return sum;
}

// The sums of a pass's row tiles, `first_tile` being tile 0, from what share_sums left.
__device__ __forceinline__ void store_shared(const Arguments& a, const float* shared, int split, int first_tile,
                                             int num_tiles) {
    int values = PASS_TILES * a.t * TILE_ROWS;
    for (int i = threadIdx.x; i < values; i += NUM_THREADS) {
        int row = i % TILE_ROWS, tile = i / TILE_ROWS % PASS_TILES, token = i / (TILE_ROWS * PASS_TILES);
        if (tile >= num_tiles) continue;
        const float* from = shared + (tile * TOKENS + token) * TOKEN_STRIDE + row;
        float value = add_up(from);
        float up = GATED ? add_up(from + 8) : 0.0f;
        int feature = GATED ? (first_tile + tile) * 8 + row : feature_of(a, first_tile + tile, row);
        store(a, split, token, feature, value, up);
    }
}

// Where a warp's next copies come from.
struct Stream {
    Weights weights[TILES_M];
    bool present[TILES_M];  // whether the row tile exists
    int count;              // slots of the slice that hold a unit for this warp

    // To a slice of the pass that begins at `pass_tile`; with none past `last_tile`.
    __device__ __forceinline__ void seek(const Arguments& a, int pass_tile, int last_tile, int first_unit, int units,
                                         int slice, int warp_m, int warp_k, int lane) {
        int unit = slice * SLICE_UNITS + warp_k;
        count = max(0, (units - unit + WARPS_K - 1) / WARPS_K);
#pragma unroll
        for (int m = 0; m < TILES_M; m++) {
            int tile = pass_tile + m * WARPS_M + warp_m;
            present[m] = tile < last_tile;
            weights[m].seek(a, tile, first_unit + unit, lane);
        }
        if (!present[0]) count = 0;
    }

    // One group of copies per slot, be it empty, so that a slot's group is always DEPTH - 1 groups old.
    template <int SLOT>
    __device__ __forceinline__ void copy(u32 ring, int lane) const {
        if (SLOT < count) {
#pragma unroll
            for (int m = 0; m < TILES_M; m++)
                if (m == 0 || present[m])
                    weights[m].template copy<SLOT>(ring + (SLOT * TILES_M + m) * Weights::UNIT_BYTES, lane);
        }
        commit_copies();
    }
};

template <int SLOT>
__device__ __forceinline__ void fill(const Stream& stream, u32 ring, int lane) {
    if constexpr (SLOT < DEPTH) {
        stream.copy<SLOT>(ring, lane);
        fill<SLOT + 1>(stream, ring, lane);
    }
}

// Multiplies the `count` units in the ring (row tiles that don't exist: whatever is there) and refills each
// slot at once.
template <int SLOT>
__device__ __forceinline__ void work(const Arguments& a, Sums& sums, const Stream& stream, int count,
                                     u32 ring, u32 x_warp, int lane) {
    if constexpr (SLOT < DEPTH) {
        wait_for_copies<DEPTH - 1>();
        if (SLOT < count)
            Weights::multiply(a, sums, ring + SLOT * TILES_M * Weights::UNIT_BYTES,
                              x_warp + SLOT * WARPS_K * UNIT_BYTES_X, lane);
        stream.copy<SLOT>(ring, lane);
        work<SLOT + 1>(a, sums, stream, count, ring, x_warp, lane);
    }
}

extern "C" __global__ void __launch_bounds__(NUM_THREADS, MIN_CTAS) linear(const __grid_constant__ Arguments a) {
    extern __shared__ __align__(128) char shared[];
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const int warp_m = warp / WARPS_K, warp_k = warp % WARPS_K;
    const int split = blockIdx.y;

    const int share = blockIdx.x;
    const int first_tile = share * a.tiles + min(share, a.tiles_extra);
    const int last_tile = first_tile + a.tiles + (share < a.tiles_extra);
    const int first_unit = split * a.units + min(split, a.units_extra);
    const int units = a.units + (split < a.units_extra);
    const int slices = (units + SLICE_UNITS - 1) / SLICE_UNITS;
    const int slice_bytes = min(units, SLICE_UNITS) * UNIT_BYTES_X;

    constexpr int WARP_RING = DEPTH * TILES_M * Weights::UNIT_BYTES;
    const u32 ring = shared_address(shared) + warp * WARP_RING;
    const u32 x_shared = shared_address(shared) + WARPS_M * WARPS_K * WARP_RING;

    // Weights are constant: they may be read while the kernel before still runs.
    Stream stream;
    stream.seek(a, first_tile, last_tile, first_unit, units, 0, warp_m, warp_k, lane);
    fill<0>(stream, ring, lane);
    const int prefetch_tile = first_tile + a.prefetch_first_tile;
    for (int tile = prefetch_tile + warp; tile < min(last_tile, prefetch_tile + a.prefetch_tiles);
         tile += WARPS_M * WARPS_K)
        Weights::prefetch(a, tile, first_unit + a.prefetch_first_unit,
                          min(units - a.prefetch_first_unit, a.prefetch_units), lane);
    let_next_kernel_start();
    wait_for_previous_kernel();

    auto copy_slice = [&](int slice, int buffer) {
        int unit = slice * SLICE_UNITS;
        copy_x(a, x_shared + buffer * slice_bytes, first_unit + unit, min(units - unit, SLICE_UNITS));
    };
    if (a.resident) {
        copy_x(a, x_shared, first_unit, units);
    } else {  // at least X_BUFFERS slices
        copy_slice(0, 0);
        copy_slice(1, 1);
    }
    commit_copies();
    wait_for_copies<0>();
    __syncthreads();

    int buffer = 0, area = 0;
    for (int pass_tile = first_tile; pass_tile < last_tile; pass_tile += PASS_TILES) {
        Sums sums = {};
        for (int slice = 0; slice < slices; slice++) {
            if (!a.resident) {
                // Every warp is done with the buffer of the step before, and sees the x of this one: it was
                // copied along with weights that its copier has used since.
                __syncthreads();
                int next = slice + 2 < slices ? slice + 2 : slice + 2 - slices;
                if (next == slice + 2 || pass_tile + PASS_TILES < last_tile)
                    copy_slice(next, buffer == 0 ? X_BUFFERS - 1 : buffer - 1);
            }
            const int count = stream.count;
            const bool is_last = slice + 1 == slices;
            stream.seek(a, is_last ? pass_tile + PASS_TILES : pass_tile, last_tile, first_unit, units,
                        is_last ? 0 : slice + 1, warp_m, warp_k, lane);
            const u32 x_slice = x_shared + (a.resident ? slice : buffer) * slice_bytes;
            work<0>(a, sums, stream, count, ring, x_slice + warp_k * UNIT_BYTES_X, lane);
            buffer = buffer == X_BUFFERS - 1 ? 0 : buffer + 1;
        }
        if constexpr (WARPS_K == 1) {
#pragma unroll
            for (int m = 0; m < TILES_M; m++) {
                int tile = pass_tile + m * WARPS_M + warp_m;
                if (tile < last_tile) store_registers(a, split, tile, sums[m], lane);
            }
        } else {
            // Two areas in turn: while one is read, no warp can be further than writing the other.
            int x_bytes = a.resident ? units * UNIT_BYTES_X : X_BUFFERS * slice_bytes;
            float* to = (float*)(shared + WARPS_M * WARPS_K * WARP_RING + x_bytes) + area * SUM_FLOATS;
            area ^= 1;
#pragma unroll
            for (int m = 0; m < TILES_M; m++) share_sums(to, m * WARPS_M + warp_m, warp_k, sums[m], lane);
            __syncthreads();
            store_shared(a, to, split, pass_tile, min(PASS_TILES, last_tile - pass_tile));
        }
    }
}
