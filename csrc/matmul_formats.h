// How each packed format becomes registers, in terms of a `Vector` (see matmul_kernel.h).
//
// A block of 32 values of `Vector::lanes` rows is `Unpacked`: the quads as unsigned bytes, and float
// factors of each row. A value of the matrix is
//     (byte - zero) * d                    plain formats
//     byte * d + m                         has_minimum
//     (byte - zero) * (d or m)             has_halves: d for values 0..15 and m for 16..31
#pragma once

namespace turbolm {
namespace {

using Float = Vector::Float;
using Int = Vector::Int;
using Bytes = Vector::Bytes;

struct Unpacked {
    Bytes quads[8];
    Float d, m;
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

inline void add_high_bits(const uint8_t* from, int part, Bytes* quads) {
    const Bytes bits = Vector::load_bytes(from + 4 * Vector::lanes * part);
    quads[0] = Vector::insert<4, 0x10>(quads[0], bits);
    quads[1] = Vector::insert<3, 0x10>(quads[1], bits);
    quads[2] = Vector::insert<2, 0x10>(quads[2], bits);
    quads[3] = Vector::insert<1, 0x10>(quads[3], bits);
    quads[4] = Vector::insert<0, 0x10>(quads[4], bits);
    quads[5] = Vector::insert<-1, 0x10>(quads[5], bits);
    quads[6] = Vector::insert<-2, 0x10>(quads[6], bits);
    quads[7] = Vector::insert<-3, 0x10>(quads[7], bits);
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
        to.d = load_half(from, part);
    }
};

struct Q4_1 : Plain {
    static constexpr int sub_bytes = 320;
    static constexpr bool has_minimum = true;
    static void load(const uint8_t* from, int part, const Header&, Unpacked& to) {
        load_nibbles(from + 64, part, to.quads);
        to.d = load_half(from, part);
        to.m = load_half(from + 32, part);
    }
};

struct Q5_0 : Plain {
    static constexpr int sub_bytes = 352;
    static constexpr int largest = 31;
    static constexpr int zero = 16;
    static void load(const uint8_t* from, int part, const Header&, Unpacked& to) {
        load_nibbles(from + 32, part, to.quads);
        add_high_bits(from + 288, part, to.quads);
        to.d = load_half(from, part);
    }
};

struct Q5_1 : Plain {
    static constexpr int sub_bytes = 384;
    static constexpr int largest = 31;
    static constexpr bool has_minimum = true;
    static void load(const uint8_t* from, int part, const Header&, Unpacked& to) {
        load_nibbles(from + 64, part, to.quads);
        add_high_bits(from + 320, part, to.quads);
        to.d = load_half(from, part);
        to.m = load_half(from + 32, part);
    }
};

struct Q8_0 : Plain {
    static constexpr int sub_bytes = 544;
    static constexpr int largest = 255;
    static constexpr int zero = 128;
    static void load(const uint8_t* from, int part, const Header&, Unpacked& to) {
        for (int j = 0; j < 8; ++j) to.quads[j] = Vector::load_bytes(from + 32 + 64 * j + 4 * Vector::lanes * part);
        to.d = load_half(from, part);
    }
};

struct Iq4Nl : Plain {
    static constexpr int sub_bytes = 288;
    static constexpr int largest = 255;
    static constexpr int zero = 128;
    static void load(const uint8_t* from, int part, const Header&, Unpacked& to) {
        load_nibbles(from + 32, part, to.quads);
        for (Bytes& quad : to.quads) quad = Vector::look_up(quad);
        to.d = load_half(from, part);
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
        to.d = Vector::multiply(header.d, load_u8(from, part));
        to.m = Vector::multiply(header.m, load_u8(from + 16, part));
    }
};

struct Q5_K : Q4_K {
    static constexpr int sub_bytes = 352;
    static constexpr int largest = 31;
    static void load(const uint8_t* from, int part, const Header& header, Unpacked& to) {
        Q4_K::load(from, part, header, to);
        add_high_bits(from + 288, part, to.quads);
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
        for (int half = 0; half < 2; ++half) {
            const Bytes bits = Vector::load_bytes(from + 288 + 64 * half + 4 * Vector::lanes * part);
            Bytes* quads = to.quads + 4 * half;
            quads[0] = Vector::insert<4, 0x30>(quads[0], bits);
            quads[1] = Vector::insert<2, 0x30>(quads[1], bits);
            quads[2] = Vector::insert<0, 0x30>(quads[2], bits);
            quads[3] = Vector::insert<-2, 0x30>(quads[3], bits);
        }
        to.d = Vector::multiply(header.d, load_i8(from, part));
        to.m = Vector::multiply(header.d, load_i8(from + 16, part));
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
        to.d = Vector::multiply(header.d, load_i8(from, part));
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
