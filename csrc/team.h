// A team of threads running one function together (single program, multiple data).
//
// Every kernel is a function that all threads of a team enter with the same arguments. It divides
// its work by `team.thread` of `team.num_threads` and meets the others at `team.barrier()` where it
// needs results of other threads. A caller may run many kernels in a row inside one parallel
// region, with a barrier between those that depend on each other: so a whole model step costs one
// wake-up of the threads. Kernels do not end with a barrier of their own.
#pragma once

#include <cstddef>
#include <cstdint>

namespace turbolm {

struct Barrier;  // threads.cpp

// Memory that a thread will read soon.
struct Ahead {
    const uint8_t* next = nullptr;
    const uint8_t* end = nullptr;
};

struct Team {
    int thread;       // 0 .. num_threads-1
    int num_threads;
    Barrier* shared_barrier;
    void barrier() const;  // all threads of the team meet here
    void barrier(Ahead ahead) const;  // the same; a thread that waits fetches what it will read
};

// Half-open share of [0, count) for this thread, in multiples of `grain`.
static inline void share(const Team& team, int64_t count, int64_t grain, int64_t* begin, int64_t* end) {
    const int64_t units = (count + grain - 1) / grain;
    const int64_t first = units * team.thread / team.num_threads;
    const int64_t last = units * (team.thread + 1) / team.num_threads;
    *begin = first * grain < count ? first * grain : count;
    *end = last * grain < count ? last * grain : count;
}

}  // namespace turbolm
