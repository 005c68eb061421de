// Runs kernels/decode.cu on the CPU, thread by thread, as far as a GPU's rules go: the lanes of a warp meet at an
// MMA or a shuffle, a CTA's threads at a barrier; copies arrive as late as they may and spoil their target until
// then; addresses are checked. MMA fragments are laid out as the PTX manual's figures for m16n8k16 have them.

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#define __device__
#define __host__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__
#define __align__(bytes)

typedef unsigned int u32;
typedef unsigned short u16;
using std::max;
using std::min;

struct uint4 {
    u32 x, y, z, w;
};
struct float4 {
    float x, y, z, w;
};
struct Index {
    unsigned x, y;
};

constexpr int WARP = 32, THREADS = 32 * WARPS;
constexpr size_t STACK = 256 << 10;

struct Copy {
    u32 to;
    const char* from;  // null: zeros
};

struct Thread {
    ucontext_t context;
    std::vector<char> stack;
    std::vector<std::vector<Copy>> groups;
    std::vector<Copy> open;
    long barriers, meetings;
    bool done, has_waited;
};

alignas(1024) char shared[256 << 10];
static Thread threads[THREADS];
static struct {
    u32 a[WARP][4], b[WARP][2];
    float* sums[WARP];
    u32 given[2][WARP];  // of shuffles, in turn
} warps[WARPS];
static ucontext_t scheduler;
static int current;
static size_t shared_bytes;
static const char *pool_begin[2], *pool_end[2];  // K and V
static const char *newest_begin, *newest_end;    // of the kernel before: not to be read before it has ended
static bool started_next;
static Index blockIdx, gridDim;
#define threadIdx (Index{(unsigned)current, 0})

static void check(bool holds, const char* what) {
    if (holds) return;
    std::fprintf(stderr, "emulator: %s (CTA %u, thread %d)\n", what, blockIdx.x, current);
    std::abort();
}

static void meet(int first, int count, long Thread::* counter) {
    long value = ++(threads[current].*counter);
    for (;;) {
        bool all = true;
        for (int i = first; i < first + count; i++) {
            check(!threads[i].done || threads[i].*counter >= value, "threads don't meet");
            all &= threads[i].*counter >= value;
        }
        if (all) return;
        swapcontext(&threads[current].context, &scheduler);
    }
}

static void __syncthreads() { meet(0, THREADS, &Thread::barriers); }
static void meet_warp() { meet(current / WARP * WARP, WARP, &Thread::meetings); }
static void __syncwarp() { meet_warp(); }

template <typename T>
static T exchange(T value, int from) {
    static_assert(sizeof(T) <= 4, "");
    auto& warp = warps[current / WARP];
    int turn = threads[current].meetings & 1;
    std::memcpy(&warp.given[turn][current % WARP], &value, sizeof(T));
    meet_warp();
    T found;
    std::memcpy(&found, &warp.given[turn][from], sizeof(T));
    return found;
}

template <typename T>
static T from_lane(T value, int lane) { return exchange(value, lane); }
template <typename T>
static T from_lane_xor(T value, int mask) { return exchange(value, current % WARP ^ mask); }
static bool is_any(bool value) {
    int turn = threads[current].meetings & 1;
    exchange((int)value, 0);
    for (u32 given : warps[current / WARP].given[turn])
        if (given) return true;
    return false;
}
static int sum_up_to_lane(int value, int lane) {
    int turn = threads[current].meetings & 1, sum = 0;
    exchange(value, 0);
    for (int i = 0; i <= lane; i++) sum += (int)warps[current / WARP].given[turn][i];
    return sum;
}

static float to_float(u16 bits) {
    u32 wide = (u32)bits << 16;
    float value;
    std::memcpy(&value, &wide, 4);
    return value;
}
static u16 to_element(float value) {
    u32 bits;
    std::memcpy(&bits, &value, 4);
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;  // finite values
}
static u32 pack_elements(float low, float high) { return to_element(low) | (u32)to_element(high) << 16; }
static u32 low_halves(u32 a, u32 b) { return (a & 0xffff) | b << 16; }
static u32 high_halves(u32 a, u32 b) { return a >> 16 | (b & 0xffff0000); }
static float power_of_two(float x) { return std::exp2(x); }

