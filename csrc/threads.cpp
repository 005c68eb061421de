#include "threads.h"

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdio>
#include <memory>
#include <mutex>
#include <new>
#include <utility>
#include <vector>

namespace turbolm {
namespace {

constexpr int kCacheLine = 64;
constexpr int kFanIn = 8;      // children of a node of the arrival tree
constexpr int kSpins = 2000;   // pauses before a waiting thread starts to yield: some 40 to 100 µs
constexpr int kYields = 1000;  // an idle thread sleeps after so many more

inline void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// Waits for done(). Yields when that takes long: on a busy machine the thread waited for may need
// this very core. False after `max_yields` yields; negative: never gives up.
template <class Done>
bool wait_until(const Done& done, int max_yields) {
    for (int i = 0; i < kSpins; ++i) {
        if (done()) return true;
        pause();
    }
    for (int i = 0; i != max_yields; ++i) {
        if (done()) return true;
        sched_yield();
    }
    return false;
}

// One CPU list per physical core that this process may use; a core's hardware threads share it.
std::vector<cpu_set_t> allowed_cores() {
    std::vector<cpu_set_t> cores;
    std::vector<std::pair<int, int>> ids;  // (package, core) of each
    cpu_set_t allowed;
    if (sched_getaffinity(0, sizeof allowed, &allowed) != 0) return cores;
    for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
        if (!CPU_ISSET(cpu, &allowed)) continue;
        const auto read = [cpu](const char* name) {
            char path[128];
            std::snprintf(path, sizeof path, "/sys/devices/system/cpu/cpu%d/topology/%s", cpu, name);
            int value = -1;
            if (std::FILE* file = std::fopen(path, "r")) {
                if (std::fscanf(file, "%d", &value) != 1) value = -1;
                std::fclose(file);
            }
            return value;
        };
        std::pair<int, int> id{read("physical_package_id"), read("core_id")};
        if (id.second < 0) id = {-2, cpu};  // unknown: a core of its own
        const size_t index = std::find(ids.begin(), ids.end(), id) - ids.begin();
        if (index == ids.size()) {
            ids.push_back(id);
            cores.emplace_back();
            CPU_ZERO(&cores.back());
        }
        CPU_SET(cpu, &cores[index]);
    }
    return cores;
}

}  // namespace

// Arrivals climb a tree: a thread that has seen its children arrive tells its parent; the root
// releases all. Each thread counts its own barriers, so nothing is ever reset, and each writes to
// a cache line of its own, so arrivals don't contend.
struct Barrier {
    struct alignas(kCacheLine) Slot {
        std::atomic<uint32_t> arrived{0};  // barriers that this thread and all below it have reached
    };

    explicit Barrier(int num_threads) : num_threads(num_threads), slots(new Slot[num_threads]) {}

    void wait(int thread) {
        const uint32_t epoch = slots[thread].arrived.load(std::memory_order_relaxed) + 1;
        const int first = thread * kFanIn + 1, last = std::min(first + kFanIn, num_threads);
        for (int child = first; child < last; ++child) {
            wait_until([&] { return slots[child].arrived.load(std::memory_order_acquire) == epoch; }, -1);
        }
        slots[thread].arrived.store(epoch, std::memory_order_release);
        if (thread == 0) {
            released.store(epoch, std::memory_order_release);
        } else {
            wait_until([&] { return released.load(std::memory_order_acquire) == epoch; }, -1);
        }
    }

    const int num_threads;
    std::unique_ptr<Slot[]> slots;
    alignas(kCacheLine) std::atomic<uint32_t> released{0};
};

void Team::barrier() const {
    if (num_threads > 1) shared_barrier->wait(thread);
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
    void stop();
    void forget();

    const int wanted;
    int num_threads = 1;  // with the caller; fewer than wanted where the system refused threads
    bool is_started = false;
    bool is_pinned = false;
    std::mutex running;  // one run at a time
    std::unique_ptr<Barrier> barrier;
    std::vector<pthread_t> threads;
    void (*function)(void*, const Team&) = nullptr;  // null: threads end
    void* argument = nullptr;
    alignas(kCacheLine) std::atomic<uint32_t> generation{0};  // counts calls; idle threads watch it
};

namespace {

// All teams, for forks. Never destroyed: teams may outlive static objects.
struct Registry {
    std::mutex lock;
    std::vector<ThreadTeam*> teams;
    bool has_pinned_team = false;
};

Registry& registry() {
    static auto* instance = new Registry;
    return *instance;
}

}  // namespace

void* ThreadTeam::State::work(void* argument) {
    const std::unique_ptr<Worker> worker(static_cast<Worker*>(argument));
    State& state = *worker->state;
    for (uint32_t seen = 0;; ++seen) {
        const auto is_called = [&] { return state.generation.load(std::memory_order_acquire) != seen; };
        if (!wait_until(is_called, kYields)) state.generation.wait(seen, std::memory_order_acquire);
        if (state.function == nullptr) return nullptr;
        const Team team{worker->thread, state.num_threads, state.barrier.get()};
        state.function(state.argument, team);
        team.barrier();
    }
}

void ThreadTeam::State::start() {
    // Threads stay on their cores where the team has all of them to itself; the caller goes where
    // the system puts it, which is the one that is left.
    const std::vector<cpu_set_t> cores = allowed_cores();
    {
        const std::lock_guard lock(registry().lock);
        is_pinned = static_cast<int>(cores.size()) == wanted && !registry().has_pinned_team;
        registry().has_pinned_team |= is_pinned;
    }
    generation = 0;
    for (int thread = 1; thread < wanted; ++thread) {
        pthread_attr_t attributes;
        pthread_attr_init(&attributes);
        if (is_pinned) pthread_attr_setaffinity_np(&attributes, sizeof(cpu_set_t), &cores[thread]);
        auto worker = std::unique_ptr<Worker>(new Worker{this, thread});
        pthread_t handle;
        const int error = pthread_create(&handle, &attributes, work, worker.get());
        pthread_attr_destroy(&attributes);
        if (error != 0) break;
        (void)worker.release();  // the thread owns it
        threads.push_back(handle);
    }
    num_threads = 1 + static_cast<int>(threads.size());
    barrier = std::make_unique<Barrier>(num_threads);
    is_started = true;
}

void ThreadTeam::State::call(void (*new_function)(void*, const Team&), void* new_argument) {
    function = new_function;
    argument = new_argument;
    generation.fetch_add(1, std::memory_order_release);
    generation.notify_all();
}

void ThreadTeam::State::stop() {
    if (!is_started) return;
    call(nullptr, nullptr);
    for (const pthread_t thread : threads) pthread_join(thread, nullptr);
    forget();
}

// There are no threads (any more): the next run starts some.
void ThreadTeam::State::forget() {
    if (is_pinned) registry().has_pinned_team = is_pinned = false;
    threads.clear();
    is_started = false;
}

ThreadTeam::ThreadTeam(int num_threads) : state_(new State(std::max(1, num_threads))) {
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
    state_->stop();
    std::erase(registry().teams, this);
    delete state_;
}

int ThreadTeam::size() const { return state_->wanted; }

void ThreadTeam::run(void (*function)(void* argument, const Team& team), void* argument) {
    const std::lock_guard lock(state_->running);
    if (!state_->is_started) state_->start();
    if (state_->num_threads > 1) state_->call(function, argument);
    const Team team{0, state_->num_threads, state_->barrier.get()};
    function(argument, team);
    team.barrier();
}

}  // namespace turbolm
