// Paged attention of one new token per sequence, bound by the time to read K and V.
//
// A tile is 16 positions of one sequence and kv head: 16 rows of K and of V, each contiguous. All tiles of
// all (sequence, kv head) pairs, laid end to end, are cut into equal shares, one per warp (stream-K: Osama et
// al., 2023). A warp works alone: it keeps DEPTH tiles in flight in a ring of shared memory that nobody else
// touches, so that nothing waits for another warp, and the ring runs on from pair to pair. A copy takes 512
// consecutive bytes (64 of each of 8 rows, as fragments want them, read at 3/4 of the speed); where its 16-byte
// pieces go is chosen so that reading fragments meets no bank twice.
//
// The product with K takes 16 bytes, 8 consecutive dimensions of a row, as the B fragments of two
// mma.m16n8k16; that permutes the dimensions, the same way for q. Lane (g, c) = (lane / 4, lane % 4): query
// head g of the group, positions 2c, 2c + 1, 8 + 2c, 9 + 2c. For the product with V a lane holds 8 consecutive
// dimensions of those four positions; the permutation leaves it 16 consecutive dimensions of a result row.
//
// A pair that a cut divides is put together first by the warps of a CTA, whose shares lie side by side, then
// by the CTA that finishes last, in the order of the context: results don't depend on who that is.
//
// With codes instead of numbers (codes.cuh) rows are shorter, those of V hold two positions each, and a tile has its
// scales beside it.
//
// Constants of the compiler's command line: ELEMENT_FP16, CODES (0: K and V are elements; 1: int8, 2: int4, 3: fp8),
// DIM (64, 128 or 256, of K and of V), GROUP (query heads per kv head, up to 8), KV_HEADS, BLOCK_SIZE (a multiple of
// 16), WARPS, DEPTH, WINDOW (0: none), SOFTCAP (0 or 1).

#include "ptx.cuh"
#include "warp.cuh"

constexpr int TILE = 16;
constexpr int V_PARTS = DIM / 64;
constexpr int ROW_BYTES = CODES == 0 ? DIM * 2 : CODES == 2 ? DIM / 2 : DIM;  // of a position
constexpr int COPIES = TILE * ROW_BYTES / 512;  // of K, and of V
constexpr int COPY_ROWS = TILE / COPIES;
constexpr int SCALES_AT = 2 * TILE * ROW_BYTES;                              // in a slot, behind K and V
constexpr int SLOT_BYTES = SCALES_AT + (CODES == 1 || CODES == 2 ? TILE * 8 : 0);  // of K's, then V's
constexpr int RING_BYTES = DEPTH * SLOT_BYTES;
constexpr float LOG2_E = 1.4426950408889634f;
constexpr float NOTHING = -1e30f;  // the peak of no logit: finite, so that no difference is NaN

struct Arguments {
    const u16* q;         // [sequences, ·]: query heads of DIM, rows q_stride apart
    const char* k;        // [blocks, KV_HEADS, BLOCK_SIZE, DIM]
    const char* v;        // the same; codes [blocks, KV_HEADS, BLOCK_SIZE / 2, bytes of a position, 2]
    const u32* k_scales;  // [blocks, KV_HEADS, BLOCK_SIZE]: scale and minimum, float16, of int8 and int4
    const u32* v_scales;
    const int* tables;    // [sequences, ·] block ids, rows table_stride apart
    const int* contexts;  // [sequences] positions; 0: the row becomes zeros
    u16* out;             // [sequences, ·], rows out_stride apart
    float* parts;         // [2 * CTAs, GROUP, DIM]
    float* stats;         // [2 * CTAs, GROUP, 2]: peak, total
    int* counters;        // [sequences * KV_HEADS], 0 before and after
    long long q_stride, out_stride, table_stride;
    int num_sequences;
    float scale, softcap;
};

