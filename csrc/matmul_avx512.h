// `Vector` of 16 lanes for AVX-512 (F, BW, DQ, VL), with VNNI's dot product where the including file
// is compiled for it.
#pragma once

#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12's own headers, wrongly
#include <immintrin.h>

#include "matmul.h"

#define TURBOLM_MATMUL_PANELS

namespace turbolm {
namespace {

struct Vector {
    static constexpr int lanes = 16;
    static constexpr int row_steps[] = {6, 5, 4, 3, 2, 1};
    using Float = __m512;
    using Int = __m512i;
    using Bytes = __m512i;  // the same type as Int

    static Float zero() { return _mm512_setzero_ps(); }
    static Float set(float value) { return _mm512_set1_ps(value); }
    static Float set(int32_t value) { return _mm512_cvtepi32_ps(_mm512_set1_epi32(value)); }
    static Float load(const float* from) { return _mm512_loadu_ps(from); }
    static __mmask16 first_lanes(int64_t count) {
        return static_cast<__mmask16>(count >= lanes ? 0xffff : (1 << count) - 1);
    }
    static Float load_some(const float* from, int64_t count) {
        return _mm512_maskz_loadu_ps(first_lanes(count), from);
    }
    static void store_some(float* to, Float value, int64_t count) {
        _mm512_mask_storeu_ps(to, first_lanes(count), value);
    }
    static Float add(Float a, Float b) { return _mm512_add_ps(a, b); }
    static Int add(Int a, Int b) { return _mm512_add_epi32(a, b); }
    static Float multiply(Float a, Float b) { return _mm512_mul_ps(a, b); }
    static Float fma(Float a, Float b, Float c) { return _mm512_fmadd_ps(a, b, c); }
    static Float to_float(Int value) { return _mm512_cvtepi32_ps(value); }
    static void prefetch(const void* from) { _mm_prefetch(static_cast<const char*>(from), _MM_HINT_T0); }

    static Float load_half(const uint8_t* from) {
        return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
    }
    static Float load_u8(const uint8_t* from) {
        return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
    }
    static void load_u4_pairs(const uint8_t* from, Float& low, Float& high) {
        const __m512i both = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
        low = _mm512_cvtepi32_ps(_mm512_and_si512(both, _mm512_set1_epi32(15)));
        high = _mm512_cvtepi32_ps(_mm512_srli_epi32(both, 4));
    }
    static Float load_i8(const uint8_t* from) {
        return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
    }
    static void load_bf16_pairs(const uint8_t* from, Float& even, Float& odd) {
        const __m512i pairs = _mm512_loadu_si512(from);
        even = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
        odd = _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
    }

    static Bytes zero_bytes() { return _mm512_setzero_si512(); }
    static Bytes load_bytes(const uint8_t* from) { return _mm512_loadu_si512(from); }
    static Bytes low_nibbles(Bytes bytes) { return _mm512_and_si512(bytes, _mm512_set1_epi8(15)); }
    static Bytes high_nibbles(Bytes bytes) { return low_nibbles(_mm512_srli_epi16(bytes, 4)); }
    template <int shift, int mask>
    static Bytes insert(Bytes quads, Bytes bits) {
        if constexpr (shift > 0) bits = _mm512_slli_epi16(bits, shift);
        if constexpr (shift < 0) bits = _mm512_srli_epi16(bits, -shift);
        return _mm512_ternarylogic_epi32(bits, _mm512_set1_epi8(mask), quads, 0xEA);  // (bits & mask) | quads
    }

    static Bytes look_up(Bytes nibbles) {
        const __m128i values = _mm_loadu_si128(reinterpret_cast<const __m128i*>(iq4_values));
        const __m128i table = _mm_xor_si128(values, _mm_set1_epi8(-128));
        return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(table), nibbles);
    }

