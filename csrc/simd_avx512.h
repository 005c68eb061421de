// Vec: 16 floats in one register.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace turbolm {
namespace {

struct Vec {
    __m512 value;

    // Rows and columns of the register blocks of the attention products.
    static constexpr int block_rows = 6, block_columns = 4;

    static Vec zero() { return {_mm512_setzero_ps()}; }
    static Vec all(float x) { return {_mm512_set1_ps(x)}; }
    static Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
    static Vec load_f16(const uint16_t* p) {
        return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
    }
    static Vec load_bf16(const uint16_t* p) {
        const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
        return {_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
    }
    static Vec load_u8(const uint8_t* p) { return {_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes(p)))}; }
    // The low (half 0) or high 4 bits of 16 bytes.
    static Vec load_u4(const uint8_t* p, int half) {
        const __m512 numbers = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        const __m512i wide = _mm512_cvtepu8_epi32(bytes(p));
        return {_mm512_permutexvar_ps(half != 0 ? _mm512_srli_epi32(wide, 4) : wide, numbers)};
    }
    // 16 e4m3 floats / 256: their bits are those of such a half float. NaN reads as 480.
    static Vec load_fp8(const uint8_t* p) {
        const __m256i wide = _mm256_slli_epi16(_mm256_cvtepi8_epi16(bytes(p)), 7);
        return {_mm512_cvtph_ps(_mm256_and_si256(wide, _mm256_set1_epi16(static_cast<int16_t>(0xbf80))))};
    }
    // The first n (1 .. 16) lanes; the others are 0.
    static Vec load_first(const float* p, int n) { return {_mm512_maskz_loadu_ps(first(n), p)}; }
    void store(float* p) const { _mm512_storeu_ps(p, value); }
    void store_first(float* p, int n) const { _mm512_mask_storeu_ps(p, first(n), value); }
    void store_f16(uint16_t* p) const {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
    }
    void store_bf16(uint16_t* p) const {  // to nearest even; NaN stays NaN
        const __m512i bits = _mm512_castps_si512(value);
        const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
        __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
        const __mmask16 is_nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
        rounded = _mm512_mask_mov_epi32(rounded, is_nan, _mm512_set1_epi32(0x7fc00000));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
    }
    static Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.value, b.value, c.value)}; }
    static Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.value, b.value)}; }
    static Vec round(Vec a) { return {_mm512_roundscale_ps(a.value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
    // x * 2^n for whole numbers n from -126 to 127
    static Vec scale(Vec x, Vec n) {
        const __m512i exponent = _mm512_add_epi32(_mm512_cvtps_epi32(n.value), _mm512_set1_epi32(127));
        return {_mm512_mul_ps(x.value, _mm512_castsi512_ps(_mm512_slli_epi32(exponent, 23)))};
    }
    static Vec magnitude(Vec a) { return {_mm512_abs_ps(a.value)}; }
    // a < b ? yes : no, by lane
    static Vec if_less(Vec a, Vec b, Vec yes, Vec no) {
        return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.value, b.value, _CMP_LT_OQ), no.value, yes.value)};
    }
    // Lanes [low, high) of a, `other` elsewhere.
    static Vec between(Vec a, int low, int high, Vec other) {
        const __mmask16 mask = static_cast<__mmask16>(first(high) & ~first(low));
        return {_mm512_mask_blend_ps(mask, other.value, a.value)};
    }

    static float sum(Vec a) {
        const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(a.value), _mm512_extractf32x8_ps(a.value, 1));
        __m128 x = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
        x = _mm_add_ps(x, _mm_movehl_ps(x, x));
        return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
    }
    static float largest(Vec a) {
        const __m256 half = _mm256_max_ps(_mm512_castps512_ps256(a.value), _mm512_extractf32x8_ps(a.value, 1));
        __m128 x = _mm_max_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
        x = _mm_max_ps(x, _mm_movehl_ps(x, x));
        return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
    }

  private:
    static __m128i bytes(const uint8_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }
    static __mmask16 first(int n) {
        return static_cast<__mmask16>(n >= 16 ? 0xffff : n <= 0 ? 0 : (1u << n) - 1);
    }
};

inline Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.value, b.value)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.value, b.value)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.value, b.value)}; }
inline Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.value, b.value)}; }

}  // namespace
}  // namespace turbolm
