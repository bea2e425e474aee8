//! What sysfs says of a device: whether VFIO can have it, and what stands in the way.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use rustix::fs::{Access, access};

/// A device of the host, as sysfs has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostDevice {
    /// Its directory in sysfs, without symbolic links.
    pub path: PathBuf,
    /// Its address, or a mediated device's UUID.
    pub name: String,
    /// The driver that has it.
    pub driver: Option<String>,
    /// Whether VFIO has it.
    pub is_vfios: bool,
    /// Its IOMMU group.
    pub group: Option<u32>,
    /// The others in its group that keep VFIO from having it, with their drivers.
    pub in_the_way: Vec<Neighbour>,
    /// The physical function that it is a virtual function of.
    pub physical: Option<String>,
    /// Whether it is a mediated device and not a PCI function.
    pub mediated: bool,
}

/// How the kernel's VFIO gives a device, by the file that is opened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Way {
    /// By the file of its group, into a container (the kernel's `driver-api/vfio.rst`).
    Group(PathBuf),
    /// By a file of its own, into an address space of [`IOMMU`] (there, "VFIO Device cdev").
    Own(PathBuf),
}

/// Where address spaces are made that devices are given into by files of their own.
pub const IOMMU: &str = "/dev/iommu";

/// Another device in the same IOMMU group, which a driver of the host has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Neighbour {
    /// Its address.
    pub name: String,
    /// Its driver.
    pub driver: String,
}

impl Neighbour {
    /// What takes it from its driver: a command for root's shell.
    #[must_use]
    pub fn how_to_free(&self) -> String {
        let name = &self.name;
        format!("echo {name} > /sys/bus/pci/devices/{name}/driver/unbind")
    }
}

/// Bridges may stay with these: they let go of DMA, or do none (`driver_managed_dma` in the
/// kernel's source, which shpchp does not set).
const HARMLESS: [&str; 2] = ["pcieport", "pci-stub"];

impl HostDevice {
    /// Looks at the device in the directory `path`.
    ///
    /// # Errors
    /// There is no such device.
    pub fn find(path: &Path) -> io::Result<Self> {
        let path = fs::canonicalize(path)?;
        let is_device = path.join("subsystem").exists() || path.join("uevent").exists();
        let name = path.file_name().filter(|_| is_device).ok_or(io::ErrorKind::NotFound)?;
        let driver = link(&path, "driver");
        let named_so = driver.as_deref().is_some_and(|driver| driver.contains("vfio"));
        let registered =
            fs::read_dir(path.join("vfio-dev")).is_ok_and(|mut entries| entries.next().is_some());
        let name = name.to_string_lossy().into_owned();
        Ok(Self {
            is_vfios: named_so || registered,
            group: link(&path, "iommu_group").and_then(|group| group.parse().ok()),
            in_the_way: neighbours(&path, &name),
            physical: link(&path, "physfn"),
            mediated: link(&path, "subsystem").as_deref() == Some("mdev"),
            driver,
            name,
            path,
        })
    }

    /// The file that the group is opened by.
    #[must_use]
    pub fn group_file(&self) -> Option<PathBuf> {
        self.group.map(|group| Path::new("/dev/vfio").join(group.to_string()))
    }

    /// How this user gets the device: by its own file where the host has that and the user may, by
    /// its group's otherwise. `None` if VFIO does not have it.
    #[must_use]
    pub fn way(&self) -> Option<Way> {
        let may = |path: &Path| access(path, Access::READ_OK | Access::WRITE_OK).is_ok();
        let own = self.own_file().filter(|file| may(file) && may(Path::new(IOMMU)));
        own.map(Way::Own).or_else(|| self.group_file().map(Way::Group))
    }

    /// The file that it alone is opened by; this host may have none.
    fn own_file(&self) -> Option<PathBuf> {
        let entry = fs::read_dir(self.path.join("vfio-dev")).ok()?.next()?.ok()?;
        Some(Path::new("/dev/vfio/devices").join(entry.file_name()))
    }

    /// What gives a PCI function to VFIO: commands for root's shell.
    #[must_use]
    pub fn how_to_bind(&self) -> String {
        how_to_bind(&self.name, self.driver.is_some())
    }
}

/// What gives the PCI function `name` to VFIO: commands for root's shell.
fn how_to_bind(name: &str, bound: bool) -> String {
    let device = format!("/sys/bus/pci/devices/{name}");
    let unbind =
        if bound { format!("echo {name} > {device}/driver/unbind; ") } else { String::new() };
    format!(
        "modprobe vfio-pci; echo vfio-pci > {device}/driver_override; {unbind}\
         echo {name} > /sys/bus/pci/drivers_probe"
    )
}

