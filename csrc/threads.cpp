#include "threads.h"

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <memory>
#include <mutex>
#include <new>
#include <utility>
#include <vector>

namespace turbolm {
namespace {

using Clock = std::chrono::steady_clock;
using std::chrono::milliseconds;

constexpr int kCacheLine = 128;  // processors fetch 64-byte lines in pairs
constexpr int kLooks = 100;      // of a waiting thread before its first pause: a pause takes up to 60 ns
constexpr int kSpins = 2000;     // pauses before a waiting thread starts to yield: some 40 to 100 µs
constexpr int kYields = 1000;  // an idle thread sleeps after so many more
constexpr uint32_t kThreadMask = 0xfff;         // most threads of a team
constexpr int kMaxRounds = 12;                  // of a barrier: kThreadMask < 2^12
constexpr milliseconds kShortRun{2};            // shorter ones say nothing about the machine's load
constexpr milliseconds kShortestRetreat{200};

inline void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

template <class Done>
bool spin_until(const Done& done, Ahead& ahead) {
    for (int i = 0; i < kLooks; ++i) {
        if (done()) return true;
    }
    for (; ahead.next < ahead.end; ahead.next += 64) {
        if (done()) return true;
        __builtin_prefetch(ahead.next);
    }
    for (int i = 0; i < kSpins; ++i) {
        if (done()) return true;
        pause();
    }
    return false;
}

}  // namespace

// Dissemination (Hensgen, Finkel and Manber, 1988): in round i each thread tells the one 2^i further
// on that it, and all whom it has heard of, are here; after the last round it has heard of all. Two
// threads exchange one signal each, with no third step that releases them. Threads count barriers, so
// nothing is ever reset, and each signal has a cache line of its own.
struct Barrier {
    struct alignas(kCacheLine) Signal {
        std::atomic<uint64_t> number{0};  // the last barrier that it was given for
    };

    struct alignas(kCacheLine) Slot {
        Signal signals[kMaxRounds];  // to this thread
        uint64_t passed = 0;         // the last barrier that this thread has reached; its own
        Clock::duration lost{0};     // time that this thread waited beyond spinning; its own
    };

    explicit Barrier(int max_threads) : slots(new Slot[max_threads]) {}

    void meet(int thread, int num_threads, Ahead ahead) {
        Slot& slot = slots[thread];
        const uint64_t number = ++slot.passed;
        for (int round = 0, distance = 1; distance < num_threads; ++round, distance *= 2) {
            const int other = thread + distance;
            Slot& told = slots[other < num_threads ? other : other - num_threads];
            told.signals[round].number.store(number, std::memory_order_release);
            wait(slot, slot.signals[round].number, number, ahead);
        }
    }

    static void wait(Slot& slot, const std::atomic<uint64_t>& counter, uint64_t number, Ahead& ahead) {
        const auto is_there = [&] { return counter.load(std::memory_order_acquire) >= number; };
        if (spin_until(is_there, ahead)) return;
        // The thread waited for may need this very core.
        const auto start = Clock::now();
        while (!is_there()) sched_yield();
        slot.lost += Clock::now() - start;
    }

    std::unique_ptr<Slot[]> slots;
};

void Team::barrier() const { barrier(Ahead{}); }

void Team::barrier(Ahead ahead) const {
    if (num_threads > 1) shared_barrier->meet(thread, num_threads, ahead);
}

struct ThreadTeam::State {
    explicit State(int wanted) : wanted(wanted) {}

    struct Worker {
        State* state;
        int thread;
    };

    static void* work(void* argument);
    void start();
    void call(void (*new_function)(void*, const Team&), void* new_argument);
    void adapt(Clock::time_point begin, Clock::time_point end);
    void stop();
    void forget();