// Tiles of a sequence per kv head. One without context has one, all masked, so that its row is written.
__device__ __forceinline__ int first_tile_of(int context) {
    return WINDOW > 0 ? max(context - WINDOW, 0) / TILE : 0;
}
__device__ __forceinline__ int tiles_of(int context) {
    return max((context + TILE - 1) / TILE - first_tile_of(context), 1);
}

// Bits by which the place of a row's pieces of 16 bytes is changed. A quarter of a warp reads 4 neighbouring pieces of
// 2 neighbouring rows of K, and 2 neighbouring pieces of 4 rows of V, every other one.
// Of codes it is 4 rows of V; rows of 64 bytes of K lie right as they are.
__host__ __device__ constexpr int k_swizzle(int row) { return ROW_BYTES % 128 ? 0 : (row & 1) * 64; }
__host__ __device__ constexpr int v_swizzle(int row) { return ((CODES ? row : row >> 1) & 3) * 32; }

// Which tile of which pair.
struct Place {
    int sequence, head, index, tiles, context;  // `index` of the sequence's `tiles`

    __device__ __forceinline__ void enter(const Arguments& a) {
        context = sequence < a.num_sequences ? a.contexts[sequence] : 0;
        tiles = tiles_of(context);
    }
    __device__ __forceinline__ void advance(const Arguments& a) {
        if (++index < tiles) return;
        index = 0;
        if (++head < KV_HEADS) return;
        head = 0;
        sequence++;
        enter(a);
    }
    __device__ __forceinline__ int first_position() const { return (first_tile_of(context) + index) * TILE; }
};

// The step's tiles, added up lane by lane: each lane has `run` neighbouring sequences, whose contexts are read all at
// once and but one more time.
struct Sums {
    int run, end;  // end: the tiles, times heads, of this lane's sequences and of those before

    __device__ __forceinline__ Sums(const Arguments& a, int lane) : run((a.num_sequences + 31) / 32) {
        const int first = min(lane * run, a.num_sequences), last = min(first + run, a.num_sequences);
        int tiles = 0;
#pragma unroll 8
        for (int i = first; i < last; i++) tiles += tiles_of(a.contexts[i]);
        end = sum_up_to_lane(tiles, lane) * KV_HEADS;
    }
    __device__ __forceinline__ int all() const { return from_lane(end, 31); }
};

// Where tile number `unit` is. pair_start: the number of its pair's first tile.
__device__ __forceinline__ Place find_place(const Arguments& a, const Sums& sums, int unit, int& pair_start, int lane) {
    const int owner = first_lane_where(sums.end > unit);  // of the sequence
    int before = owner == 0 ? 0 : from_lane(sums.end, min(owner, 32) - 1);  // tiles, times heads
    Place place{a.num_sequences, 0, 0, 1, 0};
    for (int base = owner * sums.run; base < a.num_sequences; base += 32) {
        const int i = base + lane;
        const int context = i < a.num_sequences ? a.contexts[i] : 0;
        const int end = before + sum_up_to_lane(i < a.num_sequences ? tiles_of(context) : 0, lane) * KV_HEADS;
        const int mine = first_lane_where(end > unit);
        if (mine < 32) {
            place.sequence = base + mine;
            place.context = from_lane(context, mine);
            place.tiles = tiles_of(place.context);
            const int start = from_lane(end, mine) - place.tiles * KV_HEADS;
            place.head = (unit - start) / place.tiles;
            place.index = (unit - start) % place.tiles;
            pair_start = start + place.head * place.tiles;
            return place;
        }
        before = from_lane(end, 31);
    }
    pair_start = before;
    return place;
}

// The tiles in shares: of every worker `each`, of the first `extra` one more. A worker has at least a ring's worth.
struct Shares {
    int each, extra, work;

    __device__ __forceinline__ Shares(int work, int workers) : each(work / workers), extra(work % workers), work(work) {
        if (each < DEPTH) each = DEPTH, extra = 0;
    }
    __device__ __forceinline__ int begin_of(int worker) const { return min(worker * each + min(worker, extra), work); }
    __device__ __forceinline__ int cta_of(int unit) const {
        const int before = extra * (each + 1);
        return (unit < before ? unit / (each + 1) : extra + (unit - before) / each) / WARPS;
    }
};

