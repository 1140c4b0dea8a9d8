use crate::needs::Test;
pub const TESTS: &[Test] = &[];
