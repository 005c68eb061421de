// Attention over K and V that are kept as codes, which are multiplied as they lie, as float16: of int8 and int4 a
// subnormal one, code * 2^-24 (an odd nibble: code * 2^-20). With scale s and minimum m of a position
//
//     q·k = s (q·code) + m sum(q)              sum of p v = sum of (p s) code + sum of (p m)
//
// A tile's positions are rows of the products, query heads are columns: the positions fill an instruction's 16, and 8
// heads are as many as it has. Lane (g, c) = (lane / 4, lane % 4) of
//
//     logits   positions g and g + 8 by heads 2c and 2c + 1
//     results  dimensions 8g .. + 7 of every 64 by heads 2c and 2c + 1
//
// Dimensions of K are permuted as its bytes come apart, those of q alike. A byte pair of V is one dimension at two
// neighbouring positions, as a product wants them; int4 has dimension d + DIM / 2 in the upper nibbles.

#include "words.cuh"

enum { INT8 = 1, INT4 = 2, FP8 = 3 };

constexpr float UNITS = 16777216.0f;  // of subnormal codes in 1
constexpr float RAISE = 16.0f;        // of weights, so that scales of small values are not lost in float16
constexpr int NIBBLES = CODES == INT4 ? 2 : 1;
constexpr int K_PIECES = ROW_BYTES / 64;  // of 16 bytes that a lane takes of a row
constexpr int V_PIECES = ROW_BYTES / 64;

// Of int4, the low or the high nibbles.
__device__ __forceinline__ u32 nibbles(u32 bytes, int i) { return bytes & (i ? 0x00f000f0 : 0x000f000f); }

// Two numbers out of bytes 0 and 2, or 1 and 3; of fp8 out of bytes 0 and 1, or 2 and 3.
__device__ __forceinline__ u32 key_codes(u32 word, int second, int nibble) {
    if (CODES == FP8) return numbers_of_fp8(second ? word >> 16 : word);
    const u32 bytes = second ? odd_bytes(word) : even_bytes(word);
    return CODES == INT4 ? nibbles(bytes, nibble) : bytes;
}
// Out of bytes 0 and 1, or 2 and 3: one dimension at two positions.
__device__ __forceinline__ u32 value_codes(u32 word, int second, int nibble) {
    if (CODES == FP8) return numbers_of_fp8(second ? word >> 16 : word);
    const u32 bytes = second ? spread_high_bytes(word) : spread_low_bytes(word);
    return CODES == INT4 ? nibbles(bytes, nibble) : bytes;
}

struct State {
    u32 query[K_PIECES][4][NIBBLES][2];  // between -1 and 1
    float sums[4 * V_PARTS][4];          // [4h + i]: dimensions 2i (0, 1) and 2i + 1 (2, 3), heads 2c and 2c + 1
    float factor[2], shift[2];           // of a head's logits, beside scales and minima
    float peak[2], total[2], rest[2];    // rest: sum of (p m); total and rest of this lane's positions