// Brings tiles into the ring, one after the other.
struct Reader {
    Place place;
    int left;          // tiles to come
    int base, blocks;  // this lane's of 32 block ids, from block `base` of the sequence on

    __device__ __forceinline__ void begin(const Arguments& a, const Place& first, int count, int lane) {
        place = first;
        left = count;
        find_blocks(a, lane);
    }
    __device__ __forceinline__ void find_blocks(const Arguments& a, int lane) {
        if (left == 0) return;
        base = place.first_position() / BLOCK_SIZE;
        int block = base + lane;
        blocks = block * BLOCK_SIZE < place.context ? a.tables[place.sequence * a.table_stride + block] : 0;
    }
    // Whether the next tile holds the newest position, which an earlier kernel may still be writing.
    __device__ __forceinline__ bool is_fresh() const { return place.first_position() + TILE >= place.context; }

    // The next tile into the ring's slot `to`, as one group of copies, be it empty.
    __device__ __forceinline__ void copy(const Arguments& a, u32 to, int lane) {
        if (left > 0) {
            const int position = place.first_position(), valid = place.context - position;
            const int block = from_lane(blocks, (position / BLOCK_SIZE - base) & 31);
            const long long pair = (long long)block * KV_HEADS + place.head;
            const long long at = pair * (BLOCK_SIZE * ROW_BYTES) + position % BLOCK_SIZE * ROW_BYTES + lane * 16;
            // A lane's first row, of positions; of V with codes the first of two.
            const int row = lane / (32 / COPY_ROWS), v_row = CODES ? row & ~1 : row;
            copy_rows<0>(to + (lane * 16 ^ k_swizzle(row)), a.k + at, valid - row);
            copy_rows<COPIES>(to + (lane * 16 ^ v_swizzle(CODES ? row / 2 : row)), a.v + at, valid - v_row);
#if CODES == 1 || CODES == 2
            if (lane < 8) {
                const u32* scales = (lane < 4 ? a.k_scales : a.v_scales) + pair * BLOCK_SIZE + position % BLOCK_SIZE;
                copy_async_or_zero<SCALES_AT, 0>(to + lane * 16, scales + lane % 4 * 4, valid > lane % 4 * 4);
            }
#endif
            left--;
            advance(a, lane);
        }
        commit_copies();
    }
    // From the FIRST-th copy of a slot on, all of K or of V; `rows` of this lane's are there.
    template <int FIRST, int I = 0>
    __device__ static __forceinline__ void copy_rows(u32 to, const char* from, int rows) {
        if constexpr (I < COPIES) {
            constexpr int ROW = I * COPY_ROWS;
            constexpr int SWIZZLE = FIRST == 0 ? k_swizzle(ROW) : v_swizzle(CODES ? ROW / 2 : ROW);
            copy_async_or_zero<(FIRST + I) * 512, I * 512>(to ^ SWIZZLE, from, rows > ROW);
            copy_rows<FIRST, I + 1>(to, from, rows);
        }
    }
    __device__ __forceinline__ void advance(const Arguments& a, int lane) {
        int sequence = place.sequence;
        place.advance(a);
        // Within a sequence ids are read again only where the window of 32 is left, or a head starts over.
        int block = place.first_position() / BLOCK_SIZE;
        if (place.sequence != sequence || block < base || block >= base + 32) find_blocks(a, lane);
    }
};

#if CODES
#include "codes.cuh"
#else
constexpr int K_PARTS = DIM / 32;

// The online softmax of one pair over some of its tiles (Milakov and Gimelshein, 2018), in powers of two. Lane
// (g, c): row g; of the result dimensions 64h + 16c .. + 15 as sums[8h + i][e], i + 8e being the last four bits.
struct State {
    uint4 query[K_PARTS];
    float sums[8 * V_PARTS][4];
    float peak, total;  // total: of this lane's positions

