//! The tiny guest on this host's KVM: it does what its commands say and finds what is broken.

mod machine;

use std::process::Command;

use machine::{End, Machine, kvm};
use vm_memory::{Bytes, GuestAddress};

const MIB: u64 = 1 << 20;

/// The number behind `key=` in an answer.
fn value(line: &str, key: &str) -> u64 {
    let word = line.split(' ').find_map(|word| word.strip_prefix(key)?.strip_prefix('='));
    let word = word.unwrap_or_else(|| panic!("no {key} in {line:?}"));
    let hex = word.strip_prefix("0x").map(|digits| u64::from_str_radix(digits, 16));
    hex.unwrap_or_else(|| word.parse()).unwrap_or_else(|why| panic!("{line:?}: {why}"))
}

fn first_word_in(machine: &Machine, page: u64) -> GuestAddress {
    (page..page + 4096)
        .step_by(8)
        .map(GuestAddress)
        .find(|at| machine.memory.read_obj::<u64>(*at).expect("RAM") != 0)
        .expect("the page holds something")
}

#[test]
fn the_banner_counts_the_memory_and_help_lists_the_commands() {
    let Some(kvm) = kvm() else { return };
    let machine = Machine::boot(&kvm, 64, "");
    let banner = machine.expect("uvmm tiny guest:");
    assert_eq!(value(&banner, "mib"), 62);
    machine.ask("help", "verify ");
    assert_eq!(machine.ask("poweron", "error:"), "error: unknown command: type help");
    assert_eq!(machine.end("poweroff"), End::Poweroff);
}

#[test]
fn a_filled_memory_verifies_and_a_word_changed_after_is_noticed() {
    let Some(kvm) = kvm() else { return };
    let machine = Machine::boot(&kvm, 64, "");
    assert!(machine.ask("verify", "error:").contains("fill first"));
    let pages = value(&machine.ask("fill 7", "fill ok"), "pages");
    assert_eq!(value(&machine.ask("verify", "verify ok"), "pages"), pages);

    let page = 32 * MIB;
    let at = first_word_in(&machine, page);
    let good: u64 = machine.memory.read_obj(at).unwrap();
    machine.memory.write_obj(good ^ 1 << 40, at).unwrap();
    let verdict = machine.ask("verify", "verify FAILED");
    assert_eq!(value(&verdict, "page") + value(&verdict, "offset"), at.0, "{verdict}");
    assert_eq!(value(&verdict, "want"), good);
    assert_eq!(value(&verdict, "have"), good ^ 1 << 40);
    assert_eq!(value(&verdict, "bad"), 1);

    machine.memory.write_obj(good, at).unwrap();
    machine.ask("verify", "verify ok");
}

#[test]
fn two_pages_that_changed_places_are_noticed() {
    let Some(kvm) = kvm() else { return };
    let machine = Machine::boot(&kvm, 64, "run=fill 7");
    machine.expect("fill ok");
    let pages = [GuestAddress(40 * MIB), GuestAddress(41 * MIB)];
    let [mut one, mut other] = [[0; 4096]; 2];
    machine.memory.read_slice(&mut one, pages[0]).unwrap();
    machine.memory.read_slice(&mut other, pages[1]).unwrap();
    machine.memory.write_slice(&other, pages[0]).unwrap();
    machine.memory.write_slice(&one, pages[1]).unwrap();
    assert_eq!(value(&machine.ask("verify", "verify FAILED"), "bad"), 2);
}

#[test]
fn a_page_of_an_older_generation_is_noticed() {
    let Some(kvm) = kvm() else { return };
    let machine = Machine::boot(&kvm, 64, "run=fill 3;rewrite 8 max");
    machine.expect("rewrite ok");
    while value(&machine.ask("status", "status"), "passes") < 2 {}
    machine.ask("verify", "verify ok");
    machine.ask("stop", "stop ok");
    machine.ask("verify", "verify ok");

    // Any page from 4 to 8 MiB lies in the set.
    let mut old = [0; 4096];
    machine.memory.read_slice(&mut old, GuestAddress(4 * MIB)).unwrap();
    let before = value(&machine.ask("status", "status"), "passes");
    machine.ask("rewrite 8 max", "rewrite ok");
    while value(&machine.ask("status", "status"), "passes") < before + 2 {}
    machine.ask("stop", "stop ok");
    machine.ask("verify", "verify ok");
    machine.memory.write_slice(&old, GuestAddress(4 * MIB)).unwrap();
    assert_eq!(value(&machine.ask("verify", "verify FAILED"), "bad"), 1);
}

#[test]
fn another_set_and_another_fill_leave_nothing_of_the_previous() {
    let Some(kvm) = kvm() else { return };
    let machine = Machine::boot(&kvm, 64, "run=fill 3 50;rewrite 8 max");
    machine.expect("rewrite ok");
    while value(&machine.ask("status", "status"), "passes") < 1 {}
    machine.ask("rewrite 2 max", "rewrite ok");
    machine.ask("verify", "verify ok");
    machine.ask("fill 4 25", "fill ok");
    machine.ask("verify", "verify ok");
    machine.ask("fill 5 0", "fill ok");
    machine.ask("verify", "verify ok");
    let mut page = [0; 4096];
    machine.memory.read_slice(&mut page, GuestAddress(4 * MIB)).unwrap();
    assert_eq!(page, [0; 4096]);
}

