//! The smallest machine that the tiny guest runs on: RAM, one vCPU, COM1, two power ports.
// UNSAFETY: handing memory to KVM is unsafe by nature.
#![expect(unsafe_code, reason = "KVM_SET_USER_MEMORY_REGION")]

use std::collections::VecDeque;
use std::io::Cursor;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use kvm_bindings::{
    KVM_MAX_CPUID_ENTRIES, kvm_regs, kvm_segment, kvm_userspace_memory_region as Region,
};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use linux_loader::loader::elf::PvhBootCapability;
use linux_loader::loader::elf::start_info::{hvm_memmap_table_entry, hvm_start_info};
use linux_loader::loader::{Elf, KernelLoader};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

/// The machine's memory.
pub(crate) type Memory = vm_memory::GuestMemoryMmap<()>;

const START_INFO: GuestAddress = GuestAddress(0x6000);
const MEMORY_MAP: GuestAddress = GuestAddress(0x7000);
const COMMAND_LINE: GuestAddress = GuestAddress(0x20000);
const START_INFO_MAGIC: u32 = 0x336e_c578;

const DATA: u16 = 0x3f8;
const LINE_CONTROL: u16 = 0x3fb;
const DIVISOR_LATCH: u8 = 0x80;
const LINE_STATUS: u16 = 0x3fd;
const DATA_READY: u8 = 0x01;
const TRANSMITTER_EMPTY: u8 = 0x60;

/// How the guest came to its end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum End {
    /// By port 0x604.
    Poweroff,
    /// By port 0xcf9.
    Reset,
    /// A triple fault.
    Shutdown,
    /// An exit that this machine does not know.
    Other(String),
}

#[derive(Default)]
struct Line {
    input: VecDeque<u8>,
    output: String,
    divisor_latch: bool,
    read: usize,
    end: Option<End>,
}

#[derive(Default)]
struct Serial {
    line: Mutex<Line>,
    changed: Condvar,
}

/// A running tiny guest.
pub(crate) struct Machine {
    pub(crate) memory: Memory,
    serial: Arc<Serial>,
    vcpu: Option<JoinHandle<()>>,
    _vm: VmFd,
}

/// Says why there is no KVM to run on, if so.
pub(crate) fn kvm() -> Option<Kvm> {
    match Kvm::new() {
        Ok(kvm) => Some(kvm),
        Err(why) => {
            eprintln!("skipped: /dev/kvm cannot be used: {why}");
            None
        }
    }
}

impl Machine {
    /// Boots the tiny guest with `mib` MiB of RAM.
    pub(crate) fn boot(kvm: &Kvm, mib: usize, command_line: &str) -> Machine {
        Machine::boot_with(kvm, &[(GuestAddress(0), mib << 20)], command_line)
    }

    /// Boots the tiny guest with RAM where `ranges` says.
    pub(crate) fn boot_with(
        kvm: &Kvm,
        ranges: &[(GuestAddress, usize)],
        command_line: &str,
    ) -> Machine {
        let memory = Memory::from_ranges(ranges).expect("memory");
        let vm = kvm.create_vm().expect("a VM");
        for (slot, region) in memory.iter().enumerate() {
            let region = Region {
                slot: slot.try_into().expect("few slots"),
                flags: 0,
                guest_phys_addr: region.start_addr().0,
                memory_size: region.len(),
                userspace_addr: memory.get_host_address(region.start_addr()).expect("RAM") as u64,
            };
            // SAFETY: `memory` stays mapped as long as the machine, which owns both.
            unsafe { vm.set_user_memory_region(region) }.expect("a memory slot");
        }
        let entry = load(&memory, ranges, command_line);
        let vcpu = vm.create_vcpu(0).expect("a vCPU");
        vcpu.set_cpuid2(&kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).expect("CPUID"))
            .expect("CPUID");
        enter_pvh(&vcpu, entry);
        let serial = Arc::new(Serial::default());
        let guest_side = Arc::clone(&serial);
        let vcpu = thread::Builder::new()
            .name("vcpu".into())
            .spawn(move || guest_side.finish(run(vcpu, &guest_side)))
            .expect("a thread");
        Machine { memory, serial, vcpu: Some(vcpu), _vm: vm }
    }

    /// Types one line.
    pub(crate) fn command(&self, text: &str) {
        self.serial.lock().input.extend(text.bytes().chain([b'\r']));
    }

    /// Waits for a line that starts with `start`, after those that were read before.
    pub(crate) fn expect(&self, start: &str) -> String {
        let until = Instant::now() + Duration::from_secs(120);
        let mut line = self.serial.lock();
        loop {
            while let Some(length) = line.output[line.read..].find("\r\n") {
                let text = line.output[line.read..line.read + length].to_owned();
                line.read += length + 2;
                if text.starts_with(start) {
                    return text;
                }
            }
            let left = until.saturating_duration_since(Instant::now());
            assert!(line.end.is_none(), "no {start:?}, but {:?}: {}", line.end, line.output);
            assert!(!left.is_zero(), "no {start:?} in time: {:?}", line.output);
            line = self.serial.changed.wait_timeout(line, left).expect("a lock").0;
        }
    }

    /// Types a command and waits for the line that starts with `answer`.
    pub(crate) fn ask(&self, command: &str, answer: &str) -> String {
        self.command(command);
        self.expect(answer)
    }

    /// Keeps the guest from running for `time`, from its next look at the serial line on.
    pub(crate) fn hold(&self, time: Duration) {
        let line = self.serial.lock();
        thread::sleep(time);
        drop(line);
    }

    /// Types a last command and says how the guest ended.
    pub(crate) fn end(mut self, command: &str) -> End {
        self.command(command);
        self.vcpu.take().expect("it runs").join().expect("the vCPU thread");
        self.serial.lock().end.clone().expect("an end")
    }
}

