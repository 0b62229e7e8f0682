// The thread pool that the CPU drivers run on, without naming whose it is (the binding passes PyTorch's).
#pragma once

#include <cstdint>
#include <type_traits>

namespace fastres::cpu {

class ThreadPool {
  public:
    using Task = void (*)(void* context, int64_t task);
    using Run = void (*)(int64_t tasks, Task task, void* context);

    ThreadPool(int64_t threads, Run run) : threads_(threads), run_(run) {}

    int64_t threads() const { return threads_; }

    // Calls body(0) ... body(tasks - 1), in any order, and returns when all are done.
    template <class Body>
    void for_each(int64_t tasks, Body&& body) const {
        using Plain = std::remove_reference_t<Body>;
        if (tasks == 1) return body(int64_t{0});
        run_(
            tasks, [](void* context, int64_t task) { (*static_cast<Plain*>(context))(task); },
            const_cast<void*>(static_cast<const void*>(&body)));
    }

  private:
    int64_t threads_;
    Run run_;
};

}  // namespace fastres::cpu