#[test]
fn percent_leaves_the_other_pages_empty() {
    let Some(kvm) = kvm() else { return };
    let machine = Machine::boot(&kvm, 64, "run=fill 9 30");
    machine.expect("fill ok");
    let mut page = [0; 4096];
    let held = (2 * MIB..64 * MIB).step_by(4096).filter(|at| {
        machine.memory.read_slice(&mut page, GuestAddress(*at)).unwrap();
        page != [0; 4096]
    });
    let percent = held.count() * 100 / (62 * 256);
    assert!((28..=32).contains(&percent), "{percent}");
}

#[test]
fn memory_above_four_gib_is_filled_and_verified() {
    let Some(kvm) = kvm() else { return };
    let high = 5 << 30;
    let ranges = [(GuestAddress(0), 16 << 20), (GuestAddress(high), 16 << 20)];
    let machine = Machine::boot_with(&kvm, &ranges, "run=fill 1");
    let pages = value(&machine.expect("fill ok"), "pages");
    assert!((30 * 256 - 64..31 * 256).contains(&pages), "{pages}");
    machine.ask("verify", "verify ok");
    let page = high + 5 * MIB;
    let at = first_word_in(&machine, page);
    machine.memory.write_obj(0u64, at).unwrap();
    assert_eq!(value(&machine.ask("verify", "verify FAILED"), "page"), page);
}

#[test]
fn a_deep_verify_notices_a_single_bit_anywhere_in_a_page() {
    let Some(kvm) = kvm() else { return };
    let machine = Machine::boot(&kvm, 4, "run=fill 1 50");
    machine.expect("fill ok");
    machine.ask("verify deep", "verify ok");
    let page = 3 * MIB;
    for offset in [0, 1, 511, 512, 1500, 4095] {
        let at = GuestAddress(page + offset);
        let good: u8 = machine.memory.read_obj(at).unwrap();
        machine.memory.write_obj(good ^ 4, at).unwrap();
        let verdict = machine.ask("verify deep", "verify FAILED");
        assert_eq!(value(&verdict, "page"), page, "{verdict}");
        assert_eq!(value(&verdict, "offset"), offset & !7, "{verdict}");
        machine.memory.write_obj(good, at).unwrap();
    }
    machine.ask("verify deep", "verify ok");
}

#[test]
fn the_rate_is_kept() {
    let Some(kvm) = kvm() else { return };
    let machine = Machine::boot(&kvm, 64, "run=fill 1;rewrite 16 20");
    machine.expect("rewrite ok");
    let begun = std::time::Instant::now();
    std::thread::sleep(std::time::Duration::from_secs(2));
    let rewritten = value(&machine.ask("stop", "stop ok"), "rewritten");
    let seconds = begun.elapsed().as_secs_f64();
    let pages = u32::try_from(rewritten).unwrap();
    let rate = f64::from(pages) / 256.0 / seconds;
    assert!((15.0..25.0).contains(&rate), "{rate} MiB/s");
}

#[test]
fn a_pause_of_the_guest_shows_as_a_gap() {
    let Some(kvm) = kvm() else { return };
    let machine = Machine::boot(&kvm, 64, "");
    machine.expect("uvmm tiny guest:");
    machine.ask("gap reset", "gap ");
    let quiet = value(&machine.ask("gap", "gap "), "tsc_us");
    machine.hold(std::time::Duration::from_millis(500));
    let gap = machine.ask("gap", "gap ");
    // KVM rounds the frequencies by which the guest turns ticks into time.
    assert!(value(&gap, "tsc_us") >= 495_000, "{gap}");
    assert!(value(&gap, "tsc_us") < 2_000_000, "{gap}");
    assert!(quiet < 500_000, "{quiet}");
    assert_eq!(value(&gap, "backwards"), 0, "{gap}");
}

#[test]
fn it_resets_and_crashes_when_told() {
    let Some(kvm) = kvm() else { return };
    assert_eq!(Machine::boot(&kvm, 64, "").end("reboot"), End::Reset);
    assert_eq!(Machine::boot(&kvm, 64, "").end("crash"), End::Shutdown);
}

#[test]
fn no_instruction_uses_a_vector_or_floating_point_register() {
    let file = std::env::temp_dir().join(format!("tiny-guest-{}", std::process::id()));
    std::fs::write(&file, resources::TINY_GUEST).unwrap();
    let listing = Command::new("objdump").arg("-d").arg(&file).output();
    std::fs::remove_file(&file).unwrap();
    let listing = match listing {
        Ok(listing) => String::from_utf8(listing.stdout).unwrap(),
        Err(why) => return eprintln!("skipped: objdump cannot be run: {why}"),
    };
    assert!(listing.contains("rdtsc"), "{listing}");
    for forbidden in ["%xmm", "%ymm", "%mm", "%st", "fxsave", "fld"] {
        assert!(!listing.contains(forbidden), "{forbidden}");
    }
}

#[test]
#[ignore = "a measurement: run it with --ignored --nocapture"]
fn one_gib_is_filled_verified_and_rewritten_at_a_speed() {
    let Some(kvm) = kvm() else { return };
    let machine = Machine::boot(&kvm, 1024, "");
    for command in ["fill 1", "fill 2", "verify", "verify"] {
        println!("{}", machine.ask(command, &command[..4]));
    }
    machine.ask("rewrite 64 max", "rewrite ok");
    std::thread::sleep(std::time::Duration::from_secs(2));
    println!("{} in 2 s", machine.ask("stop", "stop"));
}
