//! How fast a guest moves, on this machine's own KVM, beside QEMU and beside sockets alone.
use std::path::PathBuf;

use super::vmms::{Journey, Load, Stand, Vmm};
use super::{Row, at_least, at_most, ends, figure, median, raw};
use crate::error::Result;

/// Connections, where there are several: one for each processor of the machine that the goals
/// were set on.
const STREAMS: usize = 2;
const MIB: u64 = 1024;
/// Every page holds something, and 1 MiB changes all the time.
const FULL: Load = Load { mib: MIB, percent: 100, rewritten_mib: 1 };
const SPARSE: Load = Load { percent: 10, ..FULL };
const BUSY: Load = Load { rewritten_mib: 64, ..FULL };

/// One run of everything, in turns.
struct Run {
    /// Seconds of a raw copy, over one connection and over several.
    raw: [f64; 2],
    uvmm: Journey,
    uvmm_single: Journey,
    sparse: Journey,
    checked: Journey,
    busy: Journey,
    /// The first and the last once more, from dirty rings.
    ring: Journey,
    ring_busy: Journey,
    qemu: Journey,
    qemu_single: Journey,
    qemu_busy: Journey,
}

/// Measures migrations by the program at `uvmm`, `runs` of each kind.
///
/// # Errors
/// If a VMM does not do what it is told.
pub fn migrations(uvmm: PathBuf, runs: usize) -> Result<Vec<Row>> {
    let stand = Stand::new(uvmm)?;
    let mut all = Vec::new();
    for run in 1..=runs {
        let one = measure(&stand)?;
        eprintln!(
            "migration {run} of {runs}: uvmm {:.2} s, QEMU {:.2} s, sockets alone {:.2} s",
            one.uvmm.seconds, one.qemu.seconds, one.raw[1]
        );
        all.push(one);
    }
    Ok([speed(&all), stops(&all), rest(&all), tracking(&all)].into_iter().flatten().collect())
}

fn measure(stand: &Stand) -> Result<Run> {
    let go = |vmm, load| stand.migrate(vmm, load, || Ok(())).map(|(journey, ())| journey);
    let bytes = usize::try_from(MIB << 20).expect("it fits this machine's memory");
    // With the guest at work beside it, as it is beside a migration.
    let copies = || Ok([raw::copy(bytes, 1)?, raw::copy(bytes, STREAMS)?]);
    let (uvmm, raw) = stand.migrate(Vmm::Uvmm(STREAMS), FULL, copies)?;
    Ok(Run {
        raw,
        uvmm,
        sparse: go(Vmm::Uvmm(STREAMS), SPARSE)?,
        checked: go(Vmm::UvmmChecked(STREAMS), FULL)?,
        qemu: go(Vmm::QemuMultifd(STREAMS), FULL)?,
        uvmm_single: go(Vmm::Uvmm(1), FULL)?,
        qemu_single: go(Vmm::Qemu, FULL)?,
        busy: go(Vmm::Uvmm(STREAMS), BUSY)?,
        ring: go(Vmm::UvmmRing(STREAMS), FULL)?,
        ring_busy: go(Vmm::UvmmRing(STREAMS), BUSY)?,
        qemu_busy: go(Vmm::QemuMultifd(STREAMS), BUSY)?,
    })
}

/// The median of what `of` tells of each run.
fn middle(runs: &[Run], of: impl Fn(&Run) -> f64) -> f64 {
    median(runs.iter().map(of))
}

/// How long, and how it ended.
fn time(runs: &[Run], name: &str, of: impl Fn(&Run) -> &Journey) -> Row {
    let ended = Some(ends(runs.iter().map(|run| &of(run).end)));
    Row { ended, ..figure(name, middle(runs, |run| of(run).seconds), "s") }
}

