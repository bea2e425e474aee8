//! What the rest of the network sees of a guest that moves: pings that stay unanswered, and a
//! transfer that takes it.
mod breaking;
mod bulk;
mod exchange;
mod ping;
mod relay;

use std::net::Ipv4Addr;
use std::process::Command;

pub use breaking::{Breaking, Fault, Place, Way, Word};
pub use bulk::Bulk;
pub use ping::{Answers, Pinger};
pub use relay::Relay;

use crate::error::{Error, Result};
use crate::program;
use crate::vm::{Vm, text};

/// The guest's own address in the lab.
pub const GUEST_IP: Ipv4Addr = Ipv4Addr::new(10, 7, 0, 2);

/// What tells why the network of a guest, or of a host, does not work.
const WHY: &str = "dmesg | tail -n 20; grep -E 'CPU|eth|vfio|virtio' /proc/interrupts; \
                   cat /proc/net/dev";

/// Loads the guest driver, for [`Vm::joins_network_after`].
pub const GUEST_DRIVER: &str = "insmod /modules/uvmm_bridge.ko &&";

impl Vm {
    /// Gives the guest's one NIC its address, and reaches the rest of the network by it.
    ///
    /// # Errors
    /// If there is no NIC, or no way out.
    pub fn joins_network(&mut self) -> Result<()> {
        self.until("[ -d /sys/class/net/eth0 ]")?;
        self.says(&format!("ip link set eth0 up && ip address replace {GUEST_IP}/24 dev eth0"))?;
        self.until("grep -q 1 /sys/class/net/eth0/carrier")?;
        self.pings()
    }

    /// Loads the driver of a virtual function after what `first` does, and joins the network.
    ///
    /// # Errors
    /// As [`Vm::joins_network`]; or if a driver does not load.
    pub fn joins_network_after(&mut self, first: &str) -> Result<()> {
        self.says(&format!("{first} insmod /modules/igbvf.ko"))?;
        self.joins_network()
    }

    /// Joins the network as `own` by the NIC in `slot`, and by no other; gives its name.
    ///
    /// # Errors
    /// If there is no NIC, or no way out.
    pub fn joins_network_by(&mut self, slot: u8, own: Ipv4Addr) -> Result<String> {
        let place = format!("/sys/bus/pci/devices/0000:01:{slot:02x}.0/net");
        self.until(&format!("[ -d {place} ]"))?;
        let name = self.says(&format!("ls {place}"))?;
        let down = "for nic in /sys/class/net/eth*; do ip link set ${nic##*/} down; done; true";
        self.says(down)?;
        self.says(&format!("ip link set {name} up && ip address replace {own}/24 dev {name}"))?;
        // There is a link some time after the NIC came up.
        let reached = format!("ping -c 1 -W 1 {} > /dev/null", text("PEER_IP")?);
        let why = format!("{WHY}; ip address; ip neigh; exit 1");
        match self.says(&format!("for i in $(seq 40); do {reached} && exit 0; done; {why}")) {
            Ok(_) => Ok(name),
            Err(error) => {
                let host = program::run(Command::new("sh").args(["-c", WHY]));
                Err(Error::Guest(format!("{error}\nand the lab host: {host:?}")))
            }
        }
    }

    /// Reaches the rest of the network. An emulated one that is busy loses a packet now and then.
    ///
    /// # Errors
    /// If it does not.
    pub fn pings(&mut self) -> Result<()> {
        self.says(&format!("ping -c 5 -i 0.2 -W 5 {}", text("PEER_IP")?)).map(drop)
    }
}

/// A virtual function that has the Ethernet address of another for as long as this lives, as the
/// operator of a destination sees to; then its own again.
#[derive(Debug)]
pub struct Alias {
    owner: String,
    number: u8,
    own: String,
}

impl Alias {
    /// Gives function `number` of the physical function that the variable `owner` names the address
    /// of its counterpart on `PF0`.
    ///
    /// # Errors
    /// If the physical function does not take it.
    pub fn give(owner: &str, number: u8) -> Result<Self> {
        let owner = text(owner)?;
        let own = address(&owner, number)?;
        set(&owner, number, &address(&text("PF0")?, number)?)?;
        Ok(Self { owner, number, own })
    }
}

impl Drop for Alias {
    fn drop(&mut self) {
        drop(set(&self.owner, self.number, &self.own));
    }
}

fn set(owner: &str, number: u8, address: &str) -> Result<()> {
    let number = number.to_string();
    let mut command = Command::new("ip");
    program::run(command.args(["link", "set", owner, "vf", &number, "mac", address])).map(drop)
}

/// The Ethernet address that `owner` gave to its function `number`.
fn address(owner: &str, number: u8) -> Result<String> {
    let listing = program::run(Command::new("ip").args(["link", "show", owner]))?;
    let prefix = format!("vf {number} ");
    let line = listing.lines().find_map(|line| line.trim().strip_prefix(&*prefix));
    let word = line.and_then(|line| line.split_whitespace().nth(1));
    let missing = || Error::Unsupported(format!("{owner} has no virtual function {number}"));
    word.map(str::to_owned).ok_or_else(missing)
}
