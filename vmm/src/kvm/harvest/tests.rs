//! Guests of four instructions that write to one page after the other.

use std::collections::BTreeSet;

use kvm_bindings::{KVM_EXIT_DIRTY_RING_FULL, KVM_MP_STATE_RUNNABLE, kvm_mp_state};
use kvm_ioctls::VcpuExit;
use vm_memory::Bytes;

use super::*;
use crate::config::DirtyTracking;
use crate::memory;

const CODE: u64 = 0x1000;
/// `1: mov [edi], al; add edi, 0x1000; loop 1b; out 0x10, al`
const PROGRAM: [u8; 12] = [0x88, 0x07, 0x81, 0xc7, 0x00, 0x10, 0, 0, 0xe2, 0xf6, 0xe6, 0x10];
/// Where vCPUs write: the page at 1 MiB, and the one at 90 MiB.
const LOW: u64 = 256;
const HIGH: u64 = 23_040;
/// A processor that enters a guest may write to a few pages of its own account.
const OWN: u64 = 8;

struct Guest {
    vm: Vm,
    vcpus: Vec<VcpuFd>,
}

impl Guest {
    /// A guest with so many vCPUs, of 96 MiB, of which a log is kept in rings.
    fn new(vcpus: u8) -> Option<Self> {
        let ram = memory::allocate(96 << 20, None).unwrap();
        ram.write_slice(&PROGRAM, GuestAddress(CODE)).unwrap();
        let vm = match Vm::new(ram, DirtyTracking::Ring) {
            Ok(vm) => vm,
            Err(error) => {
                eprintln!("skipped: no KVM with dirty rings: {error}");
                return None;
            }
        };
        let vcpus = (0..vcpus).map(|index| vm.create_vcpu(index).unwrap()).collect();
        vm.log_dirty_pages(true).unwrap();
        Some(Self { vm, vcpus })
    }

    /// Has a vCPU write `count` pages from the page `first` on; gives how often its ring was full.
    fn write(&mut self, vcpu: usize, first: u64, count: u64) -> usize {
        let (vm, vcpu) = (&self.vm, &mut self.vcpus[vcpu]);
        begin(vcpu, first * PAGE, count);
        let mut full = 0;
        loop {
            match vcpu.run() {
                Ok(VcpuExit::IoOut(0x10, _)) => return full,
                Ok(VcpuExit::Unsupported(KVM_EXIT_DIRTY_RING_FULL)) => {
                    full += 1;
                    assert!(full < 100, "it is not emptied");
                    drop(vm.harvest().unwrap());
                }
                Ok(VcpuExit::Intr) => {}
                Err(error) if error.errno() == libc::EINTR => {}
                other => panic!("{other:?}"),
            }
        }
    }

    /// What was written since the last time, and by whom.
    fn written(&self) -> (BTreeSet<u64>, Vec<u64>) {
        let mut pages = PageBitmap::empty(self.vm.ram());
        let mut harvest = self.vm.harvest().unwrap();
        harvest.take(&mut pages).unwrap();
        let first = |address: GuestAddress| address.0 / PAGE;
        let pages = pages
            .runs()
            .flat_map(|run| (0..run.len / PAGE).map(move |page| first(run.start) + page));
        (pages.filter(|&page| page >= LOW).collect(), harvest.take_counts())
    }
}

/// Puts a vCPU at the program, in protected mode with flat segments.
fn begin(vcpu: &VcpuFd, address: u64, count: u64) {
    let mut sregs = vcpu.get_sregs().unwrap();
    sregs.cr0 |= 1;
    for (segment, kind) in [(&mut sregs.cs, 0xb), (&mut sregs.ds, 3), (&mut sregs.ss, 3)] {
        (segment.base, segment.limit, segment.selector) = (0, u32::MAX, 8);
        (segment.present, segment.s, segment.db, segment.g) = (1, 1, 1, 1);
        segment.type_ = kind;
    }
    vcpu.set_sregs(&sregs).unwrap();
    let mut regs = vcpu.get_regs().unwrap();
    (regs.rip, regs.rflags, regs.rdi, regs.rcx) = (CODE, 2, address, count);
    vcpu.set_regs(&regs).unwrap();
    vcpu.set_mp_state(kvm_mp_state { mp_state: KVM_MP_STATE_RUNNABLE }).unwrap();
}

