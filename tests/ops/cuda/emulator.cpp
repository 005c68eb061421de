// Runs kernels/linear.cu, or where WARPGROUPS is defined kernels/wide.cu, on the CPU, thread by thread, as far as a
// GPU's rules go: lanes meet at an MMA, a CTA's threads at a barrier; copies arrive as late as they may and spoil
// their target until then; wgmma reads shared memory as late as it may; addresses are checked. Fragments are laid out
// as the PTX manual's figures for m16n8k16 and m64nNk16 have them.

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __expf(value) std::exp(value)

typedef unsigned int u32;
typedef unsigned long long u64;
typedef unsigned short u16;
using std::max;
using std::min;

struct uint4 {
    u32 x, y, z, w;
};
struct uint2 {
    u32 x, y;
};
struct float4 {
    float x, y, z, w;
};
struct Index {
    unsigned x, y;
};

#ifdef WARPGROUPS
constexpr int CTA_THREADS = 128 * WARPGROUPS;
#else
constexpr int CTA_THREADS = 32 * WARPS_M * WARPS_K;
#endif
constexpr int WARP = 32;
constexpr size_t STACK = 128 << 10;

struct Copy {
    u32 to;
    const char* from;
};

struct Product {
    u32 a[4];
    u64 b;
    float (*sums)[4];
};

struct Thread {
    ucontext_t context;
    std::vector<char> stack;
    std::vector<std::vector<Copy>> groups;
    std::vector<Copy> open;
    std::vector<Product> products;  // all; the first `finished` are done
    std::vector<long> product_groups;  // their number after each group that is not done
    long finished, products_begun;
    long barriers, warp_barriers, multiplications;
    bool done, may_touch_activations;
};

struct Fragments {
    u32 a[WARP][4], b[WARP][2];
    float* sums[WARP];
};

alignas(1024) char shared[256 << 10];
static Thread threads[CTA_THREADS];
static Fragments warp_fragments[CTA_THREADS / WARP];
static ucontext_t scheduler;
static int current;
static size_t shared_bytes;
static struct { const char *begin, *end; } x_range, w_range;
static bool started_next;
static Index blockIdx, gridDim;
#define threadIdx (Index{(unsigned)current, 0})

static void check(bool holds, const char* what) {
    if (holds) return;
    std::fprintf(stderr, "emulator: %s (CTA %u, %u, thread %d)\n", what, blockIdx.x, blockIdx.y, current);
    std::abort();
}

static void yield() { swapcontext(&threads[current].context, &scheduler); }

static bool everyone(int first, int count, long Thread::* counter, long value) {
    for (int i = first; i < first + count; i++) {
        check(!threads[i].done || threads[i].*counter >= value, "threads don't meet");
        if (threads[i].*counter < value) return false;
    }
    return true;
}

static void __syncthreads() {
    long value = ++threads[current].barriers;
    while (!everyone(0, CTA_THREADS, &Thread::barriers, value)) yield();
}

static void sync_warp() {
    long value = ++threads[current].warp_barriers;
    while (!everyone(current / WARP * WARP, WARP, &Thread::warp_barriers, value)) yield();
}

