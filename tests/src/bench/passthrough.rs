//! How long a guest that moves with a virtual function is away from its network, in the lab host.
use std::time::Duration;

use super::{Row, at_most, figure, median};
use crate::error::{Error, Result};
use crate::network::{Alias, GUEST_DRIVER, GUEST_IP, Pinger};
use crate::vm::{Report, Uvmm, Vm, text};

/// MiB that the guest keeps rewriting meanwhile, and threads that do it.
const LOAD: &str = "guest-load 8 1 /run/load > /dev/null & sleep 2";
/// How often the rest of the network pings.
const OFTEN: Duration = Duration::from_millis(100);

/// Measures what is measured in the lab host: `runs` trips with the function evicted, and as many
/// with it paused by the guest's own driver.
///
/// # Errors
/// If the guest does not boot or does not move as it should.
pub fn trips(runs: usize) -> Result<Vec<Row>> {
    let uvmm = Uvmm::new()?;
    // As the operators of two hosts do it: a guest keeps its address wherever it goes.
    let _alias = Alias::give("PF1", 0)?;
    let mut vm = uvmm.guest("", &["--device", &device("VF0")?])?;
    vm.joins_network_after("")?;
    vm.says(LOAD)?;
    let mut functions = ["VF1", "VF0"].into_iter().cycle();
    let mut evicted = Vec::new();
    for (run, function) in (1..=runs).zip(&mut functions) {
        let trip = trip(&uvmm, vm, ("evict", run), function, Vm::joins_network)?;
        eprintln!("evicted {run} of {runs}: unreachable for {:.0} ms", trip.outage_ms);
        evicted.push(trip.outage_ms);
        vm = trip.vm;
    }
    vm.joins_network_after(&format!("rmmod igbvf && {GUEST_DRIVER}"))?;
    let (mut outages, mut paused, mut own) = (Vec::new(), Vec::new(), Vec::new());
    for (run, function) in (1..=runs).zip(&mut functions) {
        let mut trip = trip(&uvmm, vm, ("pause", run), function, Vm::pings)?;
        let (paused_ms, own_ms) = (trip.report.devices[0].paused_ms, drivers_own(&mut trip.vm)?);
        eprintln!(
            "paused {run} of {runs}: unreachable for {:.0} ms, paused for {paused_ms:.0} ms, of \
             which the driver took {own_ms:.0} ms",
            trip.outage_ms
        );
        outages.push(trip.outage_ms);
        paused.push(paused_ms);
        own.push(own_ms);
        vm = trip.vm;
    }
    let shares: Vec<_> = paused.iter().zip(&own).map(|(paused, own)| paused / own).collect();
    let (outage, outage_evicted) = (median(outages), median(evicted));
    Ok(vec![
        figure("unreachable, function evicted and given back", outage_evicted, "ms"),
        figure("unreachable, function paused by its driver", outage, "ms"),
        at_most(0.1, "unreachable, paused / evicted", outage / outage_evicted, ""),
        figure("function paused", median(paused), "ms"),
        figure("the driver's own suspend and resume", median(own), "ms"),
        at_most(2.0, "paused / the driver's own", median(shares), ""),
    ])
}

struct Trip {
    vm: Vm,
    report: Report,
    outage_ms: f64,
}

/// Moves the guest to the function that `function` names, until it is `reached` again.
fn trip(
    uvmm: &Uvmm,
    vm: Vm,
    (strategy, run): (&str, usize),
    function: &str,
    reached: impl FnOnce(&mut Vm) -> Result<()>,
) -> Result<Trip> {
    let pinger = Pinger::start(GUEST_IP, OFTEN)?;
    let name = format!("{strategy}-{run}");
    let (mut vm, report) = uvmm.move_on(vm, &name, &[&device(function)?])?;
    if report.ways() != [format!("net0={strategy}")] {
        return Err(Error::Guest(format!("it was to {strategy}: {report:?}")));
    }
    reached(&mut vm)?;
    let outage_ms = pinger.finish()?.outage.as_secs_f64() * 1e3;
    Ok(Trip { vm, report, outage_ms })
}

fn device(variable: &str) -> Result<String> {
    Ok(format!("vfio,id=net0,host={}", text(variable)?))
}

/// How long the guest's driver took to suspend and resume, as it said itself last, in milliseconds.
fn drivers_own(vm: &mut Vm) -> Result<f64> {
    let said = vm.says("dmesg | grep -oE '(paused|resumed) in [0-9]+' | tail -2")?;
    Ok(said.split_whitespace().filter_map(|word| word.parse::<f64>().ok()).sum())
}
