// A whole CUDA block on one core: its threads are fibers that run, in turn, from barrier to barrier; its blocks run
// one after another, the last first, so that nothing can rely on their order. Faults that real hardware leaves
// undefined end the launch with a message:
//
//   * a barrier that not all threads reach, or that they reach at different lines
//   * shared memory read before it is written, or outside its bounds
//   * shared memory that two threads touch, one of them writing, with no barrier in between
//   * an operation of a warp that not all of its threads reach, or that they reach at different lines
//   * an asynchronous copy that is read before it is waited for
#pragma once
#include <stdlib.h>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#include <deque>
#include <memory>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#define MINIDL_ASAN
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define MINIDL_ASAN
#endif
#endif
#ifdef MINIDL_ASAN
#include <sanitizer/common_interface_defs.h>
#endif

static dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {
namespace {  // else macOS makes functions of all libraries one, as it is allowed to, and what they keep is not

// What a fiber needs to go on: switch_context leaves that of the running one in `from`, and goes on with `to`; make_context gives
// that of a function which begins on a stack of its own, and never returns.
#if defined(__x86_64__)
// swapcontext asks the system for the mask of signals each time, which took three quarters of an emulated kernel's time.
using Context = void*;  // the stack pointer, where the registers lie that a function has to leave as they were
__attribute__((naked, noinline)) inline void switch_context(Context& /*from: rdi*/, const Context& /*to: rsi*/) {
    asm("pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15; movq %rsp, (%rdi);"
        "movq (%rsi), %rsp; popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp; ret");
}
inline void make_context(Context& context, char* stack, size_t bytes, void (*function)()) {
    void** top = (void**)((size_t)(stack + bytes) / 16 * 16);
    *--top = nullptr;  // where it would return to
    *--top = (void*)function;
    for (int i = 0; i < 6; ++i) *--top = nullptr;
    context = top;
}
#else
using Context = ucontext_t;
inline void switch_context(Context& from, const Context& to) { swapcontext(&from, &to); }
inline void make_context(Context& context, char* stack, size_t bytes, void (*function)()) {
    getcontext(&context);
    context.uc_stack.ss_sp = stack;
    context.uc_stack.ss_size = bytes;
    context.uc_link = nullptr;
    makecontext(&context, function, 0);
}
#endif

enum State { RUNNABLE, WAITING, WAITING_FOR_WARP, FINISHED };

struct Copy {  // asynchronous
    void (*finish)(const Copy&);
    void* array;
    const void* source;
    int index, count, group;
};

struct Fiber {
    Context context;
    std::unique_ptr<char[]> stack;  // while the fiber lives, which goes on from block to block, up to a fault
    State state;
    const char* file;  // and line of the barrier, or operation of its warp, where it waits
    int line;
    int exchanges;     // with its warp
    std::vector<Copy> copies;  // under way
    int copy_group;            // that is not committed yet
    void* asan_stack;
};

static const size_t STACK_BYTES = 64 * 1024;  // where the sanitizer knows swapcontext, it marks all of a stack each time
static const int WARP_SIZE = 32;
static std::deque<Fiber> fibers;  // which stay where they are when there are more
static Context scheduler;
static void* scheduler_asan_stack;
static const void* scheduler_bottom;
static size_t scheduler_bytes;
static int current;                        // the running fiber
static unsigned long long block_number;    // counts all blocks of all launches
static unsigned long long phase;           // what lies between two barriers is one phase; counts on from block to block
static bool faulted;
static char message[300];                  // what describes the fault
static void (*block_body)(const void*);
static const void* block_context;

inline void to_scheduler(bool for_ever) {
    Fiber& self = fibers[current];
#ifdef MINIDL_ASAN
    __sanitizer_start_switch_fiber(for_ever ? nullptr : &self.asan_stack, scheduler_bottom, scheduler_bytes);
#endif
    switch_context(self.context, scheduler);
#ifdef MINIDL_ASAN
    __sanitizer_finish_switch_fiber(self.asan_stack, &scheduler_bottom, &scheduler_bytes);
#endif
}

inline void to_fiber(int index) {
    current = index;
    threadIdx = {(unsigned)index, 0};
#ifdef MINIDL_ASAN
    __sanitizer_start_switch_fiber(&scheduler_asan_stack, fibers[index].stack.get(), STACK_BYTES);
#endif
    switch_context(scheduler, fibers[index].context);
#ifdef MINIDL_ASAN
    __sanitizer_finish_switch_fiber(scheduler_asan_stack, nullptr, nullptr);
#endif
}

inline void fiber_main() {
#ifdef MINIDL_ASAN
    __sanitizer_finish_switch_fiber(nullptr, &scheduler_bottom, &scheduler_bytes);
#endif
    for (;;) {  // a block each time
        block_body(block_context);
        fibers[current].state = FINISHED;
        to_scheduler(false);
    }
}

inline void begin(Fiber& fiber) {
    fiber.stack.reset(new char[STACK_BYTES]);  // not zeroed: what is not touched costs no memory
    make_context(fiber.context, fiber.stack.get(), STACK_BYTES, fiber_main);
}

template <class... Values>
inline void describe_fault(const char* format, Values... values) {
    if (!faulted) snprintf(message, sizeof message, format, values...);
    faulted = true;
}

// Called in a fiber, which never goes on.
template <class... Values>
inline void fault(const char* format, Values... values) {
    describe_fault(format, values...);
    fibers[current].state = FINISHED;
    to_scheduler(true);
}

inline void wait(State state, const char* file, int line) {
    fibers[current].state = state;
    fibers[current].file = file;
    fibers[current].line = line;
    to_scheduler(false);
}

inline void barrier(const char* file, int line) { wait(WAITING, file, line); }

// An operation of a warp: all of its threads give a value -> the values of all, until the next exchange but one. Unlike a
// barrier, it orders nothing that they do to shared memory.
template <class T>
const T* exchange(const T& value, const char* file, int line) {
    static T values[2][WARP_SIZE];
    T* all = values[fibers[current].exchanges++ % 2];
    all[current % WARP_SIZE] = value;
    wait(WAITING_FOR_WARP, file, line);
    return all;
}

struct Place {
    char text[100];
    explicit Place(const Fiber& fiber) {
        if (fiber.state == FINISHED) snprintf(text, sizeof text, "its end");
        else snprintf(text, sizeof text, "%s:%d", strrchr(fiber.file, '/') + 1, fiber.line);
    }
};

inline bool same_place(const Fiber& a, const Fiber& b) {
    if (a.state != b.state) return false;
    return a.state == FINISHED || (a.line == b.line && (a.file == b.file || !strcmp(a.file, b.file)));
}

// That the threads begin .. end-1 all wait at one place, or are all at their end.
inline void check_together(const char* what, int begin, int end) {
    const Fiber& first = fibers[begin];
    for (int i = begin + 1; i < end; ++i) {
        const Fiber& other = fibers[i];
        if (same_place(first, other)) continue;
        describe_fault("divergent %s in block (%u, %u): thread %d at %s, thread %d at %s", what, blockIdx.x, blockIdx.y,
                       begin, Place(first).text, i, Place(other).text);
        return;
    }
}

// Up to the next barrier of the block, past all operations of the warp that come before.
inline void run_warp(int begin, int end) {
    bool again = true;
    while (again && !faulted) {
        again = false;
        // In odd blocks the last thread is the first: what one writes to global memory and others read without a barrier between
        // is there in one of the orders, and not in the other.
        for (int k = begin; k < end && !faulted; ++k) {
            const int i = blockIdx.x % 2 ? begin + end - 1 - k : k;
            to_fiber(i);
            again |= fibers[i].state == WAITING_FOR_WARP;
        }
        if (again && end - begin < WARP_SIZE)
            describe_fault("an operation of a warp in block (%u, %u) by %d threads", blockIdx.x, blockIdx.y, end - begin);
        if (again && !faulted) check_together("operation of a warp", begin, end);
    }
}

inline void run_block() {
    ++block_number;
    for (int i = 0; i < (int)blockDim.x; ++i) {
        Fiber& fiber = fibers[i];
        fiber.state = RUNNABLE;
        fiber.exchanges = 0;
        fiber.copies.clear();
        fiber.copy_group = 0;
        if (!fiber.stack) begin(fiber);
    }
    do {
        ++phase;
        for (int i = 0; i < (int)blockDim.x && !faulted; i += WARP_SIZE)
            run_warp(i, i + WARP_SIZE < (int)blockDim.x ? i + WARP_SIZE : (int)blockDim.x);
        if (!faulted) check_together("barrier", 0, blockDim.x);
    } while (!faulted && fibers[0].state == WAITING);
}

template <class T, int SIZE>
class Shared;

// What a pointer into a __shared__ array is to a kernel.
template <class T, int SIZE>
struct Cursor {
    Shared<T, SIZE>& array;
    long long index;
    Cursor operator+(long long count) const { return {array, index + count}; }
    auto operator[](long long i) const { return array[index + i]; }
};

// A __shared__ array that remembers who touched each element, and in which phase.
template <class T, int SIZE>
class Shared {
    static const int NOBODY = -1, SEVERAL = -2;
    struct Cell {
        T value;
        unsigned long long block;  // in which it was last written
        unsigned long long phase;  // in which it was last touched
        int writer, reader;        // in that phase
    };
    struct Element {
        Shared& array;
        int index;
        operator T() const { return array.read(index); }
        void operator=(T value) { array.write(index, value); }
        void operator=(const Element& other) { array.write(index, T(other)); }
        void operator+=(T value) { array.write(index, array.read(index) + value); }
    };

    const char* name;
    Cell cells[SIZE] = {};

    Cell& touch(int index) {
        Cell& cell = cells[index];
        if (cell.phase != phase) cell.writer = cell.reader = NOBODY;
        cell.phase = phase;
        return cell;
    }
    T read(int index) {
        Cell& cell = touch(index);
        if (cell.writer != NOBODY && cell.writer != current)
            fault("race: thread %d reads %s[%d], thread %d wrote it, no barrier in between", current, name, index, cell.writer);
        if (cell.block != block_number) fault("thread %d reads %s[%d] before anyone wrote it", current, name, index);
        cell.reader = cell.reader == NOBODY || cell.reader == current ? current : SEVERAL;
        return cell.value;
    }
    void write(int index, T value) {
        Cell& cell = touch(index);
        if (cell.writer != NOBODY && cell.writer != current)
            fault("race: thread %d writes %s[%d], thread %d wrote it, no barrier in between", current, name, index, cell.writer);
        if (cell.reader != NOBODY && cell.reader != current)
            fault("race: thread %d writes %s[%d], another thread read it, no barrier in between", current, name, index);
        cell.block = block_number;
        cell.writer = current;
        cell.value = value;
    }

  public:
    explicit Shared(const char* its_name) : name(its_name) {}
    Element operator[](long long index) {
        if (index < 0 || index >= SIZE) fault("thread %d: %s[%lld] is outside 0..%d", current, name, index, SIZE - 1);
        return {*this, (int)index};
    }
    Cursor<T, SIZE> operator+(long long index) { return {*this, index}; }
    // `count` elements from `index` on, from memory or, without a source, zeros. The hardware may write at any time until
    // the copy is waited for: from now on nobody may touch what is there, and it is there only then.
    void copy_async(int index, const T* source, int count) {
        for (int i = 0; i < count; ++i) {
            (*this)[index + i] = T();
            cells[index + i].block = 0;  // unwritten
        }
        const auto finish = [](const Copy& copy) {
            for (int i = 0; i < copy.count; ++i)
                (*(Shared*)copy.array)[copy.index + i] = copy.source ? ((const T*)copy.source)[i] : T();
        };
        fibers[current].copies.push_back({finish, this, source, index, count, fibers[current].copy_group});
    }
};

inline void commit_copies() { ++fibers[current].copy_group; }

// For all committed groups of this thread's copies but the last `under_way`.
inline void wait_for_copies(int under_way) {
    Fiber& self = fibers[current];
    size_t done = 0;
    for (; done < self.copies.size() && self.copies[done].group < self.copy_group - under_way; ++done)
        self.copies[done].finish(self.copies[done]);
    self.copies.erase(self.copies.begin(), self.copies.begin() + done);
}

}  // namespace
}  // namespace emulator

#define SHARED(type, name, size) static emulator::Shared<type, size> name(#name)
#define SIMD
#define SIMD_SUM(...)
#define __syncthreads() emulator::barrier(__FILE__, __LINE__)

template <class Block>
const char* run_grid(const Launch& launch, const Block& block) {
    using namespace emulator;
    faulted = false;
    block_body = [](const void* context) { (*(const Block*)context)(); };
    block_context = &block;
    gridDim = {launch.grid_x, launch.grid_y};
    blockDim = {launch.threads, 1};
    if (fibers.size() < launch.threads) fibers.resize(launch.threads);
    for (long long b = (long long)launch.grid_x * launch.grid_y - 1; b >= 0 && !faulted; --b) {
        blockIdx = {(unsigned)(b % launch.grid_x), (unsigned)(b / launch.grid_x)};
        run_block();
    }
    if (faulted) fibers.clear();  // they stand in the middle of the block
    return faulted ? message : nullptr;
}
