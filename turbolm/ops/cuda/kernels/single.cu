// y[n] = x[k] @ w[n, k]^T for one row of x and weights of 4 bits, bound by the time to read w.
//
// Unpacking takes the arithmetic units about as long as memory takes to bring codes, so nothing else may cost much: a
// warp keeps its part of x in registers, as B fragments of mma.m16n8k16 whose columns are all alike, for all the row
// tiles that it goes through; codes are multiplied as the bits make them, and what these add to them, as well as the
// zero point, goes off the sums by the sum of x; weights come as one bulk copy per row tile, which one lane asks for.
//
//   unit   16 rows x 128 k of w (int4.cuh)
//   pass   ROUNDS * WARPS_M row tiles, whose sums the CTA adds up over warps at once
//
// CTA (r, s) computes the r-th share of the row tiles over the s-th share of the units of k. Its warps (m, i) take the
// row tiles m, m + WARPS_M, … and the i-th share of the CTA's units, at most UNITS. Each has a ring of STAGES row tiles.
//
// Constants of the compiler's command line: ELEMENT_FP16, WARPS_M, WARPS_K, UNITS, STAGES, ROUNDS, MIN_CTAS, GROUPS
// (int4.cuh), OUTPUT (0: float32 parts [S, n], 1: elements [n], 2: float32 [n], 3: gated, elements [n / 2]), ACTIVATION.

#include "ptx.cuh"

#include "activation.cuh"
#include "int4.cuh"
#include "words.cuh"

constexpr int NUM_WARPS = WARPS_M * WARPS_K, NUM_THREADS = 32 * NUM_WARPS;
constexpr int UNIT_K = 128, STEPS = UNIT_K / 16, GROUP_STEPS = STEPS / GROUPS;  // a step: 16 k, an MMA
constexpr int SLOT_BYTES = UNITS * INT4_UNIT_BYTES, RING_BYTES = STAGES * SLOT_BYTES;
constexpr int BARRIER_BYTES = (NUM_WARPS * STAGES * 8 + 127) / 128 * 128;
constexpr int PASS_TILES = WARPS_M * ROUNDS, SUM_FLOATS = PASS_TILES * WARPS_K * 16;
constexpr int CHAINS = UNITS >= 3 ? 1 : 2;  // of MMAs per unit: one that adds to the sums of the one before waits for it
constexpr bool GATED = OUTPUT == 3;
constexpr u32 ONES = ELEMENT_FP16 ? 0x3c003c00 : 0x3f803f80;
// Codes as elements: float16 has subnormal numbers for them, of 2^-24; bfloat16 what CODE_BASE makes of them, 128 more.
constexpr u32 FRONT = ELEMENT_FP16 ? 0 : CODE_BASE;
constexpr float BASE = ELEMENT_FP16 ? 0.0f : 128.0f, ONE = ELEMENT_FP16 ? 16777216.0f : 1.0f;

struct Arguments {
    const u16* x;     // [k]
    const void* w;    // units [n / 16, k / 128, ·]
    const u16* bias;  // [n] or null
    void* out;
    int n, k;
    int tiles, tiles_extra;  // row tiles of every CTA; the first `tiles_extra` CTAs have one more
    int units, units_extra;  // the same of units of k, for gridDim.y
    u32 code_mask;           // see int4.cuh
};

// -(BASE + zero) of a row's word.
__device__ __forceinline__ float minus_zero(u32 word) {
    return 8388608.0f - BASE - __uint_as_float(0x4b000000 | (word & 31));  // 2^23, which the bits of zero add to
}

// Units of x: zeros from `count` on, so that nothing need ask how many there are.
struct Row {
    u32 fragments[STEPS][UNITS][2];
    float sums[GROUPS][UNITS];  // over a group's k