    const int wanted;
    int num_threads = 1;  // with the caller; fewer than wanted where the system refused threads
    int num_active = 1;   // that take part in runs now
    bool is_started = false;
    Clock::time_point retreat_end;  // then all threads take part again
    std::mutex running;             // one run at a time
    std::unique_ptr<Barrier> barrier;
    std::vector<pthread_t> threads;
    void (*function)(void*, const Team&) = nullptr;  // null: threads end
    void* argument = nullptr;
    uint64_t first_barrier = 0;  // barriers before this run
    // Number of runs, and in the low bits of the threads that take part in the newest. Idle threads watch it.
    alignas(kCacheLine) std::atomic<uint32_t> current{0};
};

namespace {

// All teams, for forks. Never destroyed: teams may outlive static objects.
struct Registry {
    std::mutex lock;
    std::vector<ThreadTeam*> teams;
};

Registry& registry() {
    static auto* instance = new Registry;
    return *instance;
}

}  // namespace

void* ThreadTeam::State::work(void* argument) {
    const std::unique_ptr<Worker> worker(static_cast<Worker*>(argument));
    const int thread = worker->thread;
    State& state = *worker->state;
    uint32_t seen = 0;
    bool was_active = true;
    for (;;) {
        const auto is_called = [&] { return state.current.load(std::memory_order_acquire) != seen; };
        Ahead nothing;
        bool is_awake = was_active && spin_until(is_called, nothing);
        for (int i = 0; was_active && !is_awake && i < kYields; ++i) {
            sched_yield();
            is_awake = is_called();
        }
        if (!is_awake) state.current.wait(seen, std::memory_order_acquire);
        seen = state.current.load(std::memory_order_acquire);
        // Nothing but `current` may be looked at before this is known: the caller doesn't wait for
        // threads that take no part.
        const int num_active = static_cast<int>(seen & kThreadMask);
        was_active = thread < num_active;
        if (!was_active) continue;
        if (state.function == nullptr) return nullptr;
        state.barrier->slots[thread].passed = state.first_barrier;
        state.function(state.argument, Team{thread, num_active, state.barrier.get()});
        state.barrier->meet(thread, num_active, Ahead{});
    }
}

void ThreadTeam::State::start() {
    barrier = std::make_unique<Barrier>(wanted);
    current = 0;
    for (int thread = 1; thread < wanted; ++thread) {
        auto worker = std::unique_ptr<Worker>(new Worker{this, thread});
        pthread_t handle;
        if (pthread_create(&handle, nullptr, work, worker.get()) != 0) break;
        (void)worker.release();  // the thread owns it
        threads.push_back(handle);
    }
    num_threads = num_active = 1 + static_cast<int>(threads.size());
    is_started = true;
}

void ThreadTeam::State::call(void (*new_function)(void*, const Team&), void* new_argument) {
    function = new_function;
    argument = new_argument;
    first_barrier = barrier->slots[0].passed;
    const uint32_t runs = current.load(std::memory_order_relaxed) & ~kThreadMask;
    current.store((runs + kThreadMask + 1) | static_cast<uint32_t>(num_active), std::memory_order_release);
    current.notify_all();
}

// Fewer threads for ten times as long as the run took, if more than half of that was waiting.
void ThreadTeam::State::adapt(Clock::time_point begin, Clock::time_point end) {
    const auto lost = std::exchange(barrier->slots[0].lost, Clock::duration{0});
    if (end - begin >= kShortRun && lost * 2 > end - begin) {
        num_active = std::max(1, num_active / 2);
        retreat_end = end + std::max<Clock::duration>((end - begin) * 10, kShortestRetreat);
    } else if (num_active < num_threads && end > retreat_end) {
        num_active = num_threads;
    }
}

void ThreadTeam::State::stop() {
    if (!is_started) return;
    num_active = num_threads;
    call(nullptr, nullptr);
    for (const pthread_t thread : threads) pthread_join(thread, nullptr);
    forget();
}

// There are no threads (any more): the next run starts some.
void ThreadTeam::State::forget() {
    threads.clear();
    is_started = false;
}

ThreadTeam::ThreadTeam(int num_threads) : state_(new State(std::clamp<int>(num_threads, 1, kThreadMask))) {
    static const int handlers = pthread_atfork(
        [] { registry().lock.lock(); }, [] { registry().lock.unlock(); },
        [] {
            for (ThreadTeam* team : registry().teams) {
                team->state_->forget();
                new (&team->state_->running) std::mutex;  // perhaps held by a thread that the child lacks
            }
            registry().lock.unlock();
        });
    (void)handlers;
    const std::lock_guard lock(registry().lock);
    registry().teams.push_back(this);
}

ThreadTeam::~ThreadTeam() {
    const std::lock_guard lock(registry().lock);
    std::erase(registry().teams, this);
    {
        const std::lock_guard last_run(state_->running);
        state_->stop();
    }
    delete state_;
}

int ThreadTeam::size() const { return state_->wanted; }

void ThreadTeam::run(void (*function)(void* argument, const Team& team), void* argument) {
    State& state = *state_;
    const std::lock_guard lock(state.running);
    if (!state.is_started) state.start();
    if (state.num_threads == 1) return function(argument, Team{0, 1, nullptr});
    const auto begin = Clock::now();
    const int num_active = state.num_active;
    if (num_active > 1) state.call(function, argument);
    function(argument, Team{0, num_active, state.barrier.get()});
    if (num_active > 1) state.barrier->meet(0, num_active, Ahead{});
    state.adapt(begin, Clock::now());
}

}  // namespace turbolm
