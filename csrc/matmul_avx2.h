// `Vector` of 8 lanes for AVX2, with the dot product of AVX-VNNI where the including file is compiled for it.
#pragma once

#include <immintrin.h>

#include "matmul.h"

namespace turbolm {
namespace {

// 8 lanes: a group is two vectors, and the 16 registers hold the sums of few rows.
struct Vector {
    static constexpr int lanes = 8;
    static constexpr int row_steps[] = {4, 2, 1};
    using Float = __m256;
    using Int = __m256i;
    using Bytes = __m256i;

    static Float zero() { return _mm256_setzero_ps(); }
    static Float set(float value) { return _mm256_set1_ps(value); }
    static Float set(int32_t value) { return _mm256_cvtepi32_ps(_mm256_set1_epi32(value)); }
    static Float load(const float* from) { return _mm256_loadu_ps(from); }
    static __m256i first_lanes(int64_t count) {
        const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
        return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count)), lane);
    }
    static Float load_some(const float* from, int64_t count) { return _mm256_maskload_ps(from, first_lanes(count)); }
    static void store_some(float* to, Float value, int64_t count) {
        _mm256_maskstore_ps(to, first_lanes(count), value);
    }
    static Float add(Float a, Float b) { return _mm256_add_ps(a, b); }
    static Int add(Int a, Int b) { return _mm256_add_epi32(a, b); }
    static Float multiply(Float a, Float b) { return _mm256_mul_ps(a, b); }
    static Float fma(Float a, Float b, Float c) { return _mm256_fmadd_ps(a, b, c); }
    static Float to_float(Int value) { return _mm256_cvtepi32_ps(value); }
    static void prefetch(const void* from) { _mm_prefetch(static_cast<const char*>(from), _MM_HINT_T0); }

    static Float load_half(const uint8_t* from) {
        return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
    }
    static Float load_u8(const uint8_t* from) {
        return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
    }
    static void load_u4_pairs(const uint8_t* from, Float& low, Float& high) {
        const __m256i both = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
        low = _mm256_cvtepi32_ps(_mm256_and_si256(both, _mm256_set1_epi32(15)));
        high = _mm256_cvtepi32_ps(_mm256_srli_epi32(both, 4));
    }
    static Float load_i8(const uint8_t* from) {
        return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
    }
    static void load_bf16_pairs(const uint8_t* from, Float& even, Float& odd) {
        const __m256i pairs = load_bytes(from);
        even = _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16));
        odd = _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(static_cast<int>(0xffff0000u))));
    }

    static Bytes zero_bytes() { return _mm256_setzero_si256(); }
    static Bytes load_bytes(const uint8_t* from) {
        return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    }
    static Bytes low_nibbles(Bytes bytes) { return _mm256_and_si256(bytes, _mm256_set1_epi8(15)); }
    static Bytes high_nibbles(Bytes bytes) { return low_nibbles(_mm256_srli_epi16(bytes, 4)); }
    template <int shift, int mask>
    static Bytes insert(Bytes quads, Bytes bits) {
        if constexpr (shift > 0) bits = _mm256_slli_epi16(bits, shift);
        if constexpr (shift < 0) bits = _mm256_srli_epi16(bits, -shift);
        return _mm256_or_si256(quads, _mm256_and_si256(bits, _mm256_set1_epi8(mask)));
    }
    static Bytes look_up(Bytes nibbles) {
        const __m128i values = _mm_loadu_si128(reinterpret_cast<const __m128i*>(iq4_values));
        const __m128i table = _mm_xor_si128(values, _mm_set1_epi8(-128));
        return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(table), nibbles);
    }

#ifdef __AVXVNNI__
    // Bytes stay unsigned, and the zero point is subtracted through the start value.
    template <int zero>
    static Int start(const int32_t* sum_128) {
        if constexpr (zero == 0) return _mm256_setzero_si256();
        constexpr int shift = zero == 0 ? 0 : 7 - __builtin_ctz(zero);
        return _mm256_srai_epi32(_mm256_set1_epi32(*sum_128), shift);
    }
    static Int dot(Int sum, Bytes w, const int8_t* x) {
        int32_t quad;
        __builtin_memcpy(&quad, x, 4);
        return _mm256_dpbusd_avx_epi32(sum, w, _mm256_set1_epi32(quad));
    }
    template <int largest, int rows>
    static void add_products(Int (&low)[rows], Int (&high)[rows], const Bytes* w, const int8_t* x) {
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) {
#pragma GCC unroll 2
            for (int row = 0; row < rows; ++row) {
                low[row] = dot(low[row], w[j], x + 32 * row + 4 * j);
                high[row] = dot(high[row], w[j + 4], x + 32 * row + 4 * j + 16);
            }
        }
    }
