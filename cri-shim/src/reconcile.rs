//! After a start: the store and what the kernel has, brought together.