static float __uint_as_float(u32 bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

static float to_float(u16 bits) {
#if ELEMENT_FP16
    _Float16 value;
    std::memcpy(&value, &bits, 2);
    return value;
#else
    u32 wide = (u32)bits << 16;
    float value;
    std::memcpy(&value, &wide, 4);
    return value;
#endif
}

static u16 to_element(float value) {
#if ELEMENT_FP16
    _Float16 half = value;
    u16 bits;
    std::memcpy(&bits, &half, 2);
    return bits;
#else
    u32 bits;
    std::memcpy(&bits, &value, 4);
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;  // finite values
#endif
}

static void wait_for_previous_kernel() { threads[current].may_touch_activations = true; }
static void let_next_kernel_start() { started_next = true; }

static void prefetch_to_l2(const void* address, u32 bytes) {
    const char* from = (const char*)address;
    check(from >= w_range.begin && from + bytes <= w_range.end && bytes % 16 == 0 && bytes > 0, "prefetch past w");
}

static u32 shared_address(const void* pointer) { return (const char*)pointer - shared; }

static uint4 read_shared(u32 address) {
    check(address % 16 == 0 && address + 16 <= shared_bytes, "read past shared memory");
    uint4 value;
    std::memcpy(&value, shared + address, 16);
    return value;
}

static uint2 read_shared_pair(u32 address) {
    check(address % 8 == 0 && address + 8 <= shared_bytes, "read past shared memory");
    uint2 value;
    std::memcpy(&value, shared + address, 8);
    return value;
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

static void start_copy(u32 to, const char* from) {
    check(to % 16 == 0 && to + 16 <= shared_bytes && (uintptr_t)from % 16 == 0, "copy past shared memory");
    std::memset(shared + to, 0xff, 16);  // NaN
    threads[current].open.push_back({to, from});
}

static void copy_async(u32 to, const void* from) {
    check(threads[current].may_touch_activations, "x is read too early");
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

static void commit_copies() {
    Thread& thread = threads[current];
    thread.groups.push_back(std::move(thread.open));
    thread.open.clear();
}

template <int PENDING>
static void wait_for_copies() {
    auto& groups = threads[current].groups;
    while (groups.size() > PENDING) {
        for (const Copy& copy : groups.front()) std::memcpy(shared + copy.to, copy.from, 16);
        groups.erase(groups.begin());
    }
}

template <typename Operation>
static u32 each_element(u32 a, u32 b, Operation operation) {
    u32 low = to_element(operation(to_float(a & 0xffff), to_float(b & 0xffff)));
    return low | (u32)to_element(operation(to_float(a >> 16), to_float(b >> 16))) << 16;
}

static u32 spread_low_bytes(u32 bytes) { return (bytes & 0xff) | (bytes >> 8 & 0xff) << 16; }
static u32 spread_high_bytes(u32 bytes) { return spread_low_bytes(bytes >> 16); }

static u32 add_pairs(u32 a, u32 b) {
    return each_element(a, b, [](float x, float y) { return x + y; });
}

static u32 multiply_pairs(u32 a, u32 b) {
    return each_element(a, b, [](float x, float y) { return x * y; });
}

static float element(u32 pair, int index) { return to_float(index ? pair >> 16 : pair & 0xffff); }

static void multiply_warp(const Fragments& f) {
    float a[16][16], b[16][8];
    for (int lane = 0; lane < WARP; lane++) {
        int group = lane / 4, column = lane % 4 * 2;
        for (int i = 0; i < 2; i++) {
            a[group][column + i] = element(f.a[lane][0], i);
            a[group + 8][column + i] = element(f.a[lane][1], i);
            a[group][column + i + 8] = element(f.a[lane][2], i);
            a[group + 8][column + i + 8] = element(f.a[lane][3], i);
            b[column + i][group] = element(f.b[lane][0], i);
            b[column + i + 8][group] = element(f.b[lane][1], i);
        }
    }
    for (int lane = 0; lane < WARP; lane++)
        for (int i = 0; i < 4; i++)
            for (int k = 0; k < 16; k++) f.sums[lane][i] += a[lane / 4 + i / 2 * 8][k] * b[k][lane % 4 * 2 + i % 2];
}

static void multiply_add(float (&sum)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    int warp = current / WARP, lane = current % WARP;
    Fragments& f = warp_fragments[warp];
    u32 a[4] = {a0, a1, a2, a3};
    std::memcpy(f.a[lane], a, 16);
    f.b[lane][0] = b0, f.b[lane][1] = b1;
    f.sums[lane] = sum;
    long value = ++threads[current].multiplications;
    if (everyone(warp * WARP, WARP, &Thread::multiplications, value))
        multiply_warp(f);  // the last to come works for all
    else
        do yield();
        while (!everyone(warp * WARP, WARP, &Thread::multiplications, value));
}

#ifdef WARPGROUPS

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
    check(threads[current].finished == (long)threads[current].products.size(), "sums are read too early");
}

static void multiply_add_rows(float (&sums)[TOKENS / 8][4], const u32 (&a)[4], u64 b) {
    Thread& thread = threads[current];
    thread.products.push_back({{a[0], a[1], a[2], a[3]}, b, sums});
    thread.products_begun++;
}

static void commit_products() { threads[current].product_groups.push_back(threads[current].products.size()); }

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
    const Product& product = threads[current].products[index];
    const int quad = current / 4 * 4, column = current % 4 * 2;
    for (int i = 0; i < 4; i++)
        for (int k = 0; k < 16; k++) {
            const Product& holder = threads[quad + k % 8 / 2].products[index];
            float a = element(holder.a[i / 2 + k / 8 * 2], k % 2);
            for (int j = 0; j < TOKENS / 8; j++)
                product.sums[j][i] += a * row_element(product.b, j * 8 + column + i % 2, k);
        }
}

template <int PENDING>
static void wait_for_products() {
    Thread& thread = threads[current];
    while (thread.product_groups.size() > PENDING) {
        const long end = thread.product_groups.front();
        while (!everyone(current / 128 * 128, 128, &Thread::products_begun, end)) yield();
        for (; thread.finished < end; thread.finished++) finish_product(thread.finished);
        thread.product_groups.erase(thread.product_groups.begin());
    }
}

#include "wide.cu"
#define KERNEL wide

#else

#include "linear.cu"
#define KERNEL linear

#endif

static const Arguments* arguments;

static void thread_main() {
    KERNEL(*arguments);
    Thread& thread = threads[current];
    check(thread.may_touch_activations, "a thread ends without waiting for the kernel before");
    for (const auto& group : thread.groups) check(group.empty(), "a copy is under way at the end");
    check(thread.open.empty(), "a copy is under way at the end");
    thread.done = true;
    yield();
}

// order: 1: threads run from first to last, -1: the other way round. CTAs run from last to first.
extern "C" void emulate(const Arguments* given, int groups, int splits, long num_shared, long x_bytes, long w_bytes,
                        int order) {
    arguments = given;
    shared_bytes = num_shared;
    x_range = {(const char*)given->x, (const char*)given->x + x_bytes};
    w_range = {(const char*)given->w, (const char*)given->w + w_bytes};
    gridDim = {(unsigned)groups, (unsigned)splits};
    for (int cta = groups * splits - 1; cta >= 0; cta--) {
        blockIdx = {(unsigned)(cta % groups), (unsigned)(cta / groups)};
        std::memset(shared, 0xff, sizeof(shared));
        started_next = false;
        for (Thread& thread : threads) {
            thread.stack.resize(STACK);
            thread.groups.clear(), thread.open.clear();
            thread.barriers = thread.warp_barriers = thread.multiplications = 0;
            thread.products.clear(), thread.product_groups.clear();
            thread.finished = thread.products_begun = 0;
            thread.done = thread.may_touch_activations = false;
            getcontext(&thread.context);
            thread.context.uc_stack.ss_sp = thread.stack.data();
            thread.context.uc_stack.ss_size = STACK;
            thread.context.uc_link = &scheduler;
            makecontext(&thread.context, thread_main, 0);
        }
        for (bool any = true; any;) {
            any = false;
            for (int i = 0; i < CTA_THREADS; i++) {
                current = order > 0 ? i : CTA_THREADS - 1 - i;
                if (threads[current].done) continue;
                any = true;
                swapcontext(&scheduler, &threads[current].context);
            }
        }
        check(started_next, "the next kernel is never let in");
    }
}
