// The team of threads of the process: every fast kernel library hands its blocks to this one.
//
// Not OpenMP: clang and zig come without its runtime. Each thread has a share of the blocks of a launch, the same from launch
// to launch, whose data its cache may hold; then it takes from the shares of others, as a core may be slower than another, or
// busy. A thread watches for the next launch for as long as a training step leaves it without one, then sleeps.
#include <pthread.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

typedef void (*Body)(void* context, long long begin, long long end);  // runs these blocks

namespace {

const int GRAINS = 64;  // of a share: the last ones even out the threads, and to take one costs little beside it

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

// Of the blocks, those that one thread begins with.
struct alignas(64) Share {
    std::atomic<long long> next;
    long long end;
};

struct Team {
    int threads = 1, started = 0;  // wanted, the caller being one of them; begun
    int parts = 1;                 // threads of the current task
    Body body = nullptr;
    void* context = nullptr;
    long long grain = 1;           // blocks that are taken at a time
    std::vector<Share> shares;
    bool closed = true;                       // whether the current task takes no more workers
    std::atomic<int> running{0};              // workers at the current task
    std::atomic<unsigned long long> task{0};  // counts tasks: a worker waits for the next number
    std::mutex one_caller, lock;
    std::condition_variable begin, end;

    void take_blocks(int part) {
        for (int i = 0; i < parts; ++i) {
            Share& share = shares[(part + i) % parts];
            for (long long begin; (begin = share.next.fetch_add(grain, std::memory_order_relaxed)) < share.end;)
                body(context, begin, begin + grain < share.end ? begin + grain : share.end);
        }
    }

    void work(int part, unsigned long long seen) {
        for (;;) {
            const auto next = [&] { return task != seen; };
            watch(next);
            std::unique_lock<std::mutex> hold(lock);
            begin.wait(hold, next);
            seen = task;
            if (closed || part >= parts) continue;  // too late, or the team was made smaller
            ++running;
            hold.unlock();
            take_blocks(part);
            hold.lock();
            if (--running == 0) end.notify_one();
        }
    }

    void run(Body its_body, void* its_context, long long blocks) {
        std::lock_guard<std::mutex> only(one_caller);
        std::unique_lock<std::mutex> hold(lock);
        try {
            for (; started < threads - 1; ++started)
                std::thread(&Team::work, this, started + 1, task.load()).detach();
        } catch (const std::system_error&) {
            // No memory or no process left for one more thread: those that there are do the work.
        }
        parts = started < threads ? started + 1 : threads;
        if ((int)shares.size() < parts) shares = std::vector<Share>(parts);
        for (int part = 0; part < parts; ++part)
            shares[part].next = blocks * part / parts, shares[part].end = blocks * (part + 1) / parts;
        grain = blocks / (parts * GRAINS) + 1;
        body = its_body, context = its_context, closed = false, ++task;
        hold.unlock();
        begin.notify_all();
        take_blocks(0);
        hold.lock();
        closed = true;  // all blocks are taken: who has not woken up by now need not
        hold.unlock();
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

extern "C" void run_on_team(Body body, void* context, long long blocks) { team->run(body, context, blocks); }

extern "C" void set_team_size(int threads) {
    std::lock_guard<std::mutex> only(team->one_caller);
    std::lock_guard<std::mutex> hold(team->lock);
    team->threads = threads;
}