static void wait_for_previous_kernel() { threads[current].has_waited = true; }
static void let_next_kernel_start() { started_next = true; }

static uint4 read_global(const void* from) {
    check(threads[current].has_waited, "q is read too early");
    return *(const uint4*)from;
}
static float4 read_fresh(const float* from) { return *(const float4*)from; }
static float read_fresh_float(const float* from) { return *from; }
static int count_up(int* counter, int lane) {
    int before = lane == 0 ? (*counter)++ : 0;
    return from_lane(before, 0);
}

static u32 shared_address(const void* pointer) { return (const char*)pointer - shared; }
static uint4 read_shared(u32 address) {
    check(address % 16 == 0 && address + 16 <= shared_bytes, "read past shared memory");
    uint4 value;
    std::memcpy(&value, shared + address, 16);
    return value;
}

template <int TO, int FROM>
static void copy_async_or_zero(u32 to, const void* base, bool present) {
    const char* from = (const char*)base + FROM;
    to += TO;
    check(to % 16 == 0 && to + 16 <= shared_bytes, "copy past shared memory");
    if (present) {
        bool inside = false;
        for (int i = 0; i < 2; i++) inside |= from >= pool_begin[i] && from + 16 <= pool_end[i];
        check(inside && (uintptr_t)from % 16 == 0, "read past K and V");
    }
    std::memset(shared + to, 0xff, 16);  // NaN
    threads[current].open.push_back({to, present ? from : nullptr});
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
        for (const Copy& copy : groups.front())
            copy.from ? std::memcpy(shared + copy.to, copy.from, 16) : std::memset(shared + copy.to, 0, 16);
        groups.erase(groups.begin());
    }
}

static float element(u32 pair, int index) { return to_float(index ? pair >> 16 : pair & 0xffff); }

static void multiply_add(float (&sum)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    auto& warp = warps[current / WARP];
    int lane = current % WARP;
    u32 a[4] = {a0, a1, a2, a3};
    std::memcpy(warp.a[lane], a, 16);
    warp.b[lane][0] = b0, warp.b[lane][1] = b1;
    meet_warp();
    // This lane's four results: rows lane / 4 and + 8, columns 2 (lane % 4) and + 1.
    for (int i = 0; i < 4; i++) {
        int row = lane / 4, column = lane % 4 * 2 + i % 2;
        for (int k = 0; k < 16; k++) {
            float left = element(warp.a[row * 4 + k % 8 / 2][i / 2 + k / 8 * 2], k % 2);
            sum[i] += left * element(warp.b[column * 4 + k % 8 / 2][k / 8], k % 2);
        }
    }
    meet_warp();
}

#include "decode.cu"

static const Arguments* arguments;

static void thread_main() {
    decode(*arguments);
    Thread& thread = threads[current];
    check(thread.has_waited, "a thread ends without waiting for the kernel before");
    for (const auto& group : thread.groups) check(group.empty(), "a copy is under way at the end");
    check(thread.open.empty(), "a copy is under way at the end");
    thread.done = true;
    swapcontext(&thread.context, &scheduler);
}

// order: 1: threads, and CTAs, run from first to last, -1: the other way round.
extern "C" void emulate(const Arguments* given, int ctas, long num_shared, long pool_bytes, int order) {
    arguments = given;
    shared_bytes = num_shared;
    const void* pools[2] = {given->k, given->v};
    for (int i = 0; i < 2; i++) pool_begin[i] = (const char*)pools[i], pool_end[i] = pool_begin[i] + pool_bytes;
    gridDim = {(unsigned)ctas, 1};
    for (int cta = 0; cta < ctas; cta++) {
        blockIdx = {(unsigned)(order > 0 ? cta : ctas - 1 - cta), 0};
        std::memset(shared, 0xff, sizeof(shared));
        started_next = false;
        for (Thread& thread : threads) {
            thread.stack.resize(STACK);
            thread.groups.clear(), thread.open.clear();
            thread.barriers = thread.meetings = 0;
            thread.done = thread.has_waited = false;
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