/// The last part of where the symbolic link `name` leads.
fn link(path: &Path, name: &str) -> Option<String> {
    let target = fs::read_link(path.join(name)).ok()?;
    Some(target.file_name()?.to_string_lossy().into_owned())
}

fn neighbours(path: &Path, own: &str) -> Vec<Neighbour> {
    let Ok(entries) = fs::read_dir(path.join("iommu_group/devices")) else { return Vec::new() };
    let neighbour = |entry: io::Result<fs::DirEntry>| {
        let entry = entry.ok()?;
        let name = entry.file_name().to_string_lossy().into_owned();
        let driver = link(&fs::canonicalize(entry.path()).ok()?, "driver")?;
        let harmless = driver.contains("vfio") || HARMLESS.contains(&driver.as_str());
        (name != own && !harmless).then_some(Neighbour { name, driver })
    };
    let mut found: Vec<_> = entries.filter_map(neighbour).collect();
    found.sort_by(|a, b| a.name.cmp(&b.name));
    found
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    /// A sysfs of three functions in one group: the first is a virtual function with `driver`.
    fn sysfs(driver: Option<&str>) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        let at = |path: &str| root.path().join(path);
        for dir in
            ["bus/pci", "drivers/igb", "drivers/vfio-pci", "drivers/pcieport", "groups/7/devices"]
        {
            fs::create_dir_all(at(dir)).unwrap();
        }
        let drivers = [driver, Some("igb"), Some("pcieport")];
        for (function, driver) in ["01:10.0", "01:10.1", "00:01.0"].iter().zip(drivers) {
            let device = at("devices").join(function);
            fs::create_dir_all(&device).unwrap();
            symlink(at("bus/pci"), device.join("subsystem")).unwrap();
            symlink(at("groups/7"), device.join("iommu_group")).unwrap();
            symlink(&device, at("groups/7/devices").join(function)).unwrap();
            if let Some(driver) = driver {
                symlink(at("drivers").join(driver), device.join("driver")).unwrap();
            }
        }
        symlink(at("devices/01:10.1"), at("devices/01:10.0/physfn")).unwrap();
        root
    }

    fn found(root: &tempfile::TempDir) -> HostDevice {
        HostDevice::find(&root.path().join("devices/01:10.0")).unwrap()
    }

    #[test]
    fn sysfs_tells_the_driver_the_group_and_who_is_in_the_way() {
        let root = sysfs(Some("vfio-pci"));
        let device = found(&root);
        assert!(device.is_vfios && !device.mediated);
        assert_eq!(device.driver.as_deref(), Some("vfio-pci"));
        assert_eq!(device.group, Some(7));
        assert_eq!(device.group_file().unwrap(), Path::new("/dev/vfio/7"));
        assert_eq!(device.physical.as_deref(), Some("01:10.1"));
        let neighbour = Neighbour { name: "01:10.1".into(), driver: "igb".into() };
        assert_eq!(device.in_the_way, [neighbour], "a bridge may stay");
    }

    #[test]
    fn a_function_of_another_driver_says_how_to_bind_it() {
        let device = found(&sysfs(Some("igb")));
        assert!(!device.is_vfios);
        assert!(
            device
                .how_to_bind()
                .contains("echo 01:10.0 > /sys/bus/pci/devices/01:10.0/driver/unbind")
        );
        let free = found(&sysfs(None));
        assert!(!free.is_vfios && !free.how_to_bind().contains("unbind"));
    }

    #[test]
    fn a_variant_driver_counts_as_vfio_by_what_it_registered() {
        let root = sysfs(Some("igb"));
        fs::create_dir_all(root.path().join("devices/01:10.0/vfio-dev/vfio0")).unwrap();
        assert!(found(&root).is_vfios);
    }

    #[test]
    fn a_device_without_a_file_that_this_user_may_open_is_had_by_its_group() {
        let root = sysfs(Some("vfio-pci"));
        let group = Some(Way::Group("/dev/vfio/7".into()));
        assert_eq!(found(&root).way(), group);
        fs::create_dir_all(root.path().join("devices/01:10.0/vfio-dev/vfio987")).unwrap();
        let own = found(&root).own_file().unwrap();
        assert_eq!(own, Path::new("/dev/vfio/devices/vfio987"));
        assert_eq!(found(&root).way(), group, "there is no such file");
    }

    #[test]
    fn what_is_no_device_is_not_found() {
        let root = sysfs(None);
        for path in ["devices/02:00.0", "groups/7/devices", ""] {
            assert!(HostDevice::find(&root.path().join(path)).is_err(), "{path}");
        }
    }
}
