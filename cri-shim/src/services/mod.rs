//! The two gRPC services.
