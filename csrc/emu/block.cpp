#undef _FORTIFY_SOURCE  // its longjmp takes a switch between stacks for an error
#include "emu/block.h"

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <deque>
#include <exception>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

#include "emu/shared_memory.h"

#if defined(FASTRES_EMU_THREAD_SANITIZER)
#include <sanitizer/tsan_interface.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

namespace fastres::emu {

Index threadIdx, blockIdx, blockDim, gridDim;

namespace {

constexpr unsigned kWarp = 32;
constexpr std::size_t kStackBytes = std::size_t{128} << 10;
constexpr std::size_t kLargestExchange = 16;

bool descending = false;

std::string place(const char* file, int line) {
    return std::string(file) + ":" + std::to_string(line);
}

class Barrier {
  public:
    explicit Barrier(unsigned threads) : threads_(threads) {}

    // The phase whose end must be waited for.
    unsigned arrive() {
        const unsigned phase = phase_;
        if (++arrived_ == threads_) {
            arrived_ = 0;
            ++phase_;
        }
        return phase;
    }
    bool passed(unsigned phase) const { return phase_ != phase; }
    // Where ThreadSanitizer keeps the order of the phase. A thread may arrive for the next before all have
    // left this.
    void* order() { return &order_[phase_ % 2]; }

  private:
    unsigned threads_, arrived_ = 0, phase_ = 0;
    char order_[2];
};

// What a thread of the block has brought to its warp's exchanges, and from where; two, as the next may
// begin before all have read.
struct Slots {
    struct Slot {
        char value[kLargestExchange];
        const char* file;
        int line;
    };
    Slot slot[2];
    unsigned exchanges = 0;
};

// A thread's asynchronous copies, in batches of which the last is open.
using Copies = std::deque<std::deque<Copy>>;

// ---------------------------------------------------------------------------------------------------------
// A fiber, and what the sanitizers must be told of it

// A suspended course of execution. swapcontext calls the kernel for the signal mask each time; a jump does
// not, but the sanitizers would have their own idea of it.
struct Context {
    ucontext_t machine;
    bool entered = false;  // has run before, and can be jumped to
    jmp_buf jump;
};

void switch_context(Context& from, Context& to) {
#if defined(FASTRES_EMU_THREAD_SANITIZER) || defined(__SANITIZE_ADDRESS__)
    swapcontext(&from.machine, &to.machine);
#else
    from.entered = true;
    if (_setjmp(from.jump) != 0) return;
    if (to.entered) _longjmp(to.jump, 1);
    setcontext(&to.machine);
#endif
}

struct Fiber {
    Context context;
    std::unique_ptr<char[]> stack{new char[kStackBytes]};
    bool done = true;
    bool in_stream_order = false;
    const Barrier* waits_for = nullptr;
    unsigned phase = 0;
    const char* file = "";
    int line = 0;
    Slots slots;
    Copies copies;
    [[maybe_unused]] void* sanitizer = nullptr;

    bool can_run() const { return !done && (waits_for == nullptr || waits_for->passed(phase)); }
};

// For ThreadSanitizer: what a fiber did before order_before(x) precedes what another does after
// order_after(x). Switching between fibers orders nothing.
void order_before([[maybe_unused]] void* at) {
#if defined(FASTRES_EMU_THREAD_SANITIZER)
    __tsan_release(at);
#endif
}
void order_after([[maybe_unused]] void* at) {
#if defined(FASTRES_EMU_THREAD_SANITIZER)
    __tsan_acquire(at);
#endif
}

// The stack that launched, between whose switches the fibers run.
struct Scheduler {
    Context context;
    [[maybe_unused]] void* sanitizer = nullptr;
    [[maybe_unused]] const void* stack = nullptr;
    [[maybe_unused]] std::size_t stack_bytes = 0;

