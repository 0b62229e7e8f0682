#undef _FORTIFY_SOURCE  // its longjmp takes a switch between stacks for an error
#include "emu/block.h"

#include <setjmp.h>
#include <ucontext.h>

#include <cstdint>
#include <cstring>
#include <exception>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

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

// What a thread of the block has brought to its warp's exchanges; two, as the next may begin before all
// have read.
struct Slots {
    char value[2][kLargestExchange];
    unsigned exchanges = 0;
};

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
    const Barrier* waits_for = nullptr;
    unsigned phase = 0;
    const char* file = "";
    int line = 0;
    Slots slots;
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

class Grid {
  public:
    Grid(unsigned threads, const std::function<void()>& body)
        : body_(body), threads_(threads), all_(threads) {
        for (unsigned first = 0; first < threads; first += kWarp)
            warps_.emplace_back(threads - first < kWarp ? threads - first : kWarp);
        if (fibers().size() < threads) fibers().resize(threads);
        for (unsigned t = 0; t < threads; ++t) {
            Fiber& fiber = fibers()[t];
            ucontext_t& context = fiber.context.machine;
            getcontext(&context);
            context.uc_stack.ss_sp = fiber.stack.get();
            context.uc_stack.ss_size = kStackBytes;
            context.uc_link = nullptr;
            makecontext(&context, &Grid::run_blocks, 0);
            fiber.context.entered = false;
        }
    }

    void run_block() {
        order_before(this);
        for (unsigned t = 0; t < threads_; ++t) {
            fibers()[t].done = false;
            fibers()[t].waits_for = nullptr;
        }
        for (bool progress = true; progress && !error_;) {
            progress = false;
            for (unsigned i = 0; i < threads_; ++i) {
                threadIdx.x = descending ? threads_ - 1 - i : i;
                Fiber& fiber = running();
                if (!fiber.can_run()) continue;
                progress = true;
                fiber.waits_for = nullptr;
                scheduler_.switch_to(fiber);
            }
        }
        order_after(this);
        if (error_) std::rethrow_exception(error_);
        for (threadIdx.x = 0; threadIdx.x < threads_; ++threadIdx.x)
            if (!running().done)
                throw std::runtime_error(here() + " waits for ever at " + running().file + ":" +
                                         std::to_string(running().line) + ": not all threads arrive there");
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
    void wait_for_block(const char* file, int line) { wait(all_, file, line); }
    void wait_for_warp(const char* file, int line) { wait(warps_[threadIdx.x / kWarp], file, line); }

    static std::vector<Fiber>& fibers() {
        static std::vector<Fiber> kept;  // their stacks serve one grid after the other
        return kept;
    }

    static Grid* active;

  private:
    static Fiber& running() { return fibers()[threadIdx.x]; }
    static std::string here() {
        return "block " + std::to_string(blockIdx.x) + ", thread " + std::to_string(threadIdx.x);
    }

    // A fiber's whole life: one thread of each block in turn.
    static void run_blocks() {
        Grid& grid = *active;
        Fiber& fiber = running();
        grid.scheduler_.entered(nullptr);
        for (;;) {
            order_after(&grid);
            try {
                grid.body_();
            } catch (const std::exception& error) {
                grid.error_ = std::make_exception_ptr(std::runtime_error(here() + ": " + error.what()));
            }
            order_before(&grid);
            fiber.done = true;
            grid.scheduler_.switch_back(fiber);
        }
    }

    const std::function<void()>& body_;
    unsigned threads_;
    Barrier all_;
    std::vector<Barrier> warps_;
    std::exception_ptr error_;
    Scheduler scheduler_;
};

Grid* Grid::active = nullptr;

}  // namespace

void run_grid(unsigned blocks, unsigned threads, const std::function<void()>& body) {
    static std::mutex one_at_a_time;
    const std::lock_guard<std::mutex> lock(one_at_a_time);
    Grid grid(threads, body);
    Grid::active = &grid;
    blockDim = {threads, 1, 1};
    gridDim = {blocks, 1, 1};
    for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x) grid.run_block();
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

void exchange(void* value, std::size_t bytes, int from, const char* file, int line) {
    const unsigned thread = threadIdx.x;
    Slots& own = Grid::fibers()[thread].slots;
    const unsigned parity = own.exchanges++ % 2;
    std::memcpy(own.value[parity], value, bytes);
    Grid::active->wait_for_warp(file, line);
    std::memcpy(value,
                Grid::fibers()[thread / kWarp * kWarp + static_cast<unsigned>(from)].slots.value[parity],
                bytes);
}

void check_alignment(const void* address, std::size_t alignment) {
    const std::size_t off = reinterpret_cast<std::uintptr_t>(address) % alignment;
    if (off != 0)
        throw std::runtime_error("a vector of " + std::to_string(alignment) +
                                 " bytes at an address that is " + std::to_string(off) + " bytes off");
}

}  // namespace fastres::emu
