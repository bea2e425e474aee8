//! The lab, and the tests that drive uvmm from outside.
