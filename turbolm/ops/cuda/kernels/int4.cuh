// Weights of 4 bits as `turbolm.ops.cuda.int4.pack` lays them out.
//
//   unit   16 rows x 128 k: 1024 bytes of codes, then GROUPS times 16 words, one per row and group of k
//
// Rows of a unit: 8 of the first half of w, then 8 of the second half (so that a gate meets its value). Codes: two
// halves of 64 k, 16 bytes per lane (g, c) = (lane / 4, lane % 4): one word per 16 k. A word is the A fragment of
// m16n8k16 (and of wgmma) in true order: its nibbles p and p + 4 are elements 0 and 1 of register p.
// A row's word: scale, a float32 whose lowest 5 bits are the zero point; words of rows g and g + 8 side by side.
//
// Constants of the compiler's command line: GROUPS (1, 2 or 4, of a unit's k).

constexpr int INT4_CODE_BYTES = 1024;
constexpr int INT4_UNIT_BYTES = INT4_CODE_BYTES + GROUPS * 64;

// 2^7 (2^10) as a pair of elements: a code in its lowest bits adds its value.
#if ELEMENT_FP16
constexpr u32 CODE_BASE = 0x64006400;
#else
constexpr u32 CODE_BASE = 0x43004300;
#endif

struct Int4Row {
    float scale;
    u32 minus_zero;  // -(base + zero), twice

    __device__ __forceinline__ explicit Int4Row(u32 word)
        : scale(__uint_as_float(word & ~31u)), minus_zero((CODE_BASE | 0x80008000) + (word & 31) * 0x10001) {}
};

// The pair `p` of a word of codes, minus the zero point: exact. mask: 0x000f000f, as an argument of the kernel: a
// constant that the assembler sees is moved to a register at every use.
__device__ __forceinline__ u32 int4_pair(u32 word, int p, u32 mask, u32 minus_zero) {
    return add_pairs(((word >> (4 * p)) & mask) | CODE_BASE, minus_zero);
}

// An A fragment, minus the zero points of rows g and g + 8.
__device__ __forceinline__ void int4_fragment(u32 word, u32 mask, u32 minus_zero_g, u32 minus_zero_g8, u32 (&a)[4]) {
    a[0] = int4_pair(word, 0, mask, minus_zero_g);
    a[1] = int4_pair(word, 1, mask, minus_zero_g8);
    a[2] = int4_pair(word, 2, mask, minus_zero_g);
    a[3] = int4_pair(word, 3, mask, minus_zero_g8);
}
