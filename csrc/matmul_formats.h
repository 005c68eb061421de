// How each packed format becomes registers, in terms of a `Vector` (see matmul_kernel.h).
//
// A block of 32 values of `Vector::lanes` rows is `Unpacked`: the quads as unsigned bytes, and float
// factors of each row. A value of the matrix is
//     (byte - zero) * scale        plain formats
//     byte * scale + minimum       has_minimum
// where formats that have halves have factors [0] for values 0..15 and [1] for values 16..31.
#pragma once

namespace turbolm {
namespace {

using Float = Vector::Float;
using Int = Vector::Int;
using Bytes = Vector::Bytes;

struct Unpacked {
    Bytes quads[8];
    Float scale[2], minimum[2];  // the first alone in formats without halves
};

struct Header {  // factors of a block of 256
    Float d, m;
};

inline void load_nibbles(const uint8_t* from, int part, Bytes* quads) {
    for (int j = 0; j < 4; ++j) {
        const Bytes both = Vector::load_bytes(from + 64 * j + 4 * Vector::lanes * part);
        quads[j] = Vector::low_nibbles(both);
        quads[j + 4] = Vector::high_nibbles(both);
    }
}

// Bit j of each byte becomes bit `place` of quad j.
template <int place>
inline void add_high_bits(const uint8_t* from, int part, Bytes* quads) {
    constexpr int mask = 1 << place;
    const Bytes bits = Vector::load_bytes(from + 4 * Vector::lanes * part);
    quads[0] = Vector::insert<place, mask>(quads[0], bits);
    quads[1] = Vector::insert<place - 1, mask>(quads[1], bits);
    quads[2] = Vector::insert<place - 2, mask>(quads[2], bits);
    quads[3] = Vector::insert<place - 3, mask>(quads[3], bits);
    quads[4] = Vector::insert<place - 4, mask>(quads[4], bits);
    quads[5] = Vector::insert<place - 5, mask>(quads[5], bits);
    quads[6] = Vector::insert<place - 6, mask>(quads[6], bits);
    quads[7] = Vector::insert<place - 7, mask>(quads[7], bits);
}

// Bits 2j and 2j + 1 of each byte become bits `place` and `place` + 1 of quad j; four quads.
template <int place>
inline void add_bit_pairs(const uint8_t* from, int part, Bytes* quads) {
    constexpr int mask = 3 << place;
    const Bytes bits = Vector::load_bytes(from + 4 * Vector::lanes * part);
    quads[0] = Vector::insert<place, mask>(quads[0], bits);
    quads[1] = Vector::insert<place - 2, mask>(quads[1], bits);
    quads[2] = Vector::insert<place - 4, mask>(quads[2], bits);
    quads[3] = Vector::insert<place - 6, mask>(quads[3], bits);
}

inline void load_bit_pairs(const uint8_t* from, int part, Bytes* quads) {
    for (int j = 0; j < 8; ++j) quads[j] = Vector::zero_bytes();
    add_bit_pairs<0>(from, part, quads);
    add_bit_pairs<0>(from + 64, part, quads + 4);
}

inline Float load_half(const uint8_t* from, int part) { return Vector::load_half(from + 2 * Vector::lanes * part); }
inline Float load_u8(const uint8_t* from, int part) { return Vector::load_u8(from + Vector::lanes * part); }
inline Float load_i8(const uint8_t* from, int part) { return Vector::load_i8(from + Vector::lanes * part); }

struct Plain {
    static constexpr int sub_blocks = 1;
    static constexpr int header_bytes = 0;
    static constexpr int zero = 0;
    static constexpr int largest = 15;  // byte
    static constexpr bool has_minimum = false;
    static constexpr bool has_halves = false;
    static Header header(const uint8_t*, int) { return {Vector::zero(), Vector::zero()}; }
};

struct Q4_0 : Plain {
    static constexpr int sub_bytes = 288;
    static constexpr int zero = 8;
    static void load(const uint8_t* from, int part, const Header&, Unpacked& to) {
        load_nibbles(from + 32, part, to.quads);
        to.scale[0] = load_half(from, part);
    }
};

struct Q4_1 : Plain {
    static constexpr int sub_bytes = 320;
    static constexpr bool has_minimum = true;
    static void load(const uint8_t* from, int part, const Header&, Unpacked& to) {
        load_nibbles(from + 64, part, to.quads);
        to.scale[0] = load_half(from, part);
        to.minimum[0] = load_half(from + 32, part);
    }
};

struct Q5_0 : Plain {
    static constexpr int sub_bytes = 352;
    static constexpr int largest = 31;
    static constexpr int zero = 16;
    static void load(const uint8_t* from, int part, const Header&, Unpacked& to) {
        load_nibbles(from + 32, part, to.quads);
        add_high_bits<4>(from + 288, part, to.quads);
        to.scale[0] = load_half(from, part);
    }
};

struct Q5_1 : Plain {
    static constexpr int sub_bytes = 384;
    static constexpr int largest = 31;
    static constexpr bool has_minimum = true;
    static void load(const uint8_t* from, int part, const Header&, Unpacked& to) {
        load_nibbles(from + 64, part, to.quads);
        add_high_bits<4>(from + 320, part, to.quads);
        to.scale[0] = load_half(from, part);
        to.minimum[0] = load_half(from + 32, part);
    }
};

struct Q8_0 : Plain {
    static constexpr int sub_bytes = 544;
    static constexpr int largest = 255;
    static constexpr int zero = 128;
    static void load(const uint8_t* from, int part, const Header&, Unpacked& to) {
        for (int j = 0; j < 8; ++j) to.quads[j] = Vector::load_bytes(from + 32 + 64 * j + 4 * Vector::lanes * part);
        to.scale[0] = load_half(from, part);
    }
};

struct Iq4Nl : Plain {
    static constexpr int sub_bytes = 288;
    static constexpr int largest = 255;
    static constexpr int zero = 128;
    static void load(const uint8_t* from, int part, const Header&, Unpacked& to) {
        load_nibbles(from + 32, part, to.quads);
        for (Bytes& quad : to.quads) quad = Vector::look_up(quad);
        to.scale[0] = load_half(from, part);
    }
};

struct Q2_K : Plain {
    static constexpr int sub_blocks = 8;
    static constexpr int header_bytes = 64;
    static constexpr int sub_bytes = 160;
    static constexpr int largest = 3;
    static constexpr bool has_minimum = true;
    static constexpr bool has_halves = true;
    static Header header(const uint8_t* from, int part) {
        return {load_half(from, part), Vector::multiply(load_half(from + 32, part), Vector::set(-1.0f))};
    }
    static void load(const uint8_t* from, int part, const Header& header, Unpacked& to) {
        load_bit_pairs(from + 32, part, to.quads);
        for (int half = 0; half < 2; ++half) {
            Float scale, minimum;
            Vector::load_u4_pairs(from + 16 * half + Vector::lanes * part, scale, minimum);
            to.scale[half] = Vector::multiply(header.d, scale);
            to.minimum[half] = Vector::multiply(header.m, minimum);
        }
    }
};

struct Q3_K : Plain {
    static constexpr int sub_blocks = 8;
    static constexpr int header_bytes = 32;
    static constexpr int sub_bytes = 224;
    static constexpr int largest = 7;
    static constexpr int zero = 4;
    static constexpr bool has_halves = true;
    static Header header(const uint8_t* from, int part) { return {load_half(from, part), Vector::zero()}; }
    static void load(const uint8_t* from, int part, const Header& header, Unpacked& to) {
        load_bit_pairs(from + 32, part, to.quads);
        add_high_bits<2>(from + 160, part, to.quads);
        to.scale[0] = Vector::multiply(header.d, load_i8(from, part));
        to.scale[1] = Vector::multiply(header.d, load_i8(from + 16, part));
    }
};

struct Q4_K : Plain {
    static constexpr int sub_blocks = 8;
    static constexpr int header_bytes = 64;
    static constexpr int sub_bytes = 288;
    static constexpr bool has_minimum = true;
    static Header header(const uint8_t* from, int part) {
        return {load_half(from, part), Vector::multiply(load_half(from + 32, part), Vector::set(-1.0f))};
    }
    static void load(const uint8_t* from, int part, const Header& header, Unpacked& to) {
        load_nibbles(from + 32, part, to.quads);
        to.scale[0] = Vector::multiply(header.d, load_u8(from, part));
        to.minimum[0] = Vector::multiply(header.m, load_u8(from + 16, part));
    }
};

struct Q5_K : Q4_K {
    static constexpr int sub_bytes = 352;
    static constexpr int largest = 31;
    static void load(const uint8_t* from, int part, const Header& header, Unpacked& to) {
        Q4_K::load(from, part, header, to);
        add_high_bits<4>(from + 288, part, to.quads);
    }
};

struct Q6_K : Plain {
    static constexpr int sub_blocks = 8;
    static constexpr int header_bytes = 32;
    static constexpr int sub_bytes = 416;
    static constexpr int largest = 63;
    static constexpr int zero = 32;
    static constexpr bool has_halves = true;
    static Header header(const uint8_t* from, int part) { return {load_half(from, part), Vector::zero()}; }
    static void load(const uint8_t* from, int part, const Header& header, Unpacked& to) {
        load_nibbles(from + 32, part, to.quads);
        add_bit_pairs<4>(from + 288, part, to.quads);
        add_bit_pairs<4>(from + 352, part, to.quads + 4);
        to.scale[0] = Vector::multiply(header.d, load_i8(from, part));
        to.scale[1] = Vector::multiply(header.d, load_i8(from + 16, part));
    }
};

struct Iq4Xs : Plain {
    static constexpr int sub_blocks = 8;
    static constexpr int header_bytes = 32;
    static constexpr int sub_bytes = 272;
    static constexpr int largest = 255;
    static constexpr int zero = 128;
    static Header header(const uint8_t* from, int part) { return {load_half(from, part), Vector::zero()}; }
    static void load(const uint8_t* from, int part, const Header& header, Unpacked& to) {
        load_nibbles(from + 16, part, to.quads);
        for (Bytes& quad : to.quads) quad = Vector::look_up(quad);
        to.scale[0] = Vector::multiply(header.d, load_i8(from, part));
    }
};

// Dense formats: `step` values of k at a time.

struct F32 {
    static constexpr int step = 1;
    static constexpr int block_bytes = 64;
    static void load(const uint8_t* from, int part, Float* to) {
        to[0] = Vector::load(reinterpret_cast<const float*>(from) + Vector::lanes * part);
    }
};

struct F16 {
    static constexpr int step = 1;
    static constexpr int block_bytes = 32;
    static void load(const uint8_t* from, int part, Float* to) { to[0] = load_half(from, part); }
};

struct Bf16 {
    static constexpr int step = 2;
    static constexpr int block_bytes = 64;
    static void load(const uint8_t* from, int part, Float* to) {
        Vector::load_bf16_pairs(from + 4 * Vector::lanes * part, to[0], to[1]);
    }
};

}  // namespace
}  // namespace turbolm
