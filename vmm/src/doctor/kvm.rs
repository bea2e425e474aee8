//! What this host's KVM can do.

use std::fs::OpenOptions;
use std::io;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;

use kvm_bindings::KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2;
use kvm_ioctls::{Cap, Kvm};

use super::guest::{self, GuestError, Seen};
use super::{Check, TRIAL_LIMIT, Verdict};
use crate::arch::cpuid;
use crate::arch::model::Processors;
use crate::cause;
use crate::config::CpuBase;

const DEVICE: &str = "/dev/kvm";
/// The only version of the API there has been since Linux 2.6.22.
const API_VERSION: i32 = 12;
/// Software KVMs interpret about 1.4 million instructions in a second; hardware, even emulated
/// hardware, does many times that.
const INTERPRETED_MAX: u64 = 8_000_000;

pub(super) fn examine() -> Vec<Check> {
    let mut checks = Vec::new();
    let kvm = match open() {
        Ok(kvm) => kvm,
        Err(check) => return vec![check],
    };
    checks.push(Check::ok("KVM", format!("{DEVICE}, API {API_VERSION}")));
    checks.push(tried("VM, irqchip, timer, vCPU", || whole_machine().map(|()| "created".into())));
    checks.extend(guest_checks());
    checks.extend(extensions(&kvm));
    checks.extend(levels(&kvm));
    checks
}

fn open() -> Result<Kvm, Check> {
    let no = |found: String, remedy: &str| Check::not_ok("KVM", Verdict::Fatal, found, remedy);
    // By hand first, since the errors of this are the ones with remedies.
    if let Err(error) = OpenOptions::new().read(true).write(true).open(DEVICE) {
        let remedy = match error.kind() {
            io::ErrorKind::PermissionDenied => {
                "add your user to the group kvm (usermod -aG kvm USER) and log in again"
            }
            io::ErrorKind::NotFound => {
                "enable virtualisation in the firmware, then modprobe kvm_intel or kvm_amd; in a \
                 container, pass the device in"
            }
            _ => "modprobe kvm_intel or kvm_amd",
        };
        return Err(no(format!("cannot open {DEVICE}: {error}"), remedy));
    }
    let kvm = Kvm::new().map_err(|e| no(e.to_string(), "modprobe kvm_intel or kvm_amd"))?;
    match kvm.get_api_version() {
        API_VERSION => Ok(kvm),
        other => {
            Err(no(format!("{DEVICE} speaks API {other}"), "use a kernel whose KVM is API 12"))
        }
    }
}

/// Something that every VM needs.
fn tried(what: &'static str, trial: impl FnOnce() -> Result<String, String>) -> Check {
    match trial() {
        Ok(found) => Check::ok(what, found),
        Err(found) => {
            let remedy = "this KVM cannot run guests: use another host or kernel";
            Check::not_ok(what, Verdict::Fatal, found, remedy)
        }
    }
}

fn whole_machine() -> Result<(), String> {
    let failed = |what: &'static str| move |e: kvm_ioctls::Error| format!("{what}: {e}");
    let kvm = Kvm::new().map_err(failed("opening"))?;
    let vm = kvm.create_vm().map_err(failed("creating a VM"))?;
    vm.create_irq_chip().map_err(failed("creating its interrupt controllers"))?;
    vm.create_pit2(kvm_bindings::kvm_pit_config::default())
        .map_err(failed("creating its timer"))?;
    vm.create_vcpu(0).map_err(failed("creating a vCPU"))?;
    Ok(())
}

fn guest_checks() -> Vec<Check> {
    match run_guest() {
        Ok(Seen { speed, dirty_log }) => {
            let (millions, tenths) = (speed / 1_000_000, speed / 100_000 % 10);
            let found = format!("{millions}.{tenths} million instructions/s");
            let speed = if speed > INTERPRETED_MAX {
                Check::ok("guest code", format!("{found}: hardware"))
            } else {
                let remedy = "Linux takes minutes to boot: use a host with hardware virtualisation";
                let found = format!("{found}: software");
                Check::not_ok("guest code", Verdict::Limited, found, remedy)
            };
            let log = if dirty_log {
                Check::ok("dirty log", "names the page a guest wrote")
            } else {
                let found = "does not name the page a guest wrote";
                Check::not_ok(
                    "dirty log",
                    Verdict::Limited,
                    found,
                    "guests cannot be migrated from here",
                )
            };
            vec![speed, log]
        }
        Err(found) => vec![tried("guest code", || Err(found))],
    }
}