    void switch_to(Fiber& fiber) {
#if defined(FASTRES_EMU_THREAD_SANITIZER)
        sanitizer = __tsan_get_current_fiber();
        if (!fiber.sanitizer) fiber.sanitizer = __tsan_create_fiber(0);
        __tsan_switch_to_fiber(fiber.sanitizer, __tsan_switch_to_fiber_no_sync);
#endif
#if defined(__SANITIZE_ADDRESS__)
        __sanitizer_start_switch_fiber(&sanitizer, fiber.stack.get(), kStackBytes);
#endif
        switch_context(context, fiber.context);
#if defined(__SANITIZE_ADDRESS__)
        __sanitizer_finish_switch_fiber(sanitizer, nullptr, nullptr);
#endif
    }
    void switch_back(Fiber& fiber) {
#if defined(FASTRES_EMU_THREAD_SANITIZER)
        __tsan_switch_to_fiber(sanitizer, __tsan_switch_to_fiber_no_sync);
#endif
#if defined(__SANITIZE_ADDRESS__)
        __sanitizer_start_switch_fiber(&fiber.sanitizer, stack, stack_bytes);
#endif
        switch_context(fiber.context, context);
        entered(fiber.sanitizer);
    }
    // The first thing that a fiber does, when it begins and whenever it goes on.
    void entered([[maybe_unused]] void* shadow) {
#if defined(__SANITIZE_ADDRESS__)
        __sanitizer_finish_switch_fiber(shadow, &stack, &stack_bytes);
#endif
    }
};

// ---------------------------------------------------------------------------------------------------------

// What the threads of one block share.
struct Block {
    Block(unsigned threads, std::size_t dynamic_bytes) : all(threads), shared(dynamic_bytes) {
        for (unsigned first = 0; first < threads; first += kWarp)
            warps.emplace_back(std::min(threads - first, kWarp));
    }

    Barrier all;
    std::vector<Barrier> warps;
    SharedMemory shared;
};

class Grid {
  public:
    Grid(const Shape& shape, const std::function<void()>& body)
        : body_(body),
          shape_(shape),
          alive_(shape.cooperative ? shape.blocks : 1),
          whole_(alive_ * shape.threads) {
        for (unsigned b = 0; b < alive_; ++b) blocks_.emplace_back(shape.threads, shape.dynamic_bytes);
        const unsigned count = alive_ * shape.threads;
        if (fibers().size() < count) fibers().resize(count);
        for (unsigned f = 0; f < count; ++f) {
            Fiber& fiber = fibers()[f];
            ucontext_t& context = fiber.context.machine;
            getcontext(&context);
            context.uc_stack.ss_sp = fiber.stack.get();
            context.uc_stack.ss_size = kStackBytes;
            context.uc_link = nullptr;
            makecontext(&context, &Grid::run_threads, 0);
            fiber.context.entered = false;
        }
    }

    void run() {
        for (unsigned turn = 0; turn < shape_.blocks; turn += alive_) {
            first_ = descending ? shape_.blocks - alive_ - turn : turn;
            run_alive();
        }
    }

    void wait(Barrier& barrier, const char* file, int line) {
        Fiber& fiber = running();
        fiber.file = file;
        fiber.line = line;
        void* order = barrier.order();
        order_before(order);
        fiber.phase = barrier.arrive();
        fiber.waits_for = &barrier;
        if (!barrier.passed(fiber.phase)) scheduler_.switch_back(fiber);
        order_after(order);
    }
    void wait_for_block(const char* file, int line) { wait(block().all, file, line); }
    void wait_for_warp(const char* file, int line) { wait(block().warps[threadIdx.x / kWarp], file, line); }
    void wait_for_grid(const char* file, int line) {
        if (!shape_.cooperative)
            throw std::runtime_error("a barrier of the grid at " + place(file, line) +
                                     " in a launch that is not cooperative");
        wait(whole_, file, line);
    }

    Block& block() { return blocks_[blockIdx.x - first_]; }
    Fiber& fiber(unsigned thread) { return fibers()[(blockIdx.x - first_) * shape_.threads + thread]; }
    Fiber& running() { return fiber(threadIdx.x); }

    static Grid* active;

  private:
    static std::vector<Fiber>& fibers() {
        static std::vector<Fiber> kept;  // their stacks serve one grid after the other
        return kept;
    }
    static std::string here() {
        return "block " + std::to_string(blockIdx.x) + ", thread " + std::to_string(threadIdx.x);
    }

    void run_alive() {
        for (Block& block : blocks_) block.shared.begin();
        for (unsigned f = 0; f < alive_ * shape_.threads; ++f) {
            fibers()[f].done = false;
            fibers()[f].waits_for = nullptr;
            fibers()[f].copies.assign(1, {});
        }
        order_before(this);
        for (bool progress = true; progress && !error_;) {
            progress = false;
            for (unsigned i = 0; i < alive_; ++i) {
                blockIdx.x = first_ + (descending ? alive_ - 1 - i : i);
                while (!error_ && run_block()) progress = true;
            }
        }
        order_after(this);
        if (error_) std::rethrow_exception(error_);
        for (blockIdx.x = first_; blockIdx.x < first_ + alive_; ++blockIdx.x) {
            for (threadIdx.x = 0; threadIdx.x < shape_.threads; ++threadIdx.x)
                if (!running().done)
                    throw std::runtime_error(here() + " waits for ever at " +
                                             place(running().file, running().line) +
                                             ": not all threads arrive there");
            try {
                block().shared.check();
            } catch (const std::exception& error) {
                throw std::runtime_error("block " + std::to_string(blockIdx.x) + " " + error.what());
            }
        }
    }