    __device__ __forceinline__ void begin(const Arguments& a, const Place& place, int lane) {
        const int g = lane >> 2, c = lane & 3;
        const u16* q = a.q + place.sequence * a.q_stride + (place.head * GROUP + g) * DIM + c * 8;
#pragma unroll
        for (int j = 0; j < K_PARTS; j++) query[j] = g < GROUP ? read_global(q + j * 32) : uint4{0, 0, 0, 0};
#pragma unroll
        for (int i = 0; i < 8 * V_PARTS; i++)
#pragma unroll
            for (int e = 0; e < 4; e++) sums[i][e] = 0.0f;
        peak = NOTHING;
        total = 0.0f;
    }

    __device__ __forceinline__ void attend(const Arguments& a, const Place& place, u32 slot, int lane) {
        const int c = lane & 3, position = place.first_position();
        float logits[2][4] = {};
        const int g = lane >> 2;
        const u32 keys = slot + g * ROW_BYTES + (c * 16 ^ k_swizzle(g));
#pragma unroll
        for (int j = 0; j < K_PARTS; j++) {
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const uint4 k = read_shared((keys ^ j * 64) + i * 8 * ROW_BYTES);
                multiply_add(logits[i], query[j].x, 0, query[j].y, 0, k.x, k.y);
                multiply_add(logits[i], query[j].z, 0, query[j].w, 0, k.z, k.w);
            }
        }
        float weights[4];
        float highest = peak;
#pragma unroll
        for (int r = 0; r < 4; r++) {
            float logit = logits[r >> 1][r & 1] * a.scale;
#if SOFTCAP
            logit = a.softcap * (1.0f - 2.0f / (power_of_two(logit * (2.0f * LOG2_E) / a.softcap) + 1.0f));
#endif
            const int at = position + (r & 1) + (r >> 1) * 8 + c * 2;
            const bool is_seen = at < place.context && (WINDOW == 0 || at >= place.context - WINDOW);
            weights[r] = is_seen ? logit * LOG2_E : NOTHING;
            highest = fmaxf(highest, weights[r]);
        }
        if (is_any(highest > peak)) raise(highest);  // seldom: only then lanes tell each other theirs
        const float base = peak == NOTHING ? 0.0f : peak;
#pragma unroll
        for (int r = 0; r < 4; r++) {
            weights[r] = power_of_two(weights[r] - base);
            total += weights[r];
        }
        const u32 values = slot + TILE * ROW_BYTES + 2 * c * ROW_BYTES + (g * 16 ^ v_swizzle(2 * c));
        add_values(values, pack_elements(weights[0], weights[1]), pack_elements(weights[2], weights[3]));
    }

    // To a higher peak; highest: of this lane's positions.
    __device__ __forceinline__ void raise(float highest) {
        highest = fmaxf(highest, from_lane_xor(highest, 1));
        highest = fmaxf(highest, from_lane_xor(highest, 2));
        const float shrink = highest == NOTHING ? 1.0f : power_of_two(peak - highest);
        peak = highest;
        total *= shrink;
#pragma unroll
        for (int i = 0; i < 8 * V_PARTS; i++) {
            sums[i][0] *= shrink;
            sums[i][1] *= shrink;
        }
    }

    // values: where this lane's first piece of row 2c is.
    __device__ __forceinline__ void add_values(u32 values, u32 weights_low, u32 weights_high) {
#pragma unroll
        for (int h = 0; h < V_PARTS; h++) {
            uint4 v[4];
#pragma unroll
            for (int r = 0; r < 4; r++) v[r] = read_shared(values + ((r & 1) + (r >> 1) * 8) * ROW_BYTES + h * 128);
            add_pair(h * 8 + 0, v[0].x, v[1].x, v[2].x, v[3].x, weights_low, weights_high);
            add_pair(h * 8 + 2, v[0].y, v[1].y, v[2].y, v[3].y, weights_low, weights_high);
            add_pair(h * 8 + 4, v[0].z, v[1].z, v[2].z, v[3].z, weights_low, weights_high);
            add_pair(h * 8 + 6, v[0].w, v[1].w, v[2].w, v[3].w, weights_low, weights_high);
        }
    }
    // Two neighbouring dimensions of four positions.
    __device__ __forceinline__ void add_pair(int i, u32 v0, u32 v1, u32 v2, u32 v3, u32 low, u32 high) {
        multiply_add(sums[i], low, 0, high, 0, low_halves(v0, v1), low_halves(v2, v3));
        multiply_add(sums[i + 1], low, 0, high, 0, high_halves(v0, v1), high_halves(v2, v3));
    }

    // The row's total, in all its lanes.
    __device__ __forceinline__ void finish() {
        total += from_lane_xor(total, 1);
        total += from_lane_xor(total, 2);
    }

    // Dimension 16c + 8 * run + i of the h-th 64; finished.
    __device__ __forceinline__ float value(int h, int run, int i) const { return sums[h * 8 + i][run]; }
    __device__ __forceinline__ float peak_of(int) const { return peak; }
    __device__ __forceinline__ float total_of(int) const { return total; }
};

