//! What this host offers beside KVM: memory, devices, network, and a place for sockets.

use std::fs::{self, OpenOptions};
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::Path;

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::process::{Resource, getrlimit};

use super::{Check, TRIAL_LIMIT, Verdict};
use crate::cause;
use crate::config::{HugePages, Size};
use crate::control::RuntimeDir;

pub(super) fn examine() -> Vec<Check> {
    vec![
        memfd(),
        huge_pages(HugePages::Size2M),
        huge_pages(HugePages::Size1G),
        transparent_huge_pages(),
        locked_memory(),
        vfio(),
        iommu(),
        loopback(),
        runtime_dir(),
    ]
}

fn memfd() -> Check {
    let tried = memfd_create("uvmm-doctor", MemfdFlags::CLOEXEC).and_then(|f| ftruncate(f, 4096));
    match tried {
        Ok(()) => Check::ok("guest memory", "memfd"),
        Err(error) => {
            let found = format!("no memfd: {error}");
            Check::not_ok("guest memory", Verdict::Fatal, found, "use Linux 3.17 or newer")
        }
    }
}

fn huge_pages(size: HugePages) -> Check {
    let what = match size {
        HugePages::Size2M => "huge pages of 2M",
        HugePages::Size1G => "huge pages of 1G",
    };
    match size.free() {
        Some(0) => {
            let remedy = format!("for --hugepages, write a number to {}", size.pool().display());
            Check::not_ok(what, Verdict::Missing, "none free", remedy)
        }
        Some(free) => Check::ok(what, format!("{free} free")),
        None => Check::not_ok(what, Verdict::Missing, "unknown to this kernel", "not needed"),
    }
}

/// Whether guest RAM, which is shared memory, gets huge pages without a reservation.
fn transparent_huge_pages() -> Check {
    let setting = "/sys/kernel/mm/transparent_hugepage/shmem_enabled";
    let all = fs::read_to_string(setting).unwrap_or_default();
    let chosen = all.split_once('[').and_then(|(_, rest)| rest.split_once(']')).map(|(is, _)| is);
    match chosen {
        Some(chosen @ ("advise" | "always" | "within_size" | "force")) => {
            Check::ok("transparent huge pages", chosen)
        }
        _ => Check::not_ok(
            "transparent huge pages",
            Verdict::Limited,
            chosen.unwrap_or("unknown to this kernel"),
            format!("for guests that boot faster, echo advise > {setting}"),
        ),
    }
}

fn locked_memory() -> Check {
    match getrlimit(Resource::Memlock).current {
        None => Check::ok("locked memory", "no limit"),
        Some(limit) => Check::not_ok(
            "locked memory",
            Verdict::Limited,
            format!("at most {}", Size(limit)),
            "for guests with devices, raise it above their memory (ulimit -l)",
        ),
    }
}

fn vfio() -> Check {
    let device = "/dev/vfio/vfio";
    match OpenOptions::new().read(true).write(true).open(device) {
        Ok(_) => Check::ok("VFIO", device),
        Err(error) => {
            let remedy = match error.kind() {
                io::ErrorKind::PermissionDenied => "give your user access to /dev/vfio",
                _ => "for guests with devices, modprobe vfio-pci",
            };
            let found = format!("cannot open {device}: {error}");
            Check::not_ok("VFIO", Verdict::Missing, found, remedy)
        }
    }
}

fn iommu() -> Check {
    let groups = Path::new("/sys/kernel/iommu_groups");
    match fs::read_dir(groups).map_or(0, Iterator::count) {
        0 => {
            let remedy = "for guests with devices, enable the IOMMU (intel_iommu=on)";
            Check::not_ok("IOMMU", Verdict::Missing, "no groups", remedy)
        }
        count => Check::ok("IOMMU", format!("{count} groups")),
    }
}

fn loopback() -> Check {
    let trial = || -> io::Result<()> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        let mut near = TcpStream::connect_timeout(&listener.local_addr()?, TRIAL_LIMIT)?;
        listener.set_nonblocking(true)?;
        let (mut far, _) = listener.accept()?;
        far.set_nonblocking(false)?;
        far.set_read_timeout(Some(TRIAL_LIMIT))?;
        near.write_all(b"uvmm")?;
        let mut echo = [0; 4];
        far.read_exact(&mut echo)?;
        if echo == *b"uvmm" { Ok(()) } else { Err(io::ErrorKind::InvalidData.into()) }
    };
    match trial() {
        Ok(()) => Check::ok("TCP", "a connection to this host carries data"),
        Err(error) => {
            let remedy = "guests cannot be migrated: ip link set lo up";
            Check::not_ok("TCP", Verdict::Limited, format!("no loopback: {error}"), remedy)
        }
    }
}

fn runtime_dir() -> Check {
    let trial = RuntimeDir::open().and_then(|dir| dir.claim(None));
    match trial {
        Ok(claim) => {
            let dir = claim.socket().parent().unwrap_or(claim.socket()).display().to_string();
            Check::ok("runtime directory", dir)
        }
        Err(error) => {
            let remedy = "set UVMM_RUNTIME_DIR to a directory of your own";
            Check::not_ok("runtime directory", Verdict::Fatal, cause::chain(&error), remedy)
        }
    }
}