impl Drop for Machine {
    /// The guest reads the line status all the time and so comes by.
    fn drop(&mut self) {
        self.serial.finish(End::Other("dropped".into()));
        if let Some(vcpu) = self.vcpu.take() {
            let _ = vcpu.join();
        }
    }
}

impl Serial {
    /// A test that fails must not take the vCPU's thread with it.
    fn lock(&self) -> MutexGuard<'_, Line> {
        self.line.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn finish(&self, end: End) {
        self.lock().end.get_or_insert(end);
        self.changed.notify_all();
    }

    fn read(&self, port: u16, data: &mut [u8]) {
        let mut line = self.lock();
        data[0] = match port {
            DATA => line.input.pop_front().unwrap_or(0),
            LINE_STATUS if line.input.is_empty() => TRANSMITTER_EMPTY,
            LINE_STATUS => TRANSMITTER_EMPTY | DATA_READY,
            _ => 0xff,
        };
    }

    fn write(&self, port: u16, byte: u8) {
        let mut line = self.lock();
        match port {
            LINE_CONTROL => line.divisor_latch = byte & DIVISOR_LATCH != 0,
            DATA if !line.divisor_latch => line.output.push(byte.into()),
            _ => return,
        }
        if byte == b'\n' {
            self.changed.notify_all();
        }
    }
}

fn load(memory: &Memory, ranges: &[(GuestAddress, usize)], command_line: &str) -> GuestAddress {
    let mut image = Cursor::new(resources::TINY_GUEST);
    let loaded = Elf::load(memory, None, &mut image, Some(GuestAddress(0x10_0000))).expect("ELF");
    let PvhBootCapability::PvhEntryPresent(entry) = loaded.pvh_boot_cap else {
        panic!("no PVH note: {}", loaded.pvh_boot_cap);
    };
    let mut at = MEMORY_MAP;
    for (start, size) in ranges {
        let map = hvm_memmap_table_entry {
            addr: start.0,
            size: *size as u64,
            type_: 1,
            ..hvm_memmap_table_entry::default()
        };
        memory.write_obj(map, at).expect("RAM");
        at.0 += size_of::<hvm_memmap_table_entry>() as u64;
    }
    memory.write_slice(command_line.as_bytes(), COMMAND_LINE).expect("RAM");
    let start_info = hvm_start_info {
        magic: START_INFO_MAGIC,
        version: 1,
        cmdline_paddr: COMMAND_LINE.0,
        memmap_paddr: MEMORY_MAP.0,
        memmap_entries: ranges.len().try_into().expect("few ranges"),
        ..hvm_start_info::default()
    };
    memory.write_obj(start_info, START_INFO).expect("RAM");
    entry
}

/// 32-bit protected mode, flat segments, paging off, ebx = start_info.
fn enter_pvh(vcpu: &VcpuFd, entry: GuestAddress) {
    let flat = |selector, type_| kvm_segment {
        limit: 0xffff_ffff,
        selector,
        type_,
        present: 1,
        db: 1,
        s: 1,
        g: 1,
        ..kvm_segment::default()
    };
    let mut sregs = vcpu.get_sregs().expect("segment registers");
    let data = flat(0x10, 3);
    (sregs.cs, sregs.ds, sregs.es, sregs.ss) = (flat(8, 11), data, data, data);
    sregs.cr0 = 1;
    sregs.cr4 = 0;
    sregs.efer = 0;
    vcpu.set_sregs(&sregs).expect("segment registers");
    let regs = kvm_regs { rip: entry.0, rbx: START_INFO.0, rflags: 2, ..kvm_regs::default() };
    vcpu.set_regs(&regs).expect("registers");
}

fn run(mut vcpu: VcpuFd, serial: &Serial) -> End {
    loop {
        match vcpu.run() {
            Ok(VcpuExit::IoIn(port, data)) => serial.read(port, data),
            Ok(VcpuExit::IoOut(0x604, [0x00, 0x34])) => return End::Poweroff,
            Ok(VcpuExit::IoOut(0xcf9, [6])) => return End::Reset,
            Ok(VcpuExit::IoOut(port, data)) => serial.write(port, data[0]),
            Ok(VcpuExit::Shutdown) => return End::Shutdown,
            Ok(other) => return End::Other(format!("{other:?}")),
            Err(why) if why.errno() == rustix::io::Errno::INTR.raw_os_error() => {}
            Err(why) => return End::Other(why.to_string()),
        }
        let end = serial.lock().end.clone();
        if let Some(end) = end {
            return end;
        }
    }
}