// What a lane holds of results: two runs of 8 dimensions of every 64, of one head.
__device__ __forceinline__ int head_of_run(int, int lane) { return lane >> 2; }
__device__ __forceinline__ int dimension_of_run(int run, int lane) { return (lane & 3) * 16 + run * 8; }
#endif

// A finished part of a pair: the two runs of 8 dimensions of every 64 that this lane's State has.
struct Part {
    float peak[2], total[2];  // of each run's head
    float values[V_PARTS][2][8];

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int run = 0; run < 2; run++) {
            peak[run] = NOTHING;
            total[run] = 0.0f;
#pragma unroll
            for (int h = 0; h < V_PARTS; h++)
#pragma unroll
                for (int i = 0; i < 8; i++) values[h][run][i] = 0.0f;
        }
    }
    __device__ __forceinline__ void add(int run, float other_peak, float other_total,
                                        const float (&other)[V_PARTS][8]) {
        const float highest = fmaxf(peak[run], other_peak), base = highest == NOTHING ? 0.0f : highest;
        const float shrink = power_of_two(peak[run] - base), factor = power_of_two(other_peak - base);
        total[run] = total[run] * shrink + other_total * factor;
#pragma unroll
        for (int h = 0; h < V_PARTS; h++)
#pragma unroll
            for (int i = 0; i < 8; i++) values[h][run][i] = values[h][run][i] * shrink + other[h][i] * factor;
        peak[run] = highest;
    }
    // To memory of [GROUP, DIM] floats and [GROUP, 2].
    __device__ __forceinline__ void keep(float* parts, float* stats, int lane) const {
#pragma unroll
        for (int run = 0; run < 2; run++) {
            const int head = head_of_run(run, lane), dimension = dimension_of_run(run, lane);
            if (head >= GROUP) continue;
            if (dimension == 0) {
                stats[2 * head] = peak[run];
                stats[2 * head + 1] = total[run];
            }
#pragma unroll
            for (int h = 0; h < V_PARTS; h++)
#pragma unroll
                for (int i = 0; i < 8; i += 4)
                    *reinterpret_cast<float4*>(parts + head * DIM + h * 64 + dimension + i) =
                        float4{values[h][run][i], values[h][run][i + 1], values[h][run][i + 2], values[h][run][i + 3]};
        }
    }
    // FRESH: from other CTAs, else from shared memory.
    template <bool FRESH>
    __device__ __forceinline__ void add_kept(const float* parts, const float* stats, int lane) {
#pragma unroll
        for (int run = 0; run < 2; run++) {
            const int head = head_of_run(run, lane), dimension = dimension_of_run(run, lane);
            if (head >= GROUP) continue;
            float other[V_PARTS][8];
#pragma unroll
            for (int h = 0; h < V_PARTS; h++)
#pragma unroll
                for (int i = 0; i < 8; i += 4) {
                    const float* from = parts + head * DIM + h * 64 + dimension + i;
                    const float4 four = FRESH ? read_fresh(from) : *reinterpret_cast<const float4*>(from);
                    other[h][i] = four.x, other[h][i + 1] = four.y, other[h][i + 2] = four.z, other[h][i + 3] = four.w;
                }
            const float* own = stats + 2 * head;
            add(run, FRESH ? read_fresh_float(own) : own[0], FRESH ? read_fresh_float(own + 1) : own[1], other);
        }
    }
    __device__ __forceinline__ void store(const Arguments& a, int sequence, int head, int lane) const {
#pragma unroll
        for (int run = 0; run < 2; run++) {
            const int row = head_of_run(run, lane);
            if (row >= GROUP) continue;
            const float factor = total[run] == 0.0f ? 0.0f : 1.0f / total[run];
            u16* out = a.out + sequence * a.out_stride + (head * GROUP + row) * DIM + dimension_of_run(run, lane);
#pragma unroll
            for (int h = 0; h < V_PARTS; h++) {
                const float(&x)[8] = values[h][run];
                uint4 packed;
                packed.x = pack_elements(x[0] * factor, x[1] * factor);
                packed.y = pack_elements(x[2] * factor, x[3] * factor);
                packed.z = pack_elements(x[4] * factor, x[5] * factor);
                packed.w = pack_elements(x[6] * factor, x[7] * factor);
                *reinterpret_cast<uint4*>(out + h * 64) = packed;
            }
        }
    }
};

