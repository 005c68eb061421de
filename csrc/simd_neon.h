// Vec: 16 floats in four registers. Needs Armv8.2's conversions of half floats.
#pragma once

#include <arm_neon.h>

#include <cstdint>

namespace turbolm {
namespace {

struct Vec {
    float32x4_t part[4];

    static constexpr int block_rows = 5, block_columns = 1;

    // The vector whose parts are of(0) .. of(3).
    template <class F>
    static inline __attribute__((always_inline)) Vec each(const F& of) {
        return {{of(0), of(1), of(2), of(3)}};
    }

    static Vec zero() { return all(0.0f); }
    static Vec all(float x) {
        return each([&](int) { return vdupq_n_f32(x); });
    }
    static Vec load(const float* p) {
        return each([&](int i) { return vld1q_f32(p + 4 * i); });
    }
    static Vec load_f16(const uint16_t* p) {
        return each([&](int i) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p + 4 * i))); });
    }
    static Vec load_bf16(const uint16_t* p) {
        return each([&](int i) { return vreinterpretq_f32_u32(vshlq_n_u32(vmovl_u16(vld1_u16(p + 4 * i)), 16)); });
    }
    static Vec load_u8(const uint8_t* p) { return widen(vld1q_u8(p)); }
    static Vec load_u4(const uint8_t* p, int half) {
        const uint8x16_t both = vld1q_u8(p);
        return widen(half != 0 ? vshrq_n_u8(both, 4) : vandq_u8(both, vdupq_n_u8(15)));
    }
    static Vec load_fp8(const uint8_t* p) {
        const int8x16_t bits = vld1q_s8(reinterpret_cast<const int8_t*>(p));
        const auto half = [](int8x8_t eight) {
            const uint16x8_t wide = vreinterpretq_u16_s16(vshll_n_s8(eight, 7));
            return vreinterpretq_f16_u16(vandq_u16(wide, vdupq_n_u16(0xbf80)));
        };
        const float16x8_t low = half(vget_low_s8(bits)), high = half(vget_high_s8(bits));
        return {{vcvt_f32_f16(vget_low_f16(low)), vcvt_high_f32_f16(low), vcvt_f32_f16(vget_low_f16(high)),
                 vcvt_high_f32_f16(high)}};
    }
    static Vec load_first(const float* p, int n) {
        if (n >= 16) return load(p);
        float lanes[16] = {};
        for (int i = 0; i < n; ++i) lanes[i] = p[i];
        return load(lanes);
    }
    void store(float* p) const {
        for (int i = 0; i < 4; ++i) vst1q_f32(p + 4 * i, part[i]);
    }
    void store_first(float* p, int n) const {
        if (n >= 16) return store(p);
        float lanes[16];
        store(lanes);
        for (int i = 0; i < n; ++i) p[i] = lanes[i];
    }
    void store_f16(uint16_t* p) const {
        for (int i = 0; i < 4; ++i) vst1_u16(p + 4 * i, vreinterpret_u16_f16(vcvt_f16_f32(part[i])));
    }
    void store_bf16(uint16_t* p) const {  // to nearest even; NaN stays NaN
        for (int i = 0; i < 4; ++i) {
            const uint32x4_t bits = vreinterpretq_u32_f32(part[i]);
            const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
            const uint32x4_t rounded = vaddq_u32(vaddq_u32(bits, vdupq_n_u32(0x7fff)), odd);
            const uint32x4_t is_number = vceqq_f32(part[i], part[i]);
            vst1_u16(p + 4 * i, vshrn_n_u32(vbslq_u32(is_number, rounded, vdupq_n_u32(0x7fc00000)), 16));
        }
    }
    static Vec fma(Vec a, Vec b, Vec c) {
        return each([&](int i) { return vfmaq_f32(c.part[i], a.part[i], b.part[i]); });
    }
    static Vec max(Vec a, Vec b) {  // b where either is NaN, as on x86
        return each([&](int i) { return vbslq_f32(vcgtq_f32(a.part[i], b.part[i]), a.part[i], b.part[i]); });
    }
    static Vec round(Vec a) {
        return each([&](int i) { return vrndnq_f32(a.part[i]); });
    }
    static Vec scale(Vec x, Vec n) {
        return each([&](int i) {
            const int32x4_t exponent = vaddq_s32(vcvtnq_s32_f32(n.part[i]), vdupq_n_s32(127));
            return vmulq_f32(x.part[i], vreinterpretq_f32_s32(vshlq_n_s32(exponent, 23)));
        });
    }
    static Vec magnitude(Vec a) {
        return each([&](int i) { return vabsq_f32(a.part[i]); });
    }
    static Vec if_less(Vec a, Vec b, Vec yes, Vec no) {
        return each([&](int i) { return vbslq_f32(vcltq_f32(a.part[i], b.part[i]), yes.part[i], no.part[i]); });
    }
    static float sum(Vec a) {
        const float32x4_t four = vaddq_f32(vaddq_f32(a.part[0], a.part[2]), vaddq_f32(a.part[1], a.part[3]));
        const float32x2_t two = vadd_f32(vget_low_f32(four), vget_high_f32(four));
        return vget_lane_f32(two, 0) + vget_lane_f32(two, 1);
    }
    static float largest(Vec a) {
        float lane[16];
        a.store(lane);
        for (int width = 8; width > 0; width /= 2) {
            for (int i = 0; i < width; ++i) lane[i] = lane[i] > lane[i + width] ? lane[i] : lane[i + width];
        }
        return lane[0];
    }
    static Vec between(Vec a, int begin, int end, Vec other) {
        static constexpr int32_t indices[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
        return each([&](int i) {
            const int32x4_t index = vld1q_s32(indices + 4 * i);
            const uint32x4_t is_before = vcltq_s32(index, vdupq_n_s32(begin));
            const uint32x4_t is_in = vbicq_u32(vcltq_s32(index, vdupq_n_s32(end)), is_before);
            return vbslq_f32(is_in, a.part[i], other.part[i]);
        });
    }

  private:
    static Vec widen(uint8x16_t x) {
        const uint16x8_t low = vmovl_u8(vget_low_u8(x)), high = vmovl_high_u8(x);
        return {{vcvtq_f32_u32(vmovl_u16(vget_low_u16(low))), vcvtq_f32_u32(vmovl_high_u16(low)),
                 vcvtq_f32_u32(vmovl_u16(vget_low_u16(high))), vcvtq_f32_u32(vmovl_high_u16(high))}};
    }
};

inline Vec operator+(Vec a, Vec b) {
    return Vec::each([&](int i) { return vaddq_f32(a.part[i], b.part[i]); });
}
inline Vec operator-(Vec a, Vec b) {
    return Vec::each([&](int i) { return vsubq_f32(a.part[i], b.part[i]); });
}
inline Vec operator*(Vec a, Vec b) {
    return Vec::each([&](int i) { return vmulq_f32(a.part[i], b.part[i]); });
}
inline Vec operator/(Vec a, Vec b) {
    return Vec::each([&](int i) { return vdivq_f32(a.part[i], b.part[i]); });
}

}  // namespace
}  // namespace turbolm
