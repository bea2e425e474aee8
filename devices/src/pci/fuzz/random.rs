//! Numbers that look random enough, and come again with the same seed.

use std::time::{SystemTime, UNIX_EPOCH};

/// From the seed that `UVMM_SEED` gives, else from the clock (Marsaglia, "Xorshift RNGs", 2003).
pub(super) struct Random(u64);

impl Random {
    /// Prints the seed, so that all that was drawn can be drawn again.
    pub(super) fn new() -> Self {
        let given = std::env::var("UVMM_SEED").ok();
        let now = || SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
        let seed = given.map_or_else(now, |seed| seed.parse().expect("UVMM_SEED is a number"));
        println!("UVMM_SEED={seed}");
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub(super) fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        usize::try_from(self.0 >> 33).unwrap() % limit.max(1)
    }

    /// One of those that are `telling`, or any.
    pub(super) fn byte(&mut self, telling: [u8; 8]) -> u8 {
        match self.below(3) {
            0 => telling[self.below(telling.len())],
            _ => u8::try_from(self.below(256)).unwrap(),
        }
    }
}
