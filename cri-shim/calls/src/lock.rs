//! Mutexes without poisoning.

use std::sync::{Mutex, MutexGuard, PoisonError};

/// Locks `mutex`, even if a thread with the lock panicked. Ignoring the panic is safe: rrun's
/// critical sections only read and change memory, and never block. A panic therefore can't leave
/// the protected value half changed.
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