    __device__ __forceinline__ void begin(const Arguments& a, const Place& place, int lane) {
        const int g = lane >> 2, c = lane & 3;
        const u16* q = a.q + place.sequence * a.q_stride + (place.head * GROUP + g) * DIM;
        float largest = 0.0f, sum = 0.0f;
#pragma unroll
        for (int j = 0; j < K_PIECES; j++)
#pragma unroll
            for (int nibble = 0; nibble < NIBBLES; nibble++) {
                float row[16];
                read_query(q + piece(j, c) + nibble * (DIM / 2), g < GROUP, row);
#pragma unroll
                for (int i = 0; i < 16; i++) largest = fmaxf(largest, fabsf(row[i]));
            }
        largest = fmaxf(largest, from_lane_xor(largest, 1));
        largest = fmaxf(largest, from_lane_xor(largest, 2));
        const float shrink = largest == 0.0f ? 0.0f : 1.0f / largest;
#pragma unroll
        for (int j = 0; j < K_PIECES; j++)
#pragma unroll
            for (int nibble = 0; nibble < NIBBLES; nibble++) {
                float row[16];
                read_query(q + piece(j, c) + nibble * (DIM / 2), g < GROUP, row);
                const float up = nibble ? 16.0f : 1.0f;  // codes of upper nibbles are that much larger
#pragma unroll
                for (int w = 0; w < 4; w++) {
                    const float* x = row + 4 * w;
                    const float own = shrink / up;
                    u32* pair = query[j][w][nibble];
                    pair[0] = pack_halves(x[0] * own, x[CODES == FP8 ? 1 : 2] * own);
                    pair[1] = pack_halves(x[CODES == FP8 ? 2 : 1] * own, x[3] * own);
                    sum += (sum_of_halves(pair[0]) + sum_of_halves(pair[1])) * up;
                }
            }
        sum += from_lane_xor(sum, 1);
        sum += from_lane_xor(sum, 2);
#pragma unroll
        for (int e = 0; e < 2; e++) {
            const float to_logit = a.scale * (SOFTCAP ? 2.0f * LOG2_E / a.softcap : LOG2_E);
            const float unit = from_lane(largest, (2 * c + e) * 4) * to_logit;
            factor[e] = CODES == FP8 ? unit : unit * UNITS;
            shift[e] = from_lane(sum, (2 * c + e) * 4) * unit;
            peak[e] = NOTHING;
            total[e] = rest[e] = 0.0f;
        }
#pragma unroll
        for (int i = 0; i < 4 * V_PARTS; i++)
#pragma unroll
            for (int e = 0; e < 4; e++) sums[i][e] = 0.0f;
    }
    // The first dimension of a lane's j-th piece of a row.
    __device__ static __forceinline__ int piece(int j, int c) { return 16 * (c + 4 * j); }
    __device__ static __forceinline__ void read_query(const u16* from, bool is_there, float (&row)[16]) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const uint4 words = is_there ? read_global(from + half * 8) : uint4{0, 0, 0, 0};
#pragma unroll
            for (int i = 0; i < 8; i++) row[half * 8 + i] = to_float(word_of(words, i / 2) >> (i % 2 * 16));
        }
    }

    __device__ __forceinline__ void attend(const Arguments& a, const Place& place, u32 slot, int lane) {
        const int g = lane >> 2, position = place.first_position();
        float logits[2][4] = {};  // two chains of products
        multiply_keys(slot, lane, logits);
        float weights[4];  // positions g (0, 1) and g + 8, heads 2c and 2c + 1
        u32 value_scales[2];
        float highest[2] = {peak[0], peak[1]};
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const int at = position + g + 8 * r;
            const bool is_seen = at < place.context && (WINDOW == 0 || at >= place.context - WINDOW);
            u32 key_scale = 0;
            value_scales[r] = 0;
            if (CODES != FP8) {
                const u32 scales = slot + SCALES_AT + (g + 8 * r) * 4;
                key_scale = read_shared_word(scales);
                value_scales[r] = is_seen ? read_shared_word(scales + TILE * 4) : 0;
            }
#pragma unroll
            for (int e = 0; e < 2; e++) {
                float logit = logits[0][2 * r + e] + logits[1][2 * r + e];
                if (CODES == FP8)
                    logit *= factor[e];
                else
                    logit = logit * (low_half(key_scale) * factor[e]) + high_half(key_scale) * shift[e];
#if SOFTCAP
                logit = a.softcap * LOG2_E * (1.0f - 2.0f / (power_of_two(logit) + 1.0f));
#endif
                weights[2 * r + e] = is_seen ? logit : NOTHING;
                highest[e] = fmaxf(highest[e], weights[2 * r + e]);
            }
        }
        // Seldom: only then lanes tell each other their peaks.
        if (is_any(highest[0] > peak[0] || highest[1] > peak[1])) raise(highest);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int e = i % 2;
            const float weight = power_of_two(weights[i] - (peak[e] == NOTHING ? 0.0f : peak[e]));
            total[e] += weight;
            if (CODES == FP8) {
                weights[i] = weight;
            } else {
                rest[e] += weight * high_half(value_scales[i / 2]);
                weights[i] = weight * (low_half(value_scales[i / 2]) * RAISE);
            }
        }
        add_values(slot, lane, transpose(pack_halves(weights[0], weights[1])),
                   transpose(pack_halves(weights[2], weights[3])));
    }

    __device__ __forceinline__ void multiply_keys(u32 slot, int lane, float (&logits)[2][4]) const {
        const int g = lane >> 2, c = lane & 3;
        const u32 row = slot + g * ROW_BYTES, at = c * 16 ^ k_swizzle(g);  // row g + 8 has the same
#pragma unroll
        for (int j = 0; j < K_PIECES; j++) {
            const u32 from = row + j / 2 * 128 + (at ^ j % 2 * 64);
            const uint4 low = read_shared(from), high = read_shared(from + 8 * ROW_BYTES);
#pragma unroll
            for (int w = 0; w < 4; w++)
#pragma unroll
                for (int nibble = 0; nibble < NIBBLES; nibble++) {
                    const u32 x = word_of(low, w), y = word_of(high, w);
                    const u32(&pair)[2] = query[j][w][nibble];
                    multiply_add_halves(logits[w % 2], key_codes(x, 0, nibble), key_codes(y, 0, nibble),
                                        key_codes(x, 1, nibble), key_codes(y, 1, nibble), pair[0], pair[1]);
                }
        }
    }

    // To higher peaks; highest: of this lane's positions.
    __device__ __forceinline__ void raise(float (&highest)[2]) {
#pragma unroll
        for (int e = 0; e < 2; e++) {
#pragma unroll
            for (int mask = 4; mask < 32; mask *= 2) highest[e] = fmaxf(highest[e], from_lane_xor(highest[e], mask));
            const float shrink = highest[e] == NOTHING ? 1.0f : power_of_two(peak[e] - highest[e]);
            peak[e] = highest[e];
            total[e] *= shrink;
            rest[e] *= shrink;
#pragma unroll
            for (int i = 0; i < 4 * V_PARTS; i++) {
                sums[i][e] *= shrink;
                sums[i][e + 2] *= shrink;
            }
        }
    }

    // weights: of positions 2c and 2c + 1, and of those 8 on, for head g.
    __device__ __forceinline__ void add_values(u32 slot, int lane, u32 weights, u32 weights_8_on) {
        const int g = lane >> 2, c = lane & 3;
        const u32 row = slot + TILE * ROW_BYTES + c * 2 * ROW_BYTES;
        const u32 at = g * 16 ^ v_swizzle(c);  // row c + 4 has the same
#pragma unroll
        for (int h = 0; h < V_PIECES; h++) {
            const uint4 low = read_shared(row + h * 128 + at), high = read_shared(row + h * 128 + at + 8 * ROW_BYTES);
#pragma unroll
            for (int i = 0; i < 4; i++)
#pragma unroll
                for (int nibble = 0; nibble < NIBBLES; nibble++) {
                    const u32 x = word_of(low, i), y = word_of(high, i);
                    multiply_add_halves(sums[4 * (h + nibble * V_PIECES) + i], value_codes(x, 0, nibble),
                                        value_codes(x, 1, nibble), value_codes(y, 0, nibble), value_codes(y, 1, nibble),
                                        weights, weights_8_on);
                }
        }
    }

    // Totals and rests, in all lanes of a head.
    __device__ __forceinline__ void finish() {
#pragma unroll
        for (int e = 0; e < 2; e++)
#pragma unroll
            for (int mask = 4; mask < 32; mask *= 2) {
                total[e] += from_lane_xor(total[e], mask);
                rest[e] += from_lane_xor(rest[e], mask);
            }
    }

    // Dimension 8g + i of the h-th 64, of head 2c + e; finished.
    __device__ __forceinline__ float value(int h, int e, int i) const {
        const float unit = CODES == FP8 ? 1.0f : (CODES == INT4 && h >= V_PIECES ? UNITS / 16.0f : UNITS) / RAISE;
        return sums[4 * h + i / 2][i % 2 * 2 + e] * unit + rest[e];
    }
    __device__ __forceinline__ float peak_of(int e) const { return peak[e]; }
    __device__ __forceinline__ float total_of(int e) const { return total[e]; }
};

// What a lane holds of results: two runs of 8 dimensions of every 64, of two heads.
__device__ __forceinline__ int head_of_run(int run, int lane) { return (lane & 3) * 2 + run; }
__device__ __forceinline__ int dimension_of_run(int, int lane) { return (lane >> 2) * 8; }
