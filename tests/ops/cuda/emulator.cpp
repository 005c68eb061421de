// Runs kernels/linear.cu on the CPU, thread by thread, as far as a GPU's rules go: lanes meet at an MMA, a
// CTA's threads at a barrier; copies arrive as late as they may and spoil their target until then; addresses
// are checked. MMA fragments are laid out as the PTX manual's figures for m16n8k16 have them.

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
struct Index {
    unsigned x, y;
};

constexpr int WARP = 32, THREADS = 32 * WARPS_M * WARPS_K;
constexpr size_t STACK = 128 << 10;

struct Copy {
    u32 to;
    const char* from;
};

struct Thread {
    ucontext_t context;
    std::vector<char> stack;
    std::vector<std::vector<Copy>> groups;
    std::vector<Copy> open;
    long barriers, multiplications;
    bool done, may_touch_activations;
};

struct Fragments {
    u32 a[WARP][4], b[WARP][2];
    float* sums[WARP];
};

alignas(1024) char shared[256 << 10];
static Thread threads[THREADS];
static Fragments fragments[THREADS / WARP];
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
    while (!everyone(0, THREADS, &Thread::barriers, value)) yield();
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
    Fragments& f = fragments[warp];
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

#include "linear.cu"

static const Arguments* arguments;

static void thread_main() {
    linear(*arguments);
    Thread& thread = threads[current];
    check(thread.may_touch_activations, "a thread ends without waiting for the kernel before");
    for (const auto& group : thread.groups) check(group.empty(), "a copy is under way at the end");
    check(thread.open.empty(), "a copy is under way at the end");
    thread.done = true;
    yield();
}

// order: 1: threads run from first to last, -1: the other way round.
extern "C" void emulate(const Arguments* given, int groups, int splits, long num_shared, long x_bytes, long w_bytes,
                        int order) {
    arguments = given;
    shared_bytes = num_shared;
    x_range = {(const char*)given->x, (const char*)given->x + x_bytes};
    w_range = {(const char*)given->w, (const char*)given->w + w_bytes};
    gridDim = {(unsigned)groups, (unsigned)splits};
    for (int cta = 0; cta < groups * splits; cta++) {
        blockIdx = {(unsigned)(cta % groups), (unsigned)(cta / groups)};
        std::memset(shared, 0xff, sizeof(shared));
        started_next = false;
        for (Thread& thread : threads) {
            thread.stack.resize(STACK);
            thread.groups.clear(), thread.open.clear();
            thread.barriers = thread.multiplications = 0;
            thread.done = thread.may_touch_activations = false;
            getcontext(&thread.context);
            thread.context.uc_stack.ss_sp = thread.stack.data();
            thread.context.uc_stack.ss_size = STACK;
            thread.context.uc_link = &scheduler;
            makecontext(&thread.context, thread_main, 0);
        }
        for (bool any = true; any;) {
            any = false;
            for (int i = 0; i < THREADS; i++) {
                current = order > 0 ? i : THREADS - 1 - i;
                if (threads[current].done) continue;
                any = true;
                swapcontext(&scheduler, &threads[current].context);
            }
        }
        check(started_next, "the next kernel is never let in");
    }
}
