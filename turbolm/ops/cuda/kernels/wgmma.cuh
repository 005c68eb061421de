// wgmma.m64nTOKENSk16: 64 rows of A from registers of a warpgroup or from shared memory, TOKENS rows of B from shared
// memory. A and B are elements, sums float32. ELEMENT_FP16 and TOKENS (16, 32, 64, 128 or 256) choose the instruction.

// In shared memory: rows of 64 k, 128 bytes each, 16-byte chunk c of row r in the place of chunk c ^ (r % 8); 8 rows
// are 1024 bytes, aligned to that. Adding 2 moves on by 16 k.
__device__ __forceinline__ u64 describe_rows(u32 address) {
    const u64 swizzle_128_bytes = 1ull << 62, eight_rows = 1024 >> 4, ignored = 1;
    return swizzle_128_bytes | eight_rows << 32 | ignored << 16 | (address & 0x3ffff) >> 4;
}

// Before a product whose registers were written otherwise.
__device__ __forceinline__ void fence_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ __forceinline__ void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

template <int PENDING>
__device__ __forceinline__ void wait_for_products() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// What this thread wrote into shared memory, products may read after the next barrier.
__device__ __forceinline__ void show_to_products() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

#if ELEMENT_FP16
#define WGMMA_TYPES ".f32.f16.f16 "
#else
#define WGMMA_TYPES ".f32.bf16.bf16 "
#endif

#define SUMS_1(i) "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3])
#define SUMS_2(i) SUMS_1(i), SUMS_1(i + 1)
#define SUMS_4(i) SUMS_2(i), SUMS_2(i + 2)
#define SUMS_8(i) SUMS_4(i), SUMS_4(i + 4)
#define SUMS_16(i) SUMS_8(i), SUMS_8(i + 8)
#define SUMS_32(i) SUMS_16(i), SUMS_16(i + 16)

#define WGMMA(SHAPE, SUM_REGISTERS, A_AND_B, SUM_OPERANDS, ...)                                        \
    asm volatile(                                                                                      \
        "{\n.reg .pred add;\nsetp.eq.u32 add, 0, 0;\nwgmma.mma_async.sync.aligned." SHAPE WGMMA_TYPES   \
        "{" SUM_REGISTERS "}, " A_AND_B ";\n}"                                                         \
        : SUM_OPERANDS                                                                                 \
        : __VA_ARGS__)
#define FROM_REGISTERS "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b)
#define FROM_SHARED "l"(a), "l"(b)

#define REGISTERS_8 "%0,%1,%2,%3,%4,%5,%6,%7"
#define REGISTERS_16 REGISTERS_8 "," \
    "%8,%9,%10,%11,%12,%13,%14,%15"
#define REGISTERS_32 REGISTERS_16 "," \
    "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define REGISTERS_64 REGISTERS_32 "," \
    "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47," \
    "%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define REGISTERS_128 REGISTERS_64 "," \
    "%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79," \
    "%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95," \
    "%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111," \
    "%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"

// d [64, TOKENS] += a [64, 16] b [16, TOKENS], under way until waited for; d as m16n8k16 lays it out, a warp for each
// 16 rows. a: as m16n8k16 has it, or a description.
__device__ __forceinline__ void multiply_add_rows(float (&d)[TOKENS / 8][4], const u32 (&a)[4], u64 b) {
#if TOKENS == 16
    WGMMA("m64n16k16", REGISTERS_8, "{%8,%9,%10,%11}, %12, add, 1, 1, 0", SUMS_2(0), FROM_REGISTERS);
#elif TOKENS == 32
    WGMMA("m64n32k16", REGISTERS_16, "{%16,%17,%18,%19}, %20, add, 1, 1, 0", SUMS_4(0), FROM_REGISTERS);
#elif TOKENS == 64
    WGMMA("m64n64k16", REGISTERS_32, "{%32,%33,%34,%35}, %36, add, 1, 1, 0", SUMS_8(0), FROM_REGISTERS);
#elif TOKENS == 128
    WGMMA("m64n128k16", REGISTERS_64, "{%64,%65,%66,%67}, %68, add, 1, 1, 0", SUMS_16(0), FROM_REGISTERS);
#elif TOKENS == 256
    WGMMA("m64n256k16", REGISTERS_128, "{%128,%129,%130,%131}, %132, add, 1, 1, 0", SUMS_32(0), FROM_REGISTERS);
#endif
}

__device__ __forceinline__ void multiply_add_rows(float (&d)[TOKENS / 8][4], u64 a, u64 b) {
#if TOKENS == 16
    WGMMA("m64n16k16", REGISTERS_8, "%8, %9, add, 1, 1, 0, 0", SUMS_2(0), FROM_SHARED);
#elif TOKENS == 32
    WGMMA("m64n32k16", REGISTERS_16, "%16, %17, add, 1, 1, 0, 0", SUMS_4(0), FROM_SHARED);
#elif TOKENS == 64
    WGMMA("m64n64k16", REGISTERS_32, "%32, %33, add, 1, 1, 0, 0", SUMS_8(0), FROM_SHARED);
#elif TOKENS == 128
    WGMMA("m64n128k16", REGISTERS_64, "%64, %65, add, 1, 1, 0, 0", SUMS_16(0), FROM_SHARED);
#elif TOKENS == 256
    WGMMA("m64n256k16", REGISTERS_128, "%128, %129, add, 1, 1, 0, 0", SUMS_32(0), FROM_SHARED);
#endif
}

// Keeps the compiler from reading sums before they were waited for.
__device__ __forceinline__ void settle(float (&d)[TOKENS / 8][4]) {
#pragma unroll
    for (int i = 0; i < TOKENS / 8; i++) asm volatile("" : SUMS_1(i)::"memory");
}