/// On a thread that is left behind if the guest does not come back.
fn run_guest() -> Result<Seen, String> {
    let (sender, receiver) = mpsc::channel();
    let trial = move || {
        let seen = Kvm::new()
            .and_then(|kvm| kvm.create_vm())
            .map_err(|error| GuestError::Kvm("create a VM", error))
            .and_then(|vm| guest::run(&vm));
        let _ = sender.send(seen.map_err(|error| cause::chain(&error)));
    };
    let thread = thread::Builder::new().name("doctor".into()).spawn(trial);
    thread.map_err(|error| format!("cannot start a thread: {error}"))?;
    receiver.recv_timeout(TRIAL_LIMIT).unwrap_or_else(|error| match error {
        RecvTimeoutError::Timeout => Err(format!("did not end within {TRIAL_LIMIT:.0?}")),
        RecvTimeoutError::Disconnected => Err("its thread panicked".to_owned()),
    })
}

fn extensions(kvm: &Kvm) -> Vec<Check> {
    let count = |cap| kvm.check_extension_int(cap);
    let optional = |what, found: Option<String>, without: &str| match found {
        Some(found) => Check::ok(what, found),
        None => Check::not_ok(what, Verdict::Missing, "not offered", without),
    };
    let manual = kvm.check_extension_raw(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2.into());
    let positive = |cap| Some(count(cap)).filter(|&n| n > 0);
    let xsave = match positive(Cap::Xsave2) {
        Some(bytes) => Check::ok("XSAVE", format!("{bytes} bytes")),
        None => Check::ok("XSAVE", "4096 bytes (no XSAVE2)"),
    };
    vec![
        optional(
            "dirty log, manual protect",
            Some(manual).filter(|&modes| modes > 0).map(|modes| format!("modes {modes}")),
            "every read of the log protects all pages at once",
        ),
        optional(
            "dirty ring",
            positive(Cap::DirtyLogRing).map(|n| format!("{} entries", n / DIRTY_RING_ENTRY)),
            "--dirty-tracking ring is not possible here: the dirty log is used",
        ),
        optional(
            "TSC scaling",
            positive(Cap::TscControl).map(|_| "offered".to_owned()),
            "guests can only come from hosts with the same TSC frequency",
        ),
        xsave,
        Check::ok("vCPUs", format!("at most {}", kvm.get_max_vcpus())),
    ]
}

/// Which levels of processors a guest could have here.
fn levels(kvm: &Kvm) -> Vec<Check> {
    let level = |(base, what): (CpuBase, &'static str)| {
        let not = |found: String| {
            let remedy = format!("guests with --cpu {base} neither start here nor come here");
            Check::not_ok(what, Verdict::Missing, found, remedy)
        };
        match try_level(kvm, base) {
            Ok(surplus) if surplus.is_empty() => Check::ok(what, "as it is"),
            Ok(surplus) => {
                let remedy = "guests can only move to hosts that show these features too";
                let found = format!("this KVM also shows {}", surplus.join(", "));
                Check::not_ok(what, Verdict::Limited, found, remedy)
            }
            Err(found) => not(found),
        }
    };
    let names = ["processors x86-64-v2", "processors x86-64-v3", "processors x86-64-v4"];
    CpuBase::LEVELS.into_iter().zip(names).map(level).collect()
}

/// What a vCPU of that level shows besides; an error tells what the host lacks.
fn try_level(kvm: &Kvm, base: CpuBase) -> Result<Vec<String>, String> {
    let failed = |error: kvm_ioctls::Error| error.to_string();
    let refused = |error: crate::kvm::Error| cause::chain(&error);
    let vm = kvm.create_vm().map_err(failed)?;
    // The local APIC is among the features that are shown.
    vm.create_irq_chip().map_err(failed)?;
    let vcpu = vm.create_vcpu(0).map_err(failed)?;
    let host = cpuid::host(kvm, &vcpu).map_err(refused)?;
    let processors = Processors::new(&host, &base.into()).map_err(refused)?;
    let lacking = processors.lacking();
    if !lacking.is_empty() {
        return Err(format!("lacks {}", lacking.join(", ")));
    }
    let cpuid = cpuid::of_vcpu(&processors.cpuid, 0, 1).map_err(refused)?;
    vcpu.set_cpuid2(&cpuid).map_err(failed)?;
    Ok(processors.surplus(&cpuid::shown(&vcpu).map_err(refused)?))
}

/// sizeof(struct kvm_dirty_gfn): the capability's value is the ring's largest size in bytes.
const DIRTY_RING_ENTRY: i32 = 16;
