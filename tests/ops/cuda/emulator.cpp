// Runs kernels/linear.cu, or where WARPGROUPS is defined kernels/wide.cu, where UNITS is kernels/single.cu, on the
// CPU: see emulator.h. wgmma reads shared memory as late as it may; its fragments are laid out as the PTX manual's
// figures for m64nNk16 have them.

#ifdef WARPGROUPS
#define CTA_THREADS (128 * WARPGROUPS)
#else
#define CTA_THREADS (32 * WARPS_M * WARPS_K)
#endif

#include "emulator.h"

#include <map>

static struct { const char *begin, *end; } x_range, w_range;

static void prefetch_to_l2(const void* address, u32 bytes) {
    const char* from = (const char*)address;
    check(from >= w_range.begin && from + bytes <= w_range.end && bytes % 16 == 0 && bytes > 0, "prefetch past w");
}

static uint4 read_matrices(u32 address) {
    const int lane = current % WARP;
    const u32 from = address - lane * 16;
    check(from % 128 == 0 && from + 512 <= shared_bytes, "matrices past shared memory");
    uint4 value;
    u32* words[4] = {&value.x, &value.y, &value.z, &value.w};
    for (int i = 0; i < 4; i++) std::memcpy(words[i], shared + from + i * 128 + lane * 4, 4);
    return value;
}

static void copy_async(u32 to, const void* from) {
    check(threads[current].has_waited, "x is read too early");
    check((const char*)from >= x_range.begin && (const char*)from + 16 <= x_range.end, "read past x");
    start_copy(to, (const char*)from);
}

template <int OFFSET>
static void copy_async_once(u32 to, const char* from) {
    check(from + OFFSET >= w_range.begin && from + OFFSET + 16 <= w_range.end, "read past w");
    start_copy(to, from + OFFSET);
}

template <int OFFSET>
static void copy_async_constant(u32 to, const char* from) {
    copy_async_once<OFFSET>(to, from);
}

template <typename Operation>
static u32 each_element(u32 a, u32 b, Operation operation) {
    u32 low = to_element(operation(to_float(a & 0xffff), to_float(b & 0xffff)));
    return low | (u32)to_element(operation(to_float(a >> 16), to_float(b >> 16))) << 16;
}

static u32 add_pairs(u32 a, u32 b) {
    return each_element(a, b, [](float x, float y) { return x + y; });
}

static u32 multiply_pairs(u32 a, u32 b) {
    return each_element(a, b, [](float x, float y) { return x * y; });
}

#ifdef WARPGROUPS

struct Product {
    u32 a[4];
    u64 b;
    float (*sums)[4];
    u64 rows;  // where a is in shared memory, if it is there
};

static struct Products {
    std::vector<Product> all;  // the first `finished` are done
    std::vector<long> groups;  // how many there were after each group that is not done
    long finished;
} products[CTA_THREADS];

static bool has_begun(int first, long count) {
    for (int i = first; i < first + 128; i++) {
        check(!threads[i].done || (long)products[i].all.size() >= count, "threads don't meet");
        if ((long)products[i].all.size() < count) return false;
    }
    return true;
}

static void publish(u32* flag) {
    __syncthreads();
    if (current == 0) *flag = 1;
}

static void await(u32* flag) {  // the CTAs after this one have run
    check(current > 0 || *flag == 1, "waits for a CTA that never publishes");
    if (current == 0) *flag = 0;
    __syncthreads();
}

static float4 read_fresh(const float4* from) { return *from; }

static u64 describe_rows(u32 address) {
    check(address % 1024 == 0, "rows are not aligned");
    return address >> 4;
}

static void show_to_products() {}
static void fence_products() {}
static void settle(float (&)[TOKENS / 8][4]) {
    check(products[current].finished == (long)products[current].all.size(), "sums are read too early");
}

static void multiply_add_rows(float (&sums)[TOKENS / 8][4], const u32 (&a)[4], u64 b) {
    products[current].all.push_back({{a[0], a[1], a[2], a[3]}, b, sums});
}

static void multiply_add_rows(float (&sums)[TOKENS / 8][4], u64 a, u64 b) {
    products[current].all.push_back({{}, b, sums, a});
}