__device__ __forceinline__ Part part_of(State& state) {
    state.finish();
    Part part;
#pragma unroll
    for (int run = 0; run < 2; run++) {
        part.peak[run] = state.peak_of(run);
        part.total[run] = state.total_of(run);
#pragma unroll
        for (int h = 0; h < V_PARTS; h++)
#pragma unroll
            for (int i = 0; i < 8; i++) part.values[h][run][i] = state.value(h, run, i);
    }
    return part;
}

// Parts of pairs that a warp leaves in shared memory: of the one that began before its share (FIRST; it may also go
// on after it), and of the one that begins in it and goes on (LAST).
enum { FIRST, LAST };

struct Leftover {
    int sequence, head, pair_start, pair_end;
    bool is_there, begins, ends;  // with the pair's first tile, with its last
};

constexpr int PART_FLOATS = (GROUP * (DIM + 2) + 3) / 4 * 4;

// LAST lies where the ring was: with it the share ends, and nothing is under way any more.
static_assert(PART_FLOATS * 4 <= RING_BYTES, "a part fits into the ring");

__device__ __forceinline__ float* leftover_area(char* shared, int warp, int which) {
    return reinterpret_cast<float*>(which == LAST ? shared + warp * RING_BYTES : shared + WARPS * RING_BYTES) +
           (which == LAST ? 0 : warp * PART_FLOATS);
}

// A CTA's part of a pair: to be put together with those of other CTAs by the last of them.
__device__ __forceinline__ void hand_in(const Arguments& a, const Leftover& pair, Part& part, bool begins,
                                        const Shares& shares, int lane) {
    const int slot = 2 * blockIdx.x + begins;
    part.keep(a.parts + (long long)slot * GROUP * DIM, a.stats + slot * GROUP * 2, lane);
    const int first = shares.cta_of(pair.pair_start), last = shares.cta_of(pair.pair_end - 1);
    int* counter = a.counters + pair.sequence * KV_HEADS + pair.head;
    if (count_up(counter, lane) != last - first) return;
    if (lane == 0) *counter = 0;
    part.clear();
    for (int cta = first; cta <= last; cta++) {
        const int from = 2 * cta + (cta == first);
        part.add_kept<true>(a.parts + (long long)from * GROUP * DIM, a.stats + from * GROUP * 2, lane);
    }
    part.store(a, pair.sequence, pair.head, lane);
}

