//! Whether a guest that goes to another process of its host takes longer if it has more memory.
use std::path::PathBuf;

use super::vmms::{Handed, Stand};
use super::{Row, at_most, figure, median};
use crate::error::Result;

/// MiB of the two guests that are compared.
const SIZES: [u64; 2] = [256, 4096];

/// What each size took.
#[derive(Debug, Default)]
struct Runs {
    total_ms: Vec<f64>,
    downtime_ms: Vec<f64>,
}

/// Hands a small and a large guest over from process to process, in turns, `runs` times each.
///
/// # Errors
/// If uvmm does not do what it is told.
pub fn handovers(uvmm: PathBuf, runs: usize) -> Result<Vec<Row>> {
    let stand = Stand::new(uvmm)?;
    let [mut small, mut large] = [stand.settle(SIZES[0])?, stand.settle(SIZES[1])?];
    let mut all = [Runs::default(), Runs::default()];
    for run in 1..=runs {
        for (guest, all) in [&mut small, &mut large].into_iter().zip(&mut all) {
            let Handed { total_ms, downtime_ms } = stand.hand_over(guest)?;
            all.total_ms.push(total_ms);
            all.downtime_ms.push(downtime_ms);
        }
        let last = all.each_ref().map(|all| all.total_ms.last().copied().unwrap_or(f64::NAN));
        eprintln!("hand-over {run} of {runs}: 256 MiB {:.0} ms, 4 GiB {:.0} ms", last[0], last[1]);
    }
    Ok(rows(&all))
}

fn rows([small, large]: &[Runs; 2]) -> Vec<Row> {
    let middle = |values: &[f64]| median(values.iter().copied());
    let (short, long) = (middle(&small.total_ms), middle(&large.total_ms));
    vec![
        figure("same host, memory shared, 256 MiB", short, "ms"),
        figure("same host, memory shared, 4 GiB", long, "ms"),
        at_most(1.2, "time, memory shared, 4 GiB / 256 MiB", long / short, ""),
        figure("downtime, memory shared, 256 MiB", middle(&small.downtime_ms), "ms"),
        at_most(20.0, "downtime, memory shared, 4 GiB", middle(&large.downtime_ms), "ms"),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_that_grows_with_memory_misses_the_goal() {
        let runs = |total_ms: f64| Runs { total_ms: vec![total_ms], downtime_ms: vec![9.0] };
        let reached = |large| rows(&[runs(50.0), runs(large)]).iter().all(Row::ok);
        assert!(reached(60.0));
        assert!(!reached(61.0));
    }
}
