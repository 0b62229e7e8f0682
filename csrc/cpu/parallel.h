// The thread pool that the CPU drivers run on, without naming whose it is (the binding passes PyTorch's).
#pragma once

#include <atomic>
#include <cstdint>
#include <type_traits>
#include <vector>

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
        if (tasks == 1) return body(int64_t{0});
        if (tasks <= threads_) return run(tasks, body);
        // Each thread takes a share in order, then what is left of the others': cores differ in speed, by
        // their kind or by what else they run.
        std::vector<Share> shares(threads_);
        for (int64_t i = 0; i < threads_; ++i) {
            shares[i].next.store(tasks * i / threads_, std::memory_order_relaxed);
            shares[i].end = tasks * (i + 1) / threads_;
        }
        run(threads_, [&](int64_t thread) {
            for (int64_t i = 0; i < threads_; ++i) {
                Share& share = shares[(thread + i) % threads_];
                for (int64_t task; (task = share.next.fetch_add(1, std::memory_order_relaxed)) < share.end;)
                    body(task);
            }
        });
    }

  private:
    struct alignas(64) Share {
        std::atomic<int64_t> next;
        int64_t end;
    };

    template <class Body>
    void run(int64_t tasks, Body&& body) const {
        using Plain = std::remove_reference_t<Body>;
        run_(
            tasks, [](void* context, int64_t task) { (*static_cast<Plain*>(context))(task); },
            const_cast<void*>(static_cast<const void*>(&body)));
    }

    int64_t threads_;
    Run run_;
};

// The calling thread alone.
inline const ThreadPool& serial_pool() {
    static const ThreadPool pool(1, [](int64_t tasks, ThreadPool::Task task, void* context) {
        for (int64_t i = 0; i < tasks; ++i) task(context, i);
    });
    return pool;
}

}  // namespace fastres::cpu