// The leftovers of a CTA's warps, put together: those of a pair lie in a chain, which the warp where it starts
// walks down.
__device__ __forceinline__ void finish_chain(const Arguments& a, char* shared, const Leftover (*notes)[2], int warp,
                                             int which, const Shares& shares, int lane) {
    const Leftover start = notes[warp][which];
    const float* area = leftover_area(shared, warp, which);
    Part part;
    part.clear();
    part.add_kept<false>(area, area + GROUP * DIM, lane);
    bool ends = start.ends;
    for (int next = warp + 1; !ends && next < WARPS && notes[next][FIRST].is_there; next++) {
        area = leftover_area(shared, next, FIRST);
        part.add_kept<false>(area, area + GROUP * DIM, lane);
        ends = notes[next][FIRST].ends;
    }
    if (start.begins && ends)
        part.store(a, start.sequence, start.head, lane);
    else
        hand_in(a, start, part, start.begins, shares, lane);
}

extern "C" __global__ void __launch_bounds__(32 * WARPS) decode(const __grid_constant__ Arguments a) {
    extern __shared__ __align__(1024) char shared[];
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const u32 ring = shared_address(shared) + warp * RING_BYTES;
    Leftover(*notes)[2] = reinterpret_cast<Leftover(*)[2]>(leftover_area(shared, WARPS, FIRST));

    // Contexts, block tables and all but a sequence's newest K and V are older than the kernel before.
    const Sums sums(a, lane);
    const Shares shares(sums.all(), gridDim.x * WARPS);
    const int worker = blockIdx.x * WARPS + warp, begin = shares.begin_of(worker), end = shares.begin_of(worker + 1);
    int pair_start = 0;
    Place place = find_place(a, sums, begin, pair_start, lane);
    Reader reader;
    reader.begin(a, place, end - begin, lane);
    int num_early = 0;
    for (; num_early < DEPTH && reader.left > 0 && !reader.is_fresh(); num_early++)
        reader.copy(a, ring + num_early * SLOT_BYTES, lane);
    let_next_kernel_start();
    wait_for_previous_kernel();
    for (int slot = num_early; slot < DEPTH; slot++) reader.copy(a, ring + slot * SLOT_BYTES, lane);

    if (lane < 2) notes[warp][lane].is_there = false;
    __syncwarp();
    State state;
    bool begins = place.index == 0;
    if (begin < end) state.begin(a, place, lane);
    for (int unit = begin, slot = 0; unit < end; unit++) {
        wait_for_copies<DEPTH - 1>();
        __syncwarp();
        state.attend(a, place, ring + slot * SLOT_BYTES, lane);
        __syncwarp();
        reader.copy(a, ring + slot * SLOT_BYTES, lane);
        slot = slot + 1 == DEPTH ? 0 : slot + 1;
        const bool ends = place.index + 1 == place.tiles;
        if (ends || unit + 1 == end) {
            const Part part = part_of(state);
            if (begins && ends) {
                part.store(a, place.sequence, place.head, lane);
            } else {
                float* area = leftover_area(shared, warp, begins ? LAST : FIRST);
                part.keep(area, area + GROUP * DIM, lane);
                if (lane == 0)
                    notes[warp][begins ? LAST : FIRST] = {place.sequence, place.head, pair_start,
                                                          pair_start + place.tiles, true, begins, ends};
            }
        }
        if (ends) pair_start += place.tiles;
        place.advance(a);
        if (ends && unit + 1 < end) {
            begins = true;
            state.begin(a, place, lane);
        }
    }
    wait_for_copies<0>();
    __syncthreads();
    if (warp == 0 && notes[0][FIRST].is_there) finish_chain(a, shared, notes, 0, FIRST, shares, lane);
    if (notes[warp][LAST].is_there) finish_chain(a, shared, notes, warp, LAST, shares, lane);
}
