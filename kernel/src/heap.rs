//! Keeps the server and the monitors small: they live as long as the node and their pods, and work
//! in short bursts.

/// Bytes of a thread's stack. Below two megabytes, or a kernel with transparent huge pages gives
/// each thread one of those.
pub const THREAD_STACK_BYTES: usize = 1 << 20;

/// One heap for all threads: what a burst on one of them leaves free serves the next one's.
/// To be called before there are threads.
pub fn one_heap() {
    #[cfg(target_env = "gnu")]
    {
        // SAFETY: mallopt(3) takes two numbers, and nobody else is in malloc yet.
        unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) };
    }
}

/// Gives free memory back to the kernel, after something large.
pub fn give_back() {
    #[cfg(target_env = "gnu")]
    {
        // SAFETY: malloc_trim(3) takes a number, and is safe beside any other thread's malloc.
        unsafe { libc::malloc_trim(0) };
    }
}