fn assert_about(counts: &[u64], expected: &[u64]) {
    let about = |(&count, &least): (&u64, &u64)| (least..=least + OWN).contains(&count);
    let all = counts.len() == expected.len() && counts.iter().zip(expected).all(about);
    assert!(all, "{counts:?} are not {expected:?}");
}

#[test]
fn each_page_that_two_vcpus_wrote_is_told_of_once_and_who_wrote_it() {
    let Some(mut guest) = Guest::new(2) else { return };
    guest.write(0, LOW, 300);
    guest.write(1, HIGH, 200);
    guest.write(0, LOW, 300);
    let (pages, by_vcpu) = guest.written();
    assert_eq!(pages, (LOW..LOW + 300).chain(HIGH..HIGH + 200).collect());
    assert_about(&by_vcpu, &[300, 200]);
    assert_eq!(guest.written().0, BTreeSet::new());
    guest.write(1, LOW, 7);
    let (pages, by_vcpu) = guest.written();
    assert_eq!(pages, (LOW..LOW + 7).collect(), "what was told of is watched again");
    assert_about(&by_vcpu, &[0, 7]);
}

#[test]
fn nothing_is_lost_when_a_ring_is_full() {
    let Some(mut guest) = Guest::new(1) else { return };
    let full = guest.write(0, LOW, 20_000);
    assert!(full > 0, "a ring has 16,384 entries");
    // A KVM that is software may have lost some: then all memory counts as written.
    let (pages, _) = guest.written();
    assert!((LOW..LOW + 20_000).all(|page| pages.contains(&page)), "{} pages", pages.len());
    for _ in 0..3 {
        guest.write(0, HIGH, 100);
        let (pages, by_vcpu) = guest.written();
        assert!((HIGH..HIGH + 100).all(|page| pages.contains(&page)), "{} pages", pages.len());
        assert_about(&by_vcpu, &[100]);
    }
}

#[test]
fn what_is_forgotten_is_told_of_when_it_is_written_again() {
    let Some(mut guest) = Guest::new(1) else { return };
    guest.write(0, LOW, 128);
    let window =
        Window { start: GuestAddress((LOW + 64) * PAGE), pages: 64, words: &[u64::MAX << 1] };
    guest.vm.harvest().unwrap().forget(&window);
    assert_eq!(guest.written().0, (LOW..=LOW + 64).collect());
    guest.write(0, LOW + 60, 10);
    assert_eq!(guest.written().0, (LOW + 60..LOW + 70).collect());
}

#[test]
fn nothing_is_told_of_while_the_log_is_off() {
    let Some(mut guest) = Guest::new(1) else { return };
    guest.write(0, LOW, 5);
    guest.vm.log_dirty_pages(false).unwrap();
    guest.write(0, HIGH, 5);
    guest.vm.harvest().unwrap().clear();
    guest.vm.log_dirty_pages(true).unwrap();
    assert_eq!(guest.written(), (BTreeSet::new(), vec![0]));
    guest.write(0, HIGH, 3);
    assert_eq!(guest.written().0, (HIGH..HIGH + 3).collect());
}

#[test]
fn a_page_that_there_is_not_is_an_error_and_none_is_missed_in_silence() {
    let ram = memory::allocate(16 << 20, None).unwrap();
    assert_eq!(ram.num_regions(), 1);
    let pages = (16 << 20) / PAGE;
    for (slot, page) in [(0, pages), (0, u64::MAX), (1, 0), (1 << 16, 0)] {
        let mut log = Log::of(&ram);
        log.by_vcpu.push(0);
        log.note(0, slot, page);
        log.note(0, 0, pages - 1);
        let mut harvest = Harvest { rings: Vec::new(), log };
        let mut told = PageBitmap::empty(&ram);
        let error = harvest.take(&mut told).unwrap_err().to_string();
        assert!(error.contains(&format!("page {page} of memory slot {slot}")), "{error}");
        assert_eq!((told.count(), harvest.take_counts()), (1, vec![1]));
        harvest.take(&mut told).unwrap();
    }
}

#[test]
fn a_ring_is_as_large_as_kvm_lets_it_be_and_worth_having() {
    assert_eq!(size(1 << 20), Some(RING));
    assert_eq!(size((64 << 10) + 5), Some(64 << 10), "a power of two");
    assert_eq!(size(16 << 10), Some(LEAST_RING));
    for none in [i32::MIN, -1, 0, 1, (16 << 10) - 1] {
        assert_eq!(size(none), None, "{none}");
    }
}