    // Each of the block's threads that can, until it waits; whether one could.
    bool run_block() {
        bool progress = false;
        for (unsigned i = 0; i < shape_.threads && !error_; ++i) {
            threadIdx.x = descending ? shape_.threads - 1 - i : i;
            Fiber& fiber = running();
            if (!fiber.can_run()) continue;
            progress = true;
            fiber.waits_for = nullptr;
            scheduler_.switch_to(fiber);
        }
        return progress;
    }

    // A fiber's whole life: one thread of each block in turn.
    static void run_threads() {
        Grid& grid = *active;
        Fiber& fiber = grid.running();
        grid.scheduler_.entered(nullptr);
        for (;;) {
            order_after(&grid);
            try {
                fiber.in_stream_order = !grid.shape_.may_overlap;
                grid.body_();
                if (!fiber.in_stream_order)
                    throw std::runtime_error("did not wait for the launches ahead of it");
            } catch (const std::exception& error) {
                grid.error_ = std::make_exception_ptr(std::runtime_error(here() + ": " + error.what()));
            }
            order_before(&grid);
            fiber.done = true;
            grid.scheduler_.switch_back(fiber);
        }
    }

    const std::function<void()>& body_;
    Shape shape_;
    unsigned alive_;      // blocks that run side by side
    unsigned first_ = 0;  // of them
    Barrier whole_;
    std::vector<Block> blocks_;
    std::exception_ptr error_;
    Scheduler scheduler_;
};

Grid* Grid::active = nullptr;

}  // namespace

void run_grid(const Shape& shape, const std::function<void()>& body) {
    static std::mutex one_at_a_time;
    const std::lock_guard<std::mutex> lock(one_at_a_time);
    Grid grid(shape, body);
    Grid::active = &grid;
    blockDim = {shape.threads, 1, 1};
    gridDim = {shape.blocks, 1, 1};
    grid.run();
}

void set_schedule(bool downwards) {
    descending = downwards;
}

void sync_threads(const char* file, int line) {
    Grid::active->wait_for_block(file, line);
}
void sync_warp(const char* file, int line) {
    Grid::active->wait_for_warp(file, line);
}

void sync_grid(const char* file, int line) {
    Grid::active->wait_for_grid(file, line);
}

void wait_for_launches_ahead() {
    Grid::active->running().in_stream_order = true;
}

void exchange(void* value, std::size_t bytes, int from, const char* file, int line) {
    const unsigned thread = threadIdx.x;
    Slots& own = Grid::active->fiber(thread).slots;
    const unsigned parity = own.exchanges++ % 2;
    std::memcpy(own.slot[parity].value, value, bytes);
    own.slot[parity].file = file;
    own.slot[parity].line = line;
    Grid::active->wait_for_warp(file, line);
    const unsigned other = thread / kWarp * kWarp + static_cast<unsigned>(from);
    const Slots::Slot& theirs = Grid::active->fiber(other).slots.slot[parity];
    if (theirs.line != line || std::strcmp(theirs.file, file) != 0)
        throw std::runtime_error("a warp's exchange at " + place(file, line) + " meets thread " +
                                 std::to_string(other) + "'s at " + place(theirs.file, theirs.line));
    std::memcpy(value, theirs.value, bytes);
}

void* shared_array(const void* key, std::size_t bytes) {
    return Grid::active->block().shared.array(key, bytes);
}
void* dynamic_shared() {
    return Grid::active->block().shared.dynamic();
}

void begin_copy(const Copy& copy) {
    Grid::active->running().copies.back().push_back(copy);
}
void close_batch_of_copies() {
    Grid::active->running().copies.emplace_back();
}
bool take_arrived(int newest, Copy& copy) {
    Copies& copies = Grid::active->running().copies;
    while (copies.size() > static_cast<std::size_t>(newest) + 1) {
        std::deque<Copy>& oldest = copies.front();
        if (oldest.empty()) {
            copies.pop_front();
            continue;
        }
        copy = oldest.front();
        oldest.pop_front();
        return true;
    }
    return false;
}

void check_whole_warp(unsigned mask) {
    if (mask != 0xffffffffu) throw std::runtime_error("a warp's exchange leaves threads out");
}

void check_alignment(const void* address, std::size_t alignment) {
    const std::size_t off = reinterpret_cast<std::uintptr_t>(address) % alignment;
    if (off != 0)
        throw std::runtime_error("a vector of " + std::to_string(alignment) +
                                 " bytes at an address that is " + std::to_string(off) + " bytes off");
}

}  // namespace fastres::emu