#else
    template <int zero>
    static Int start(const int32_t* sum_128) {
        if constexpr (zero == 0 || zero == 128) return _mm256_setzero_si256();
        constexpr int shift = zero == 0 ? 0 : 7 - __builtin_ctz(zero);
        return _mm256_srai_epi32(_mm256_set1_epi32(*sum_128), shift);
    }
    static Int pairs_to_int(Int pairs) { return _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)); }
    // Pairs of products in int16: 2 * 63 * 127 fits, 2 * 255 * 127 does not. So bytes of 8 bits are made
    // signed, and their sign is moved to x.
    template <int largest>
    static Int multiply_pairs(Bytes w, const int8_t* x) {
        int32_t value;
        __builtin_memcpy(&value, x, 4);
        Bytes quad = _mm256_set1_epi32(value);
        if constexpr (largest > 63) {
            w = _mm256_xor_si256(w, _mm256_set1_epi8(-128));
            quad = _mm256_sign_epi8(quad, w);
            w = _mm256_abs_epi8(w);
        }
        return _mm256_maddubs_epi16(w, quad);
    }
    // Four quads; pairs are summed in int16 for as long as they fit.
    template <int largest>
    static Int dot(Int sum, const Bytes* w, const int8_t* x) {
        Int pairs[4];
        for (int j = 0; j < 4; ++j) pairs[j] = multiply_pairs<largest>(w[j], x + 4 * j);
        if constexpr (largest > 63) {
            const Int first = add(pairs_to_int(pairs[0]), pairs_to_int(pairs[1]));
            return add(sum, add(first, add(pairs_to_int(pairs[2]), pairs_to_int(pairs[3]))));
        }
        const Int first = _mm256_add_epi16(pairs[0], pairs[1]);
        const Int second = _mm256_add_epi16(pairs[2], pairs[3]);
        if constexpr (largest > 31) return add(sum, add(pairs_to_int(first), pairs_to_int(second)));
        return add(sum, pairs_to_int(_mm256_add_epi16(first, second)));
    }
    template <int largest, int rows>
    static void add_products(Int (&low)[rows], Int (&high)[rows], const Bytes* w, const int8_t* x) {
#pragma GCC unroll 2
        for (int row = 0; row < rows; ++row) {
            low[row] = dot<largest>(low[row], w, x + 32 * row);
            high[row] = dot<largest>(high[row], w + 4, x + 32 * row + 16);
        }
    }
#endif

    static __m256i absolute_bits(__m256 value) {
        return _mm256_and_si256(_mm256_castps_si256(value), _mm256_set1_epi32(0x7fffffff));
    }
    static int32_t sum_of(__m256i value) {
        __m128i sum = _mm_add_epi32(_mm256_castsi256_si128(value), _mm256_extracti128_si256(value, 1));
        sum = _mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0x4e));
        return _mm_cvtsi128_si32(_mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0xb1)));
    }
    // The largest magnitude is found on the bits, so that NaN counts as the largest and reaches y.
    static float quantize_block(const float* from, int8_t* to, int32_t* low, int32_t* high) {
        __m256 x[4];
        for (int i = 0; i < 4; ++i) x[i] = _mm256_loadu_ps(from + 8 * i);
        const __m256i bits = _mm256_max_epu32(_mm256_max_epu32(absolute_bits(x[0]), absolute_bits(x[1])),
                                              _mm256_max_epu32(absolute_bits(x[2]), absolute_bits(x[3])));
        __m128i half = _mm_max_epu32(_mm256_castsi256_si128(bits), _mm256_extracti128_si256(bits, 1));
        half = _mm_max_epu32(half, _mm_shuffle_epi32(half, 0x4e));
        half = _mm_max_epu32(half, _mm_shuffle_epi32(half, 0xb1));
        const float maximum = _mm_cvtss_f32(_mm_castsi128_ps(half));
        if (maximum < smallest_maximum) {
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_setzero_si256());
            *low = *high = 0;
            return 0.0f;
        }
        const __m256 inverse = _mm256_set1_ps(127.0f / maximum);
        __m256i q[4];
        for (int i = 0; i < 4; ++i) q[i] = _mm256_cvtps_epi32(_mm256_mul_ps(x[i], inverse));
        // Packing works within 128-bit halves; the permutation puts the dwords back in order.
        const __m256i words = _mm256_packs_epi16(_mm256_packs_epi32(q[0], q[1]), _mm256_packs_epi32(q[2], q[3]));
        const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_permutevar8x32_epi32(words, order));
        *low = sum_of(_mm256_add_epi32(q[0], q[1]));
        *high = sum_of(_mm256_add_epi32(q[2], q[3]));
        return maximum * inverse_127;
    }
};

}  // namespace
}  // namespace turbolm
