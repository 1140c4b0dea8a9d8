//! The CRI server's side of the protocol with the monitors.
