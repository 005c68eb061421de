// Vec: 16 floats in two registers.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace turbolm {
namespace {

struct Vec {
    __m256 low, high;

    static constexpr int block_rows = 4, block_columns = 1;

    static Vec zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
    static Vec all(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
    static Vec load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
    static Vec load_f16(const uint16_t* p) { return {_mm256_cvtph_ps(half(p)), _mm256_cvtph_ps(half(p + 8))}; }
    static Vec load_bf16(const uint16_t* p) { return {widen(half(p)), widen(half(p + 8))}; }
    static Vec load_u8(const uint8_t* p) {
        return {_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(eight(p))),
                _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(eight(p + 8)))};
    }
    static Vec load_u4(const uint8_t* p, int half) {
        const __m128i both = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
        const __m128i codes = _mm_and_si128(half != 0 ? _mm_srli_epi16(both, 4) : both, _mm_set1_epi8(15));
        return {_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(codes)),
                _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_srli_si128(codes, 8)))};
    }
    static Vec load_fp8(const uint8_t* p) {
        const __m128i both = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
        const __m256i wide = _mm256_slli_epi16(_mm256_cvtepi8_epi16(both), 7);
        const __m256i halves = _mm256_and_si256(wide, _mm256_set1_epi16(static_cast<int16_t>(0xbf80)));
        return {_mm256_cvtph_ps(_mm256_castsi256_si128(halves)), _mm256_cvtph_ps(_mm256_extracti128_si256(halves, 1))};
    }
    static Vec load_first(const float* p, int n) {
        return {_mm256_maskload_ps(p, first(n)), _mm256_maskload_ps(p + 8, first(n - 8))};
    }
    void store(float* p) const {
        _mm256_storeu_ps(p, low);
        _mm256_storeu_ps(p + 8, high);
    }
    void store_first(float* p, int n) const {
        _mm256_maskstore_ps(p, first(n), low);
        _mm256_maskstore_ps(p + 8, first(n - 8), high);
    }
    void store_f16(uint16_t* p) const {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(low, _MM_FROUND_TO_NEAREST_INT));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 8), _mm256_cvtps_ph(high, _MM_FROUND_TO_NEAREST_INT));
    }
    void store_bf16(uint16_t* p) const {
        const __m256i packed = _mm256_packus_epi32(narrow(low), narrow(high));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permute4x64_epi64(packed, 0xd8));
    }
    static Vec fma(Vec a, Vec b, Vec c) {
        return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
    }
    static Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.low, b.low), _mm256_max_ps(a.high, b.high)}; }
    static Vec round(Vec a) {
        constexpr int mode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
        return {_mm256_round_ps(a.low, mode), _mm256_round_ps(a.high, mode)};
    }
    static Vec scale(Vec x, Vec n) {
        return {_mm256_mul_ps(x.low, power_of_two(n.low)), _mm256_mul_ps(x.high, power_of_two(n.high))};
    }
    static Vec magnitude(Vec a) {
        const __m256 sign = _mm256_set1_ps(-0.0f);
        return {_mm256_andnot_ps(sign, a.low), _mm256_andnot_ps(sign, a.high)};
    }
    static Vec if_less(Vec a, Vec b, Vec yes, Vec no) {
        return {_mm256_blendv_ps(no.low, yes.low, _mm256_cmp_ps(a.low, b.low, _CMP_LT_OQ)),
                _mm256_blendv_ps(no.high, yes.high, _mm256_cmp_ps(a.high, b.high, _CMP_LT_OQ))};
    }
    static Vec between(Vec a, int begin, int end, Vec other) {
        const __m256i low_mask = _mm256_andnot_si256(first(begin), first(end));
        const __m256i high_mask = _mm256_andnot_si256(first(begin - 8), first(end - 8));
        return {_mm256_blendv_ps(other.low, a.low, _mm256_castsi256_ps(low_mask)),
                _mm256_blendv_ps(other.high, a.high, _mm256_castsi256_ps(high_mask))};
    }

    static float sum(Vec a) {
        const __m256 half = _mm256_add_ps(a.low, a.high);
        __m128 x = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
        x = _mm_add_ps(x, _mm_movehl_ps(x, x));
        return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
    }
    static float largest(Vec a) {
        const __m256 half = _mm256_max_ps(a.low, a.high);
        __m128 x = _mm_max_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
        x = _mm_max_ps(x, _mm_movehl_ps(x, x));
        return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
    }

  private:
    static __m128i eight(const uint8_t* p) { return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)); }
    static __m128i half(const uint16_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }
    static __m256 widen(__m128i bf16) {
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bf16), 16));
    }
    static __m256i narrow(__m256 x) {  // bf16 in the low half of each lane, to nearest even; NaN stays NaN
        const __m256i bits = _mm256_castps_si256(x);
        const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
        const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
        const __m256 is_nan = _mm256_cmp_ps(x, x, _CMP_UNORD_Q);
        const __m256 nan = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fc00000));
        return _mm256_srli_epi32(_mm256_castps_si256(_mm256_blendv_ps(_mm256_castsi256_ps(rounded), nan, is_nan)), 16);
    }
    static __m256 power_of_two(__m256 n) {
        const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
        return _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23));
    }
    static __m256i first(int n) {
        return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
    }
};

inline Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.low, b.low), _mm256_sub_ps(a.high, b.high)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)}; }
inline Vec operator/(Vec a, Vec b) { return {_mm256_div_ps(a.low, b.low), _mm256_div_ps(a.high, b.high)}; }

}  // namespace
}  // namespace turbolm
