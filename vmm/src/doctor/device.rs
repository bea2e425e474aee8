//! What stands between one device of the host and a guest.

use std::fs::OpenOptions;
use std::io;

use devices::vfio::{self, HostDevice as Found, Neighbour, Way};
use rustix::process::{Resource, getrlimit};
use rustix::thread::{CapabilitySet, capabilities};

use super::{Check, Verdict};
use crate::cause;
use crate::config::{HostDevice, MachineConfig, Size};

/// Looks at everything that a device needs, in the order in which it is to be put right.
pub(super) fn examine(device: &HostDevice) -> Vec<Check> {
    let found = match Found::find(&device.sysfs()) {
        Ok(found) => found,
        Err(error) => {
            let found = format!("{device}: {error}");
            return vec![no("device", found, "lspci -D lists what there is")];
        }
    };
    let mut checks = vec![is_there(&found), iommu(&found), driver(&found)];
    checks.extend(neighbours(&found));
    let way = found.way();
    checks.push(address_space(way.as_ref()));
    checks.extend(way.and_then(|way| file(&found, &way)));
    checks.push(locked_memory());
    checks
}

fn no(what: &'static str, found: impl Into<String>, remedy: impl Into<String>) -> Check {
    Check::not_ok(what, Verdict::Fatal, found, remedy)
}

fn is_there(found: &Found) -> Check {
    let kind = match &found.physical {
        Some(physical) => format!("a virtual function of {physical}"),
        None if found.mediated => "a mediated device".to_owned(),
        None => "a function of its own".to_owned(),
    };
    Check::ok("device", format!("{}: {kind}", found.name))
}

fn iommu(found: &Found) -> Check {
    match found.group {
        Some(group) => Check::ok("IOMMU group", group.to_string()),
        None => no(
            "IOMMU group",
            "none",
            "switch the IOMMU on in the firmware and boot with intel_iommu=on or amd_iommu=on",
        ),
    }
}

fn driver(found: &Found) -> Check {
    let name = found.driver.clone().unwrap_or_else(|| "none".to_owned());
    if found.is_vfios {
        Check::ok("driver", name)
    } else {
        no("driver", name, format!("as root, {}", found.how_to_bind()))
    }
}

fn neighbours(found: &Found) -> Option<Check> {
    found.group?;
    let others: Vec<_> =
        found.in_the_way.iter().map(|other| format!("{} ({})", other.name, other.driver)).collect();
    Some(if others.is_empty() {
        Check::ok("group members", "none is in the way")
    } else {
        let remedies: Vec<_> = found.in_the_way.iter().map(Neighbour::how_to_free).collect();
        let remedy = format!("as root, {}; or give them to VFIO as well", remedies.join("; "));
        no("group members", others.join(", "), remedy)
    })
}

fn address_space(way: Option<&Way>) -> Check {
    match way {
        Some(Way::Own(_)) => Check::ok("VFIO", format!("drives the IOMMU by {}", vfio::IOMMU)),
        _ => match vfio::check_container() {
            Ok(()) => Check::ok("VFIO", "drives this host's IOMMU"),
            Err(error) => with_remedy("VFIO", &cause::chain(&error)),
        },
    }
}

/// A check of an error that says what to do after a colon.
fn with_remedy(what: &'static str, error: &str) -> Check {
    let (found, remedy) = error.split_once(": ").unwrap_or((error, "see the kernel's log"));
    no(what, found, remedy)
}

fn file(found: &Found, way: &Way) -> Option<Check> {
    let what = "access";
    let group = found.group_file()?;
    // Whoever has the device, by whichever file, keeps everybody from opening its group.
    let error = match (OpenOptions::new().read(true).write(true).open(&group), way) {
        (Err(error), Way::Group(_)) => error,
        (Err(error), Way::Own(_)) if error.kind() == io::ErrorKind::ResourceBusy => error,
        (_, Way::Group(file) | Way::Own(file)) => {
            return Some(Check::ok(what, file.display().to_string()));
        }
    };
    let path = group.display();
    let remedy = match error.kind() {
        io::ErrorKind::PermissionDenied => {
            format!("as root, chown it to the user who runs uvmm: chown USER {path}")
        }
        io::ErrorKind::ResourceBusy => {
            format!("end the process that uses the device: fuser {path}")
        }
        _ => "give the device to VFIO".to_owned(),
    };
    Some(no(what, format!("cannot open {path}: {error}"), remedy))
}

fn locked_memory() -> Check {
    let what = "locked memory";
    let needed = MachineConfig::default().memory;
    let free = capabilities(None).is_ok_and(|all| all.effective.contains(CapabilitySet::IPC_LOCK));
    match getrlimit(Resource::Memlock).current {
        _ if free => Check::ok(what, "no limit for this user"),
        None => Check::ok(what, "no limit"),
        Some(limit) if limit >= needed => Check::ok(what, format!("at most {}", Size(limit))),
        Some(limit) => no(
            what,
            format!("at most {}, and a guest with a device locks all of its memory", Size(limit)),
            format!("raise it to {} or what the guest has (ulimit -l)", Size(needed)),
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_that_is_not_there_ends_the_examination() {
        let checks = examine(&"ffff:ff:1f.7".parse().unwrap());
        assert_eq!(checks.len(), 1);
        assert_eq!(checks[0].verdict, Verdict::Fatal);
        assert!(checks[0].remedy.contains("lspci"));
    }

    #[test]
    fn a_device_of_another_driver_is_told_with_the_way_to_vfio() {
        let found = Found {
            path: "/sys/devices/x".into(),
            name: "0000:01:10.0".into(),
            driver: Some("igbvf".into()),
            is_vfios: false,
            group: None,
            in_the_way: Vec::new(),
            physical: Some("0000:01:00.0".into()),
            mediated: false,
        };
        assert_eq!(is_there(&found).found, "0000:01:10.0: a virtual function of 0000:01:00.0");
        assert_eq!(iommu(&found).verdict, Verdict::Fatal);
        assert!(driver(&found).remedy.contains("drivers_probe"));
        assert_eq!(neighbours(&found), None);
        let shared = Neighbour { name: "0000:01:10.1".into(), driver: "igbvf".into() };
        let found = Found { group: Some(3), in_the_way: vec![shared], ..found };
        let neighbours = neighbours(&found).unwrap();
        assert_eq!(neighbours.found, "0000:01:10.1 (igbvf)");
        assert!(neighbours.remedy.contains("/sys/bus/pci/devices/0000:01:10.1/driver/unbind"));
    }
}