    static Bytes broadcast(const int8_t* quad) {
        int32_t value;
        __builtin_memcpy(&value, quad, 4);
        return _mm512_set1_epi32(value);
    }

#ifdef __AVX512VNNI__
    static constexpr int min_panel_byte = 0;
    // Bytes stay unsigned, and the zero point is subtracted through the start value.
    template <int zero>
    static Int start(const int32_t* sum_128) {
        if constexpr (zero == 0) return _mm512_setzero_si512();
        constexpr int shift = zero == 0 ? 0 : 7 - __builtin_ctz(zero);
        return _mm512_srai_epi32(_mm512_set1_epi32(*sum_128), shift);
    }
    template <int largest>
    static Int dot_quads(Int sum, Bytes w, Bytes quad) {
        return _mm512_dpbusd_epi32(sum, w, quad);
    }
    static Int dot(Int sum, Bytes w, const int8_t* x) {
#ifdef __clang__
        return _mm512_dpbusd_epi32(sum, w, broadcast(x));
#else  // GCC 12 spends an instruction on the broadcast that the operand can do
        asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(w), "m"(*reinterpret_cast<const int32_t*>(x)));
        return sum;
#endif
    }
    // Two chains for each of two rows keep enough independent instructions in flight.
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
    static constexpr int min_panel_byte = 32;
    template <int zero>
    static Int start(const int32_t* sum_128) {
        if constexpr (zero == 0 || zero == 128) return _mm512_setzero_si512();
        constexpr int shift = zero == 0 ? 0 : 7 - __builtin_ctz(zero);
        return _mm512_srai_epi32(_mm512_set1_epi32(*sum_128), shift);
    }
    static Int pairs_to_int(Int pairs) { return _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)); }
    // Pairs of products in int16: 2 * 63 * 127 fits, 2 * 255 * 127 does not. So bytes of 8 bits are made
    // signed, and their sign is moved to x.
    template <int largest>
    static Int multiply_pairs(Bytes w, Bytes quad) {
        if constexpr (largest > 63) {
            w = _mm512_xor_si512(w, _mm512_set1_epi8(-128));
            quad = _mm512_mask_sub_epi8(quad, _mm512_movepi8_mask(w), _mm512_setzero_si512(), quad);
            w = _mm512_abs_epi8(w);
        }
        return _mm512_maddubs_epi16(w, quad);
    }
    template <int largest>
    static Int dot_quads(Int sum, Bytes w, Bytes quad) {
        return add(sum, pairs_to_int(multiply_pairs<largest>(w, quad)));
    }
    // Four quads; pairs are summed in int16 for as long as they fit.
    template <int largest>
    static Int dot(Int sum, const Bytes* w, const int8_t* x) {
        Int pairs[4];
        for (int j = 0; j < 4; ++j) pairs[j] = multiply_pairs<largest>(w[j], broadcast(x + 4 * j));
        if constexpr (largest > 63) {
            const Int first = add(pairs_to_int(pairs[0]), pairs_to_int(pairs[1]));
            return add(sum, add(first, add(pairs_to_int(pairs[2]), pairs_to_int(pairs[3]))));
        }
        const Int first = _mm512_add_epi16(pairs[0], pairs[1]);
        const Int second = _mm512_add_epi16(pairs[2], pairs[3]);
        if constexpr (largest > 31) return add(sum, add(pairs_to_int(first), pairs_to_int(second)));
        return add(sum, pairs_to_int(_mm512_add_epi16(first, second)));
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

    // The largest magnitude is found on the bits, so that NaN counts as the largest and reaches y.
    static float quantize_block(const float* from, int8_t* to, int32_t* low, int32_t* high) {
        const __m512 a = _mm512_loadu_ps(from);
        const __m512 b = _mm512_loadu_ps(from + 16);
        const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
        const __m512i bits = _mm512_max_epu32(_mm512_and_si512(_mm512_castps_si512(a), magnitude),
                                              _mm512_and_si512(_mm512_castps_si512(b), magnitude));
        const __m128 largest = _mm_castsi128_ps(_mm_cvtsi32_si128(static_cast<int>(_mm512_reduce_max_epu32(bits))));
        const float maximum = _mm_cvtss_f32(largest);
        if (maximum < smallest_maximum) {
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_setzero_si256());
            *low = *high = 0;
            return 0.0f;
        }
        const __m512 inverse = _mm512_set1_ps(127.0f / maximum);
        const __m512i qa = _mm512_cvtps_epi32(_mm512_mul_ps(a, inverse));
        const __m512i qb = _mm512_cvtps_epi32(_mm512_mul_ps(b, inverse));
        const __m256i bytes = _mm256_set_m128i(_mm512_cvtsepi32_epi8(qb), _mm512_cvtsepi32_epi8(qa));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), bytes);
        // Sums of 8 bytes each, made unsigned by adding 128.
        const __m256i sums = _mm256_sad_epu8(_mm256_xor_si256(bytes, _mm256_set1_epi8(-128)), _mm256_setzero_si256());
        const __m256i pairs = _mm256_add_epi32(sums, _mm256_shuffle_epi32(sums, 0x4e));
        *low = _mm256_extract_epi32(pairs, 0) - 16 * 128;
        *high = _mm256_extract_epi32(pairs, 4) - 16 * 128;
        return maximum * inverse_127;
    }
};

}  // namespace
}  // namespace turbolm
