#include <arm_neon.h>

#include "matmul.h"

namespace turbolm {
namespace {

// 4 lanes, with the dot product instructions of Armv8.2.
struct Vector {
    static constexpr int lanes = 4;
    static constexpr int row_steps[] = {4, 2, 1};
    using Float = float32x4_t;
    using Int = int32x4_t;
    using Bytes = uint8x16_t;

    static Float zero() { return vdupq_n_f32(0.0f); }
    static Float set(float value) { return vdupq_n_f32(value); }
    static Float set(int32_t value) { return vcvtq_f32_s32(vdupq_n_s32(value)); }
    static Float load(const float* from) { return vld1q_f32(from); }
    static Float load_some(const float* from, int64_t count) {
        if (count >= lanes) return load(from);
        float lanes_of[lanes] = {};
        for (int64_t i = 0; i < count; ++i) lanes_of[i] = from[i];
        return load(lanes_of);
    }
    static void store_some(float* to, Float value, int64_t count) {
        if (count >= lanes) {
            vst1q_f32(to, value);
            return;
        }
        float lanes_of[lanes];
        vst1q_f32(lanes_of, value);
        for (int64_t i = 0; i < count; ++i) to[i] = lanes_of[i];
    }
    static Float add(Float a, Float b) { return vaddq_f32(a, b); }
    static Int add(Int a, Int b) { return vaddq_s32(a, b); }
    static Float multiply(Float a, Float b) { return vmulq_f32(a, b); }
    static Float fma(Float a, Float b, Float c) { return vfmaq_f32(c, a, b); }
    static Float to_float(Int value) { return vcvtq_f32_s32(value); }
    static void prefetch(const void* from) { __builtin_prefetch(from); }

    static Float load_half(const uint8_t* from) { return vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(from))); }
    static uint8x8_t load_4(const uint8_t* from) {
        uint32_t word;
        __builtin_memcpy(&word, from, 4);
        return vreinterpret_u8_u32(vdup_n_u32(word));
    }
    static Float load_u8(const uint8_t* from) {
        return vcvtq_f32_u32(vmovl_u16(vget_low_u16(vmovl_u8(load_4(from)))));
    }
    static void load_u4_pairs(const uint8_t* from, Float& low, Float& high) {
        const uint32x4_t both = vmovl_u16(vget_low_u16(vmovl_u8(load_4(from))));
        low = vcvtq_f32_u32(vandq_u32(both, vdupq_n_u32(15)));
        high = vcvtq_f32_u32(vshrq_n_u32(both, 4));
    }
    static Float load_i8(const uint8_t* from) {
        return vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(vreinterpret_s8_u8(load_4(from))))));
    }
    static void load_bf16_pairs(const uint8_t* from, Float& even, Float& odd) {
        const uint32x4_t pairs = vreinterpretq_u32_u8(load_bytes(from));
        even = vreinterpretq_f32_u32(vshlq_n_u32(pairs, 16));
        odd = vreinterpretq_f32_u32(vandq_u32(pairs, vdupq_n_u32(0xffff0000u)));
    }

    static Bytes zero_bytes() { return vdupq_n_u8(0); }
    static Bytes load_bytes(const uint8_t* from) { return vld1q_u8(from); }
    static Bytes low_nibbles(Bytes bytes) { return vandq_u8(bytes, vdupq_n_u8(15)); }
    static Bytes high_nibbles(Bytes bytes) { return vshrq_n_u8(bytes, 4); }
    template <int shift, int mask>
    static Bytes insert(Bytes quads, Bytes bits) {
        if constexpr (shift > 0) bits = vshlq_n_u8(bits, shift);
        if constexpr (shift < 0) bits = vshrq_n_u8(bits, -shift);
        return vorrq_u8(quads, vandq_u8(bits, vdupq_n_u8(mask)));
    }
    static Bytes look_up(Bytes nibbles) {
        const uint8x16_t table = veorq_u8(vreinterpretq_u8_s8(vld1q_s8(iq4_values)), vdupq_n_u8(128));
        return vqtbl1q_u8(table, nibbles);
    }

    template <int zero>
    static Int start(const int32_t* sum_128) {
        if constexpr (zero == 0 || zero == 128) {
            return vdupq_n_s32(0);
        } else {
            return vshrq_n_s32(vdupq_n_s32(*sum_128), 7 - __builtin_ctz(zero));
        }
    }
    // The instruction takes signed bytes: small ones are signed already.
    template <int largest>
    static int8x16_t to_signed(Bytes w) {
        if constexpr (largest > 63) w = veorq_u8(w, vdupq_n_u8(128));
        return vreinterpretq_s8_u8(w);
    }
    template <int largest>
    static Int dot(Int sum, const Bytes* w, const int8_t* x) {
        const int8x16_t quads = vld1q_s8(x);
        sum = vdotq_laneq_s32(sum, to_signed<largest>(w[0]), quads, 0);
        sum = vdotq_laneq_s32(sum, to_signed<largest>(w[1]), quads, 1);
        sum = vdotq_laneq_s32(sum, to_signed<largest>(w[2]), quads, 2);
        return vdotq_laneq_s32(sum, to_signed<largest>(w[3]), quads, 3);
    }
    template <int largest, int rows>
    static void add_products(Int (&low)[rows], Int (&high)[rows], const Bytes* w, const int8_t* x) {
#pragma GCC unroll 2
        for (int row = 0; row < rows; ++row) {
            low[row] = dot<largest>(low[row], w, x + 32 * row);
            high[row] = dot<largest>(high[row], w + 4, x + 32 * row + 16);
        }
    }

    static int8x16_t quantize_16(const float* from, float inverse) {
        int16x4_t words[4];
        for (int i = 0; i < 4; ++i) {
            words[i] = vqmovn_s32(vcvtnq_s32_f32(vmulq_n_f32(vld1q_f32(from + 4 * i), inverse)));
        }
        return vcombine_s8(vqmovn_s16(vcombine_s16(words[0], words[1])), vqmovn_s16(vcombine_s16(words[2], words[3])));
    }
    // The largest magnitude is found on the bits, so that NaN counts as the largest and reaches y.
    static float quantize_block(const float* from, int8_t* to, int32_t* low, int32_t* high) {
        uint32x4_t bits = vdupq_n_u32(0);
        for (int i = 0; i < 8; ++i) {
            bits = vmaxq_u32(bits, vreinterpretq_u32_f32(vabsq_f32(vld1q_f32(from + 4 * i))));
        }
        const uint32_t largest = vmaxvq_u32(bits);
        float maximum;
        __builtin_memcpy(&maximum, &largest, 4);
        if (maximum < smallest_maximum) {
            vst1q_s8(to, vdupq_n_s8(0));
            vst1q_s8(to + 16, vdupq_n_s8(0));
            *low = *high = 0;
            return 0.0f;
        }
        const float inverse = 127.0f / maximum;
        const int8x16_t first = quantize_16(from, inverse);
        const int8x16_t second = quantize_16(from + 16, inverse);
        vst1q_s8(to, first);
        vst1q_s8(to + 16, second);
        *low = vaddlvq_s8(first);
        *high = vaddlvq_s8(second);
        return maximum * inverse_127;
    }
};

}  // namespace
}  // namespace turbolm

#include "matmul_table.h"

namespace turbolm {

constinit const MatmulKernels matmul_neon = make_kernels();

}  // namespace turbolm