    __device__ __forceinline__ void read(u32 x_shared, int first_unit, int count, int lane) {
#pragma unroll
        for (int step = 0; step < STEPS; step++) {
#pragma unroll
            for (int unit = 0; unit < UNITS; unit++) {
                const int own = first_unit + min(unit, max(count - 1, 0));
                const u32 from = x_shared + own * UNIT_K * 2 + step * 32 + (lane & 3) * 4;
                const u32 mask = unit < count ? ~0u : 0;
                fragments[step][unit][0] = read_shared_word(from) & mask;
                fragments[step][unit][1] = read_shared_word(from + 16) & mask;
            }
        }
#pragma unroll
        for (int group = 0; group < GROUPS; group++) {
            float all[UNITS][4] = {};  // every row of A is ones
#pragma unroll
            for (int step = group * GROUP_STEPS; step < (group + 1) * GROUP_STEPS; step++) {
#pragma unroll
                for (int unit = 0; unit < UNITS; unit++) {
                    const u32(&b)[2] = fragments[step][unit];
                    multiply_add(all[unit], ONES, ONES, ONES, ONES, b[0], b[1]);
                }
            }
#pragma unroll
            for (int unit = 0; unit < UNITS; unit++) sums[group][unit] = all[unit][0];
        }
    }
};

// This warp's units times x, side by side: rows g and g + 8 of their row tile.
__device__ __forceinline__ void multiply(const Arguments& a, const Row& x, int count, u32 slot, int lane,
                                         float (&sums)[2]) {
    uint4 codes[UNITS];
#pragma unroll
    for (int group = 0; group < GROUPS; group++) {
        uint2 words[UNITS];
#pragma unroll
        for (int unit = 0; unit < UNITS; unit++)
            words[unit] =
                read_shared_pair(slot + unit * INT4_UNIT_BYTES + INT4_CODE_BYTES + group * 64 + (lane >> 2) * 8);
        float parts[CHAINS][UNITS][4] = {};
#pragma unroll
        for (int i = 0; i < GROUP_STEPS; i++) {
            const int step = group * GROUP_STEPS + i;
            if (step % 4 == 0) {
#pragma unroll
                for (int unit = 0; unit < UNITS; unit++)
                    codes[unit] = read_shared(slot + unit * INT4_UNIT_BYTES + step / 4 * 512 + lane * 16);
            }
#pragma unroll
            for (int unit = 0; unit < UNITS; unit++) {
                const u32 word = word_of(codes[unit], step % 4);
                u32 f[4];
#pragma unroll
                for (int p = 0; p < 4; p++) f[p] = ((word >> (4 * p)) & a.code_mask) | FRONT;
                const u32(&b)[2] = x.fragments[step][unit];
                multiply_add(parts[i % CHAINS][unit], f[0], f[1], f[2], f[3], b[0], b[1]);
            }
        }
#pragma unroll
        for (int unit = 0; unit < UNITS; unit++) {
#pragma unroll
            for (int e = 0; e < 2; e++) {
                const u32 word = e == 0 ? words[unit].x : words[unit].y;
                const float scale = unit < count ? Int4Row(word).scale : 0.0f;
                float part = parts[0][unit][2 * e];
#pragma unroll
                for (int chain = 1; chain < CHAINS; chain++) part += parts[chain][unit][2 * e];
                sums[e] += (part * ONE + minus_zero(word) * x.sums[group][unit]) * scale;
            }
        }
    }
}

__device__ __forceinline__ float add_up(const float* from) {
    float sum = 0.0f;
#pragma unroll
    for (int w = 0; w < WARPS_K; w++) sum += from[w * PASS_TILES * 16];
    return sum;
}

// The sums of a pass's row tiles, `first_tile` being tile 0: shared is [WARPS_K][PASS_TILES][16].
__device__ __forceinline__ void store(const Arguments& a, const float* shared, int first_tile, int num_tiles) {
    const int half = a.n / 2;
    for (int i = threadIdx.x; i < num_tiles * (GATED ? 8 : 16); i += NUM_THREADS) {
        const int tile = GATED ? i / 8 : i / 16, row = GATED ? i % 8 : i % 16;
        const float sum = add_up(shared + tile * 16 + row);
        const int feature = (first_tile + tile) * 8 + (row & 7) + (row >> 3) * half;
        if (GATED) {
            const float up = add_up(shared + tile * 16 + row + 8);
            static_cast<u16*>(a.out)[feature] = to_element(activate(sum) * up);
            continue;
        }
        const float value = a.bias != nullptr && blockIdx.y == 0 ? sum + to_float(a.bias[feature]) : sum;
        if (OUTPUT == 1)
            static_cast<u16*>(a.out)[feature] = to_element(value);
        else
            static_cast<float*>(a.out)[(long long)blockIdx.y * a.n + feature] = value;
    }
}

