//! Functions that keep the memory use of the CRI server and of the monitors low. The server runs as
//! long as the node, and a monitor runs as long as its pod. Both are idle most of the time. While
//! they are idle, they do not need the memory of earlier operations.

/// The size of a thread's stack in bytes. The size must be less than 2 MiB. With a larger stack, a
/// kernel with transparent huge pages allocates a whole huge page for each thread.
pub const THREAD_STACK_BYTES: usize = 1 << 20;

/// Configures malloc(3) to use one heap for all threads. A thread can then reuse memory that
/// another thread has freed. Call this function before the process starts other threads.
pub fn one_heap() {
    #[cfg(target_env = "gnu")]
    {
        // SAFETY: both arguments of mallopt(3) are numbers, and no other thread uses malloc yet.
        unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) };
    }
}

/// Returns the free memory of the heap to the kernel. Call `give_back` after an operation with a
/// high memory use.
pub fn give_back() {
    #[cfg(target_env = "gnu")]
    {
        // SAFETY: the argument of malloc_trim(3) is a number, and other threads can use malloc at
        // the same time.
        unsafe { libc::malloc_trim(0) };
    }
}
