// The team of threads of the process: every fast kernel library hands its blocks to this one.
//
// Not OpenMP, because its idle threads spin for a millisecond, on the cores that the BLAS needs next; here they
// sleep. And because clang and zig come without its runtime.
#include <pthread.h>

#include <condition_variable>
#include <mutex>
#include <thread>

typedef void (*Body)(void* context, int part, int parts);

namespace {

struct Team {
    int threads = 1, started = 0;     // the caller is one of them
    Body body = nullptr;
    void* context = nullptr;
    int running = 0;                  // workers that have not finished the current task
    unsigned long long task = 0;      // counts tasks: a worker waits for the next number
    std::mutex one_caller, lock;
    std::condition_variable begin, end;

    void work(int part, unsigned long long seen) {
        for (;;) {
            std::unique_lock<std::mutex> hold(lock);
            begin.wait(hold, [&] { return task != seen; });
            seen = task;
            if (part >= threads) continue;  // the team was made smaller
            hold.unlock();
            body(context, part, threads);
            hold.lock();
            if (--running == 0) end.notify_one();
        }
    }

    void run(Body its_body, void* its_context) {
        std::lock_guard<std::mutex> only(one_caller);
        std::unique_lock<std::mutex> hold(lock);
        for (; started < threads - 1; ++started)
            std::thread(&Team::work, this, started + 1, task).detach();
        body = its_body, context = its_context, running = threads - 1, ++task;
        hold.unlock();
        begin.notify_all();
        body(context, 0, threads);
        hold.lock();
        end.wait(hold, [&] { return running == 0; });
    }
};

Team* team = new Team;  // never destroyed: its threads may outlive main()

// A forked child has no threads but the caller: it starts with a fresh team.
void after_fork() {
    const int threads = team->threads;
    team = new Team;
    team->threads = threads;
}

const int registered = pthread_atfork(nullptr, nullptr, after_fork);

}  // namespace

extern "C" void run_on_team(Body body, void* context) { team->run(body, context); }

extern "C" void set_team_size(int threads) {
    std::lock_guard<std::mutex> only(team->one_caller);
    std::lock_guard<std::mutex> hold(team->lock);
    team->threads = threads;
}
