// The team of threads of the process: every fast kernel library hands its blocks to this one.
//
// Not OpenMP: clang and zig come without its runtime. A thread watches for the next task for as long as a training step
// leaves it without one, then sleeps.
#include <pthread.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>

typedef void (*Body)(void* context, int part, int parts);

namespace {

// Whether `done` came true soon. Between two launches of a step Python takes 10 to 100 us; to wake a sleeping thread takes 50
// more, on a virtual machine.
template <class Condition>
bool watch(Condition done) {
    const auto end = std::chrono::steady_clock::now() + std::chrono::microseconds(300);
    do {
        for (int i = 0; i < 100; ++i)
            if (done()) return true;
    } while (std::chrono::steady_clock::now() < end);
    return done();
}

struct Team {
    int threads = 1, started = 0;  // wanted, the caller being one of them; begun
    int parts = 1;                 // of the current task
    Body body = nullptr;
    void* context = nullptr;
    std::atomic<int> running{0};              // workers that have not finished the current task
    std::atomic<unsigned long long> task{0};  // counts tasks: a worker waits for the next number
    std::mutex one_caller, lock;
    std::condition_variable begin, end;

    void work(int part, unsigned long long seen) {
        for (;;) {
            const auto next = [&] { return task != seen; };
            watch(next);
            std::unique_lock<std::mutex> hold(lock);
            begin.wait(hold, next);
            seen = task;
            if (part >= parts) continue;  // the team was made smaller
            hold.unlock();
            body(context, part, parts);
            hold.lock();
            if (--running == 0) end.notify_one();
        }
    }

    void run(Body its_body, void* its_context) {
        std::lock_guard<std::mutex> only(one_caller);
        std::unique_lock<std::mutex> hold(lock);
        try {
            for (; started < threads - 1; ++started)
                std::thread(&Team::work, this, started + 1, task.load()).detach();
        } catch (const std::system_error&) {
            // No memory or no process left for one more thread: those that there are do the work.
        }
        parts = started < threads ? started + 1 : threads;
        body = its_body, context = its_context, running = parts - 1, ++task;
        hold.unlock();
        begin.notify_all();
        body(context, 0, parts);
        const auto all_done = [&] { return running == 0; };
        watch(all_done);
        hold.lock();
        end.wait(hold, all_done);
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
