// Runs a kernel's source on the CPU, thread by thread, as far as a GPU's rules go: lanes meet at an MMA or a shuffle,
// a CTA's threads at a barrier; copies arrive as late as they may and spoil their target until then; addresses are
// checked. Fragments are laid out as the PTX manual's figures for m16n8k16 have them.
//
// Whoever includes this says first how many CTA_THREADS there are, brings the instructions that only its kernel uses,
// and calls `run_grid`.

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
#define __host__
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

constexpr int WARP = 32;
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
    long barriers, warp_barriers, multiplications;
    bool done, has_waited;  // for the kernel before
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

static void meet(int first, int count, long Thread::* counter) {
    long value = ++(threads[current].*counter);
    while (!everyone(first, count, counter, value)) yield();
}

static void __syncthreads() { meet(0, CTA_THREADS, &Thread::barriers); }
static void __syncwarp() { meet(current / WARP * WARP, WARP, &Thread::warp_barriers); }
static void sync_warp() { __syncwarp(); }

static float __uint_as_float(u32 bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

// Of float16, and of the elements, which may be bfloat16.
static float half_to_float(u16 bits) {
    _Float16 value;
    std::memcpy(&value, &bits, 2);
    return value;
}

static u16 to_half(float value) {
    _Float16 half = value;
    u16 bits;
    std::memcpy(&bits, &half, 2);
    return bits;
}

static float to_float(u16 bits) {
#if ELEMENT_FP16
    return half_to_float(bits);
#else
    return __uint_as_float((u32)bits << 16);
#endif
}

static u16 to_element(float value) {
#if ELEMENT_FP16
    return to_half(value);
#else
    u32 bits;
    std::memcpy(&bits, &value, 4);
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;  // finite values
#endif
}

static void wait_for_previous_kernel() { threads[current].has_waited = true; }
static void let_next_kernel_start() { started_next = true; }

static u32 shared_address(const void* pointer) { return (const char*)pointer - shared; }

template <typename T>
static T read_shared_as(u32 address) {
    check(address % sizeof(T) == 0 && address + sizeof(T) <= shared_bytes, "read past shared memory");
    T value;
    std::memcpy(&value, shared + address, sizeof(T));
    return value;
}

static uint4 read_shared(u32 address) { return read_shared_as<uint4>(address); }
static u32 read_shared_word(u32 address) { return read_shared_as<u32>(address); }
static uint2 read_shared_pair(u32 address) { return read_shared_as<uint2>(address); }

static void start_copy(u32 to, const char* from) {
    check(to % 16 == 0 && to + 16 <= shared_bytes && (uintptr_t)from % 16 == 0, "copy past shared memory");
    std::memset(shared + to, 0xff, 16);  // NaN
    threads[current].open.push_back({to, from});
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

static u32 spread_low_bytes(u32 bytes) { return (bytes & 0xff) | (bytes >> 8 & 0xff) << 16; }
static u32 spread_high_bytes(u32 bytes) { return spread_low_bytes(bytes >> 16); }

typedef float (*ToFloat)(u16);

static float element(u32 pair, int index, ToFloat convert = to_float) {
    return convert(index ? pair >> 16 : pair & 0xffff);
}

static void multiply_warp(const Fragments& f, ToFloat convert) {
    float a[16][16], b[16][8];
    for (int lane = 0; lane < WARP; lane++) {
        int group = lane / 4, column = lane % 4 * 2;
        for (int i = 0; i < 2; i++) {
            a[group][column + i] = element(f.a[lane][0], i, convert);
            a[group + 8][column + i] = element(f.a[lane][1], i, convert);
            a[group][column + i + 8] = element(f.a[lane][2], i, convert);
            a[group + 8][column + i + 8] = element(f.a[lane][3], i, convert);
            b[column + i][group] = element(f.b[lane][0], i, convert);
            b[column + i + 8][group] = element(f.b[lane][1], i, convert);
        }
    }
    for (int lane = 0; lane < WARP; lane++)
        for (int i = 0; i < 4; i++)
            for (int k = 0; k < 16; k++) f.sums[lane][i] += a[lane / 4 + i / 2 * 8][k] * b[k][lane % 4 * 2 + i % 2];
}

static void multiply_add_as(ToFloat convert, float (&sum)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    int warp = current / WARP, lane = current % WARP;
    Fragments& f = warp_fragments[warp];
    u32 a[4] = {a0, a1, a2, a3};
    std::memcpy(f.a[lane], a, 16);
    f.b[lane][0] = b0, f.b[lane][1] = b1;
    f.sums[lane] = sum;
    long value = ++threads[current].multiplications;
    if (everyone(warp * WARP, WARP, &Thread::multiplications, value))
        multiply_warp(f, convert);  // the last to come works for all
    else
        do yield();
        while (!everyone(warp * WARP, WARP, &Thread::multiplications, value));
}

static void multiply_add(float (&sum)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    multiply_add_as(to_float, sum, a0, a1, a2, a3, b0, b1);
}

static std::function<void()> kernel;

static void thread_main() {
    kernel();
    Thread& thread = threads[current];
    check(thread.has_waited, "a thread ends without waiting for the kernel before");
    for (const auto& group : thread.groups) check(group.empty(), "a copy is under way at the end");
    check(thread.open.empty(), "a copy is under way at the end");
    thread.done = true;
    yield();
}

// One CTA. is_forward: its threads run from first to last, else the other way round.
static void run_cta(Index index, bool is_forward) {
    blockIdx = index;
    std::memset(shared, 0xff, sizeof(shared));
    started_next = false;
    for (Thread& thread : threads) {
        thread.stack.resize(STACK);
        thread.groups.clear(), thread.open.clear();
        thread.barriers = thread.warp_barriers = thread.multiplications = 0;
        thread.done = thread.has_waited = false;
        getcontext(&thread.context);
        thread.context.uc_stack.ss_sp = thread.stack.data();
        thread.context.uc_stack.ss_size = STACK;
        thread.context.uc_link = &scheduler;
        makecontext(&thread.context, thread_main, 0);
    }
    for (bool any = true; any;) {
        any = false;
        for (int i = 0; i < CTA_THREADS; i++) {
            current = is_forward ? i : CTA_THREADS - 1 - i;
            if (threads[current].done) continue;
            any = true;
            swapcontext(&scheduler, &threads[current].context);
        }
    }
    check(started_next, "the next kernel is never let in");
}
