// A persistent team of threads.
#pragma once

#include "team.h"

namespace turbolm {

// Runs functions on several threads at once; the calling thread is number 0. Threads start at the
// first run, spin for a moment after each and then sleep. They are not tied to cores: beside other
// work the system must be free to move them. Where other work takes their cores all the same, so
// that a run's time goes by in waiting, the next runs use fewer threads for a while: kernels give
// the same results on any number.
//
// Runs of one team from several threads queue. A forked child gets new threads at its first run.
class ThreadTeam {
  public:
    explicit ThreadTeam(int num_threads);
    ~ThreadTeam();  // after the run in progress, if there is one
    ThreadTeam(const ThreadTeam&) = delete;
    ThreadTeam& operator=(const ThreadTeam&) = delete;

    int size() const;
    // Every thread calls function(argument, team); returns when all have.
    void run(void (*function)(void* argument, const Team& team), void* argument);

  private:
    struct State;
    State* state_;
};

}  // namespace turbolm