static void commit_products() { products[current].groups.push_back(products[current].all.size()); }

static float row_element(u64 descriptor, int token, int k) {
    u32 address = (descriptor << 4) + token * 128 + k * 2;
    address ^= (address >> 7 & 7) << 4;
    check(address + 2 <= shared_bytes, "rows past shared memory");
    u16 bits;
    std::memcpy(&bits, shared + address, 2);
    return to_float(bits);
}

// This thread's sums of a product that its quad has begun.
static void finish_product(long index) {
    const Product& product = products[current].all[index];
    const int quad = current / 4 * 4, column = current % 4 * 2;
    for (int i = 0; i < 4; i++)
        for (int k = 0; k < 16; k++) {
            const Product& holder = products[quad + k % 8 / 2].all[index];
            float a = element(holder.a[i / 2 + k / 8 * 2], k % 2);
            if (product.rows) a = row_element(product.rows, current % 128 / 32 * 16 + current % 32 / 4 + i / 2 * 8, k);
            for (int j = 0; j < TOKENS / 8; j++)
                product.sums[j][i] += a * row_element(product.b, j * 8 + column + i % 2, k);
        }
}

template <int PENDING>
static void wait_for_products() {
    Products& own = products[current];
    while (own.groups.size() > PENDING) {
        const long end = own.groups.front();
        while (!has_begun(current / 128 * 128, end)) yield();
        for (; own.finished < end; own.finished++) finish_product(own.finished);
        own.groups.erase(own.groups.begin());
    }
}

#include "wide.cu"
#define KERNEL wide

#elif defined(UNITS)

struct Barrier {
    u32 to, bytes;
    const char* from;
    bool is_shown;
    u32 completed;  // copies
};
static std::map<u32, Barrier> barriers;

static void make_barrier(u32 barrier) {
    check(barrier % 8 == 0 && barrier + 8 <= shared_bytes && !barriers.count(barrier), "a barrier is made twice");
    barriers[barrier] = {};
}

static void show_barriers() {
    for (auto& entry : barriers) entry.second.is_shown = true;
}

static void copy_bulk(u32 to, const void* address, u32 bytes, u32 barrier) {
    const char* from = (const char*)address;
    Barrier& b = barriers.at(barrier);
    check(b.is_shown && b.from == nullptr, "a copy is under way at this barrier");
    check(from >= w_range.begin && from + bytes <= w_range.end && bytes % 16 == 0 && bytes > 0, "read past w");
    check(to % 16 == 0 && (uintptr_t)from % 16 == 0 && to + bytes <= shared_bytes, "copy past shared memory");
    std::memset(shared + to, 0xff, bytes);
    b.to = to, b.bytes = bytes, b.from = from;
}

static void wait_for_bulk(u32 barrier, u32 parity) {
    Barrier& b = barriers.at(barrier);
    if (b.completed % 2 != parity) return;  // the copy of this parity was waited for by another lane
    check(b.from != nullptr, "nothing is under way at this barrier");
    std::memcpy(shared + b.to, b.from, b.bytes);
    b.from = nullptr, b.completed++;
}

#include "single.cu"
#define KERNEL single

#else

#include "linear.cu"
#define KERNEL linear

#endif

// order: 1: threads run from first to last, -1: the other way round. CTAs run from last to first.
extern "C" void emulate(const Arguments* given, int groups, int splits, long num_shared, long x_bytes, long w_bytes,
                        int order) {
    kernel = [given] { KERNEL(*given); };
    shared_bytes = num_shared;
    x_range = {(const char*)given->x, (const char*)given->x + x_bytes};
    w_range = {(const char*)given->w, (const char*)given->w + w_bytes};
    gridDim = {(unsigned)groups, (unsigned)splits};
    for (int cta = groups * splits - 1; cta >= 0; cta--) {
#ifdef WARPGROUPS
        for (Products& own : products) own = {};
#elif defined(UNITS)
        barriers.clear();
#endif
        run_cta({(unsigned)(cta % groups), (unsigned)(cta / groups)}, order > 0);
#ifdef UNITS
        for (const auto& entry : barriers) check(entry.second.from == nullptr, "a copy is under way at the end");
#endif
    }
}
