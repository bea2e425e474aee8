//! Why a device cannot be had.

use std::io;
use std::path::PathBuf;

use vfio_ioctls::VfioError;

use super::host::{HostDevice, Neighbour, Way};

/// Why a device of the host cannot be given to the guest.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// There is no such device.
    #[error("there is no device {}: lspci -D lists what there is", path.display())]
    Missing {
        /// Where it should be.
        path: PathBuf,
        /// What the kernel says of that path.
        #[source]
        source: io::Error,
    },
    /// Another driver has it, or none.
    #[error("{name} is {}: as root, {remedy}", held_by(driver.as_deref()))]
    Driver {
        /// The device.
        name: String,
        /// Its driver.
        driver: Option<String>,
        /// What gives it to VFIO.
        remedy: String,
    },
    /// It has no IOMMU group.
    #[error(
        "{0} is in no IOMMU group: switch the IOMMU on in the firmware and boot the host with \
         intel_iommu=on or amd_iommu=on"
    )]
    NoIommu(String),
    /// Drivers of the host have others in its group.
    #[error(
        "{name} shares IOMMU group {group} with {}: as root, {}; a guest may have those as well, \
         given to VFIO",
        list(others),
        how_to_free(others)
    )]
    Shared {
        /// The device.
        name: String,
        /// The group.
        group: u32,
        /// Those others.
        others: Vec<Neighbour>,
    },
    /// Somebody else uses it.
    #[error("{name} is in use: another process has {} open", file.display())]
    Busy {
        /// The device.
        name: String,
        /// The group's file.
        file: PathBuf,
    },
    /// The user may not.
    #[error("cannot open {}: as root, chown it to the user who runs uvmm", file.display())]
    Permission {
        /// The file.
        file: PathBuf,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// The kernel's VFIO is not there.
    #[error("cannot open {}: modprobe vfio-pci", file.display())]
    NoVfio {
        /// The file.
        file: PathBuf,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// VFIO has no driver for the IOMMU.
    #[error("VFIO cannot drive this host's IOMMU: modprobe vfio_iommu_type1")]
    NoType1(#[source] VfioError),
    /// VFIO does not work.
    #[error("VFIO does not work on this host: see the kernel's log")]
    Container(#[source] VfioError),
    /// VFIO refuses the device.
    #[error("VFIO refuses {name}")]
    Refused {
        /// The device.
        name: String,
        /// Why.
        #[source]
        source: VfioError,
    },
    /// Guest memory cannot be locked for the device.
    #[error(
        "cannot lock {} MiB of guest memory for devices{}", .needed >> 20, memlock(*.limit)
    )]
    Dma {
        /// Bytes of guest memory.
        needed: u64,
        /// How many bytes this process may lock; `None` for any number.
        limit: Option<u64>,
        /// The kernel's answer.
        #[source]
        source: VfioError,
    },
    /// The device does not say what it has.
    #[error("cannot read the configuration space of {name}")]
    Config {
        /// The device.
        name: String,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// Not a device that a guest can be given.
    #[error("{name} cannot be given to a guest: {why}")]
    Unfit {
        /// The device.
        name: String,
        /// What is wrong with it.
        why: &'static str,
    },
}

fn held_by(driver: Option<&str>) -> String {
    driver.map_or("bound to no driver".into(), |driver| format!("bound to the driver {driver}"))
}

fn list(others: &[Neighbour]) -> String {
    let names = others.iter().map(|other| format!("{} ({})", other.name, other.driver));
    names.collect::<Vec<_>>().join(", ")
}

fn how_to_free(others: &[Neighbour]) -> String {
    others.iter().map(Neighbour::how_to_free).collect::<Vec<_>>().join("; ")
}

fn memlock(limit: Option<u64>) -> String {
    limit.map_or_else(String::new, |limit| {
        format!(
            ": this process may lock {} MiB, raise that (ulimit -l, or LimitMEMLOCK= of its service)",
            limit >> 20
        )
    })
}

impl Error {
    /// The error that VFIO's answer `source` to opening a container is.
    pub(super) fn of_container(source: VfioError) -> Self {
        let file = "/dev/vfio/vfio".into();
        match source {
            VfioError::OpenContainer(source) if denied(&source) => {
                Self::Permission { file, source }
            }
            VfioError::OpenContainer(source) => Self::NoVfio { file, source },
            VfioError::VfioExtension => Self::NoType1(source),
            source => Self::Container(source),
        }
    }
}

impl HostDevice {
    /// Whether VFIO can have it, as far as sysfs knows.
    ///
    /// # Errors
    /// The first thing that stands in the way.
    pub fn check(&self) -> Result<(), Error> {
        let name = || self.name.clone();
        if self.group.is_none() && !self.is_vfios {
            return Err(Error::NoIommu(name()));
        }
        if !self.is_vfios {
            let (driver, remedy) = (self.driver.clone(), self.how_to_bind());
            return Err(Error::Driver { name: name(), driver, remedy });
        }
        let Some(group) = self.group else { return Err(Error::NoIommu(name())) };
        if self.in_the_way.is_empty() {
            Ok(())
        } else {
            Err(Error::Shared { name: name(), group, others: self.in_the_way.clone() })
        }
    }

    /// The error that VFIO's answer `source` is for this device.
    pub(super) fn refused(&self, source: VfioError) -> Error {
        let file = match self.way() {
            Some(Way::Own(file) | Way::Group(file)) => file,
            None => PathBuf::new(),
        };
        let name = self.name.clone();
        match source {
            // The kernel's drivers/vfio: busy is the group, invalid a device that is open already.
            VfioError::VfioDeviceBindIommufd(source)
                if [EBUSY, EINVAL].contains(&source.errno()) =>
            {
                Error::Busy { name, file }
            }
            VfioError::OpenDeviceCdev(source) if denied(&source) => {
                Error::Permission { file, source }
            }
            VfioError::OpenGroup(source, _) if source.raw_os_error() == Some(EBUSY) => {
                Error::Busy { name, file }
            }
            VfioError::OpenGroup(source, _) if denied(&source) => {
                Error::Permission { file, source }
            }
            VfioError::OpenGroup(source, _) => Error::NoVfio { file, source },
            // The ioctl of the status says no more; sysfs was asked before.
            source => Error::Refused { name, source },
        }
    }
}

const EBUSY: i32 = rustix::io::Errno::BUSY.raw_os_error();
const EINVAL: i32 = rustix::io::Errno::INVAL.raw_os_error();

fn denied(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::PermissionDenied
}

#[cfg(test)]
mod tests {
    use super::*;

    fn device() -> HostDevice {
        HostDevice {
            path: "/sys/devices/x".into(),
            name: "0000:01:10.0".into(),
            driver: Some("vfio-pci".into()),
            is_vfios: true,
            group: Some(7),
            in_the_way: Vec::new(),
            physical: None,
            mediated: false,
        }
    }

    #[test]
    fn every_obstacle_is_named_with_its_remedy() {
        device().check().unwrap();
        let other = Neighbour { name: "0000:01:10.1".into(), driver: "igb".into() };
        for (device, says) in [
            (HostDevice { group: None, is_vfios: false, ..device() }, "intel_iommu=on"),
            (HostDevice { group: None, ..device() }, "intel_iommu=on"),
            (
                HostDevice { is_vfios: false, driver: Some("igbvf".into()), ..device() },
                "bound to the driver igbvf: as root, modprobe vfio-pci; echo vfio-pci > \
                 /sys/bus/pci/devices/0000:01:10.0/driver_override",
            ),
            (HostDevice { is_vfios: false, driver: None, ..device() }, "bound to no driver"),
            (
                HostDevice { in_the_way: vec![other], ..device() },
                "with 0000:01:10.1 (igb): as root, echo 0000:01:10.1 > \
                 /sys/bus/pci/devices/0000:01:10.1/driver/unbind",
            ),
        ] {
            let error = device.check().unwrap_err().to_string();
            assert!(error.contains(says) && !error.contains('\n'), "{error}");
        }
    }

    #[test]
    fn what_vfio_answers_is_understood() {
        let error = |errno: rustix::io::Errno| io::Error::from_raw_os_error(errno.raw_os_error());
        let group = |errno| device().refused(VfioError::OpenGroup(error(errno), "7".into()));
        assert!(matches!(group(rustix::io::Errno::BUSY), Error::Busy { .. }));
        assert!(matches!(group(rustix::io::Errno::ACCESS), Error::Permission { .. }));
        assert!(matches!(group(rustix::io::Errno::NOENT), Error::NoVfio { .. }));
        for errno in [EBUSY, EINVAL] {
            let bind = VfioError::VfioDeviceBindIommufd(vmm_sys_util::errno::Error::new(errno));
            assert!(matches!(device().refused(bind), Error::Busy { .. }));
        }
        let container = VfioError::OpenContainer(error(rustix::io::Errno::NOENT));
        let text = Error::of_container(container).to_string();
        assert_eq!(text, "cannot open /dev/vfio/vfio: modprobe vfio-pci");
        let text = Error::of_container(VfioError::VfioExtension).to_string();
        assert!(text.ends_with("modprobe vfio_iommu_type1"), "{text}");
    }
}