fn speed(runs: &[Run]) -> Vec<Row> {
    let time = |name, of: fn(&Run) -> &Journey| time(runs, name, of);
    let figure = |name: &str, of: fn(&Run) -> f64| figure(name, middle(runs, of), "s");
    vec![
        time("1 GiB, uvmm, 2 streams", |run| &run.uvmm),
        time("1 GiB, QEMU, multifd, 2 channels", |run| &run.qemu),
        figure("1 GiB, sockets alone, 2 streams", |run| run.raw[1]),
        time("1 GiB, uvmm, 1 stream", |run| &run.uvmm_single),
        time("1 GiB, QEMU, 1 stream", |run| &run.qemu_single),
        figure("1 GiB, sockets alone, 1 stream", |run| run.raw[0]),
        at_most(
            0.6,
            "time, uvmm / QEMU multifd, 2 streams",
            middle(runs, |run| run.uvmm.seconds / run.qemu.seconds),
            "",
        ),
        at_most(
            0.3,
            "time, uvmm with 2 streams / QEMU with 1",
            middle(runs, |run| run.uvmm.seconds / run.qemu_single.seconds),
            "",
        ),
        at_least(
            0.85,
            "throughput, uvmm / sockets alone, 2 streams",
            middle(runs, |run| run.raw[1] / run.uvmm.seconds),
            "",
        ),
        at_least(
            0.85,
            "throughput, uvmm / sockets alone, 1 stream",
            middle(runs, |run| run.raw[0] / run.uvmm_single.seconds),
            "",
        ),
    ]
}

fn stops(runs: &[Run]) -> Vec<Row> {
    let figure = |name: &str, of: fn(&Run) -> f64| figure(name, middle(runs, of), "ms");
    let ratio =
        |run: &Run| run.uvmm.downtime_ms / run.qemu.downtime_ms.min(run.qemu_single.downtime_ms);
    vec![
        figure("downtime seen in the guest's memory, uvmm, 2 streams", |run| run.uvmm.downtime_ms),
        figure("downtime, QEMU, multifd", |run| run.qemu.downtime_ms),
        figure("downtime, QEMU, 1 stream", |run| run.qemu_single.downtime_ms),
        at_most(0.15, "downtime, uvmm / the better of QEMU", middle(runs, ratio), ""),
    ]
}

fn rest(runs: &[Run]) -> Vec<Row> {
    let ours = |run: &Run| {
        [&run.uvmm, &run.uvmm_single, &run.sparse, &run.checked, &run.busy].map(|j| j.growth_mib)
    };
    let growth = |run: &Run| ours(run).into_iter().fold(0.0, f64::max);
    let busy = |name: &str, of: fn(&Run) -> f64| figure(name, middle(runs, of), "ms");
    vec![
        at_most(
            0.25,
            "time, 90 % zero pages / none",
            middle(runs, |run| run.sparse.seconds / run.uvmm.seconds),
            "",
        ),
        figure(
            "time, with checksums / without",
            middle(runs, |run| run.checked.seconds / run.uvmm.seconds),
            "",
        ),
        at_most(16.0, "growth of a VMM while it migrates", middle(runs, growth), "MiB"),
        at_most(
            300.0,
            "64 MiB rewritten all the time: downtime, uvmm",
            middle(runs, |run| run.busy.downtime_ms),
            "ms",
        ),
        busy("64 MiB rewritten: downtime, QEMU multifd", |run| run.qemu_busy.downtime_ms),
        time(runs, "64 MiB rewritten: time, uvmm", |run| &run.busy),
        time(runs, "64 MiB rewritten: time, uvmm, dirty rings", |run| &run.ring_busy),
        time(runs, "64 MiB rewritten: time, QEMU multifd", |run| &run.qemu_busy),
    ]
}

/// What the default of `--dirty-tracking` was chosen by: a ratio above 1 speaks for the log.
fn tracking(runs: &[Run]) -> Vec<Row> {
    let ratio = |name: &str, of: fn(&Run) -> f64| figure(name, middle(runs, of), "");
    vec![
        ratio("time, dirty rings / dirty log", |run| run.ring.seconds / run.uvmm.seconds),
        ratio("downtime, dirty rings / dirty log", |run| {
            run.ring.downtime_ms / run.uvmm.downtime_ms
        }),
        ratio("64 MiB rewritten: time, dirty rings / dirty log", |run| {
            run.ring_busy.seconds / run.busy.seconds
        }),
        ratio("64 MiB rewritten: downtime, dirty rings / dirty log", |run| {
            run.ring_busy.downtime_ms / run.busy.downtime_ms
        }),
    ]
}