extern "C" __global__ void __launch_bounds__(NUM_THREADS, MIN_CTAS) single(const __grid_constant__ Arguments a) {
    extern __shared__ __align__(128) char shared[];
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const int warp_m = warp / WARPS_K, warp_k = warp % WARPS_K;
    const int share = blockIdx.x, split = blockIdx.y;

    const int first_tile = share * a.tiles + min(share, a.tiles_extra);
    const int last_tile = first_tile + a.tiles + (share < a.tiles_extra);
    const int first_unit = split * a.units + min(split, a.units_extra);
    const int units = a.units + (split < a.units_extra);
    const int own_unit = min(warp_k * (units / WARPS_K) + min(warp_k, units % WARPS_K), units - 1);
    const int count = units / WARPS_K + (warp_k < units % WARPS_K);

    const u32 barriers = shared_address(shared) + warp * STAGES * 8;
    const u32 ring = shared_address(shared) + BARRIER_BYTES + warp * RING_BYTES;
    float* const areas = reinterpret_cast<float*>(shared + BARRIER_BYTES + NUM_WARPS * RING_BYTES);  // of sums
    const u32 x_shared = shared_address(areas + 2 * SUM_FLOATS);

    const long long tile_bytes = (long long)(a.k / UNIT_K) * INT4_UNIT_BYTES;
    const char* from = static_cast<const char*>(a.w) + (first_tile + warp_m) * tile_bytes +
                       (long long)(first_unit + own_unit) * INT4_UNIT_BYTES;
    int left = count == 0 ? 0 : (last_tile - first_tile - warp_m + WARPS_M - 1) / WARPS_M;  // row tiles to ask for
    auto ask = [&](int stage) {
        if (left <= 0) return;
        if (lane == 0) copy_bulk(ring + stage * SLOT_BYTES, from, count * INT4_UNIT_BYTES, barriers + stage * 8);
        from += WARPS_M * tile_bytes;
        left--;
    };
    if (lane == 0) {
#pragma unroll
        for (int stage = 0; stage < STAGES; stage++) make_barrier(barriers + stage * 8);
        show_barriers();
    }
    sync_warp();
    // Weights are constant: they may be read while the kernel before still runs.
#pragma unroll
    for (int stage = 0; stage < STAGES; stage++) ask(stage);
    let_next_kernel_start();
    wait_for_previous_kernel();

    for (int i = threadIdx.x; i < units * (UNIT_K / 8); i += NUM_THREADS)
        copy_async(x_shared + i * 16, a.x + first_unit * UNIT_K + i * 8);
    commit_copies();
    wait_for_copies<0>();
    __syncthreads();
    Row x;
    x.read(x_shared, own_unit, count, lane);

    int stage = 0, turn = 0;
    u32 parity = 0;
    for (int pass_tile = first_tile; pass_tile < last_tile; pass_tile += PASS_TILES) {
        const int num_tiles = min(PASS_TILES, last_tile - pass_tile);
        // Two areas in turn: while one is read, no warp can be further than writing the other.
        float* const area = areas + turn * SUM_FLOATS;
        turn ^= 1;
#pragma unroll 1
        for (int tile = warp_m; tile < num_tiles; tile += WARPS_M) {
            float sums[2] = {};
            if (count > 0) {
                wait_for_bulk(barriers + stage * 8, parity);
                multiply(a, x, count, ring + stage * SLOT_BYTES, lane, sums);
                sync_warp();
                ask(stage);
                if (++stage == STAGES) stage = 0, parity ^= 1;
            }
            if (lane % 4 == 0) {  // the other columns are the same
                float* to = area + (warp_k * PASS_TILES + tile) * 16 + lane / 4;
                to[0] = sums[0], to[8] = sums[1];
            }
        }
        __syncthreads();
        store(a, area, pass_tile, num_tiles);
    }
}
