// Runs CUDA kernels on the host, so that their arithmetic and indexing can be tested without a GPU.
//
// Blocks run one after another. The threads of a block are coroutines: each runs until it ends or
// waits at __syncthreads(), and none goes on before all others that have not ended wait there too.
// Built with UBSan in trapping mode: a misaligned access or an overflowing shift ends the process.

#include <ucontext.h>

#include <cstddef>
#include <cstring>
#include <memory>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(threads)
#define __shared__ static // one block at a time

struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct alignas(16) ulonglong2 {
    unsigned long long x, y;
};
struct Index {
    unsigned x, y, z;
};

static Index threadIdx, blockIdx, blockDim, gridDim;

static inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w)
{
    return {x, y, z, w};
}

template <typename T> static inline T __ldg(const T *from)
{
    return *from;
}

static inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned count)
{
    unsigned long long both = (unsigned long long)high << 32 | low;
    return (unsigned)(both >> (count & 31));
}

namespace host {

struct Thread {
    ucontext_t context;
    std::unique_ptr<char[]> stack{new char[64 * 1024]};
    unsigned index = 0;
};

static ucontext_t scheduler;
static Thread *running;
static bool has_ended;
static void (*body)(void *);
static void *body_arguments;

static void enter()
{
    body(body_arguments);
    has_ended = true;
    swapcontext(&running->context, &scheduler);
}

static void resume(Thread *thread)
{
    running = thread, has_ended = false, threadIdx = {thread->index, 0, 0};
    swapcontext(&scheduler, &thread->context);
}

// Runs one block; the stack of a thread that ends without waiting serves the next.
static void run_block(std::vector<std::unique_ptr<Thread>> &stacks)
{
    std::vector<Thread *> waiting;
    std::size_t used = 0;
    for (unsigned index = 0; index < blockDim.x; index++) {
        if (used == stacks.size())
            stacks.push_back(std::make_unique<Thread>());
        Thread *thread = stacks[used].get();
        thread->index = index;
        getcontext(&thread->context);
        thread->context.uc_stack.ss_sp = thread->stack.get();
        thread->context.uc_stack.ss_size = 64 * 1024;
        thread->context.uc_link = nullptr;
        makecontext(&thread->context, enter, 0);
        resume(thread);
        if (!has_ended) {
            waiting.push_back(thread);
            used++;
        }
    }
    while (!waiting.empty()) {
        std::vector<Thread *> still;
        for (Thread *thread : waiting) {
            resume(thread);
            if (!has_ended)
                still.push_back(thread);
        }
        waiting.swap(still);
    }
}

template <typename... Arguments, std::size_t... Places>
void call(void (*kernel)(Arguments...), void **arguments, std::index_sequence<Places...>)
{
    kernel(*static_cast<Arguments *>(arguments[Places])...);
}

template <typename... Arguments> std::size_t sizes(void (*)(Arguments...), unsigned *nbytes)
{
    std::size_t count = 0;
    ((nbytes[count++] = sizeof(Arguments)), ...);
    return count;
}

template <auto kernel> void with(void *arguments)
{
    []<typename... Arguments>(void (*one)(Arguments...), void **given) {
        call(one, given, std::index_sequence_for<Arguments...>{});
    }(kernel, static_cast<void **>(arguments));
}

struct Entry {
    const char *name;
    void (*body)(void *);
    std::size_t (*sizes)(unsigned *);
};

static int launch(const Entry &entry, unsigned grid, unsigned block, void **arguments)
{
    std::vector<std::unique_ptr<Thread>> stacks;
    gridDim = {grid, 1, 1}, blockDim = {block, 1, 1};
    body = entry.body, body_arguments = arguments;
    for (unsigned index = 0; index < grid; index++) {
        blockIdx = {index, 0, 0};
        run_block(stacks);
    }
    return 0;
}

} // namespace host

static inline void __syncthreads()
{
    host::Thread *self = host::running;
    swapcontext(&self->context, &host::scheduler);
}

#define KERNEL(name)                                                                              \
    host::Entry { #name, host::with<name>, [](unsigned *n) { return host::sizes(name, n); } }

// What the tests call, for a table `entries` that ends with a null name.
#define LAUNCHER                                                                                  \
    extern "C" int argument_sizes(const char *name, unsigned *nbytes)                             \
    {                                                                                             \
        for (const host::Entry *entry = entries; entry->name; entry++)                            \
            if (!std::strcmp(entry->name, name))                                                  \
                return (int)entry->sizes(nbytes);                                                 \
        return -1;                                                                                \
    }                                                                                             \
    extern "C" int launch(const char *name, unsigned grid, unsigned block, void **arguments)      \
    {                                                                                             \
        for (const host::Entry *entry = entries; entry->name; entry++)                            \
            if (!std::strcmp(entry->name, name))                                                  \
                return host::launch(*entry, grid, block, arguments);                              \
        return -1;                                                                                \
    }
