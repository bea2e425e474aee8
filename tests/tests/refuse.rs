//! What cannot be done is refused with one line that names the cause.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]
use std::fs;
use std::io::{Read, Write};
use std::net::TcpListener;
use std::thread;
use std::time::Duration;

use tests::inside_lab;
use tests::vm::{Report, SHORT, Uvmm, Vm, free_address, variable};

/// Runs `uvmm` and insists on a refusal of one line that contains `word`.
fn refused(uvmm: &Uvmm, arguments: &[&str], word: &str) {
    let (status, output, errors) = uvmm.call(arguments).unwrap();
    assert!(status.code().is_some_and(|code| code != 0), "{arguments:?} ended with {status}");
    assert_eq!(output, "", "{arguments:?}");
    assert_eq!(errors.lines().count(), 1, "{arguments:?} said {errors:?}");
    assert!(
        errors.to_lowercase().contains(word),
        "{arguments:?} said {errors:?}, nothing about {word:?}"
    );
    assert!(!errors.contains("panicked"), "{errors}");
}

#[test]
fn a_kernel_that_is_none_is_named() {
    inside_lab!();
    let uvmm = Uvmm::new().unwrap();
    let real = fs::read(variable("GUEST_KERNEL").unwrap()).unwrap();
    let elf = fs::read(variable("GUEST_VMLINUX").unwrap()).unwrap();
    let random = (0..100_000_u32).map(|n| n.wrapping_mul(2_654_435_761).to_be_bytes()[1]);
    let files: [(&str, &[u8]); 5] = [
        ("empty", b""),
        ("random", &random.collect::<Vec<_>>()),
        ("cut-in-header", &real[..600]),
        ("cut", &real[..real.len() / 2]),
        ("cut-elf", &elf[..elf.len() / 2]),
    ];
    for (name, content) in files {
        let path = uvmm.dir().join(name);
        fs::write(&path, content).unwrap();
        refused(&uvmm, &["run", "--serial", "null", "--kernel", path.to_str().unwrap()], name);
    }
    refused(&uvmm, &["run", "--serial", "null", "--kernel", "/no/such/kernel"], "/no/such/kernel");
    refused(&uvmm, &["run", "--serial", "null", "--kernel", "/proc"], "/proc");
}

#[test]
fn an_initrd_that_is_none_or_too_large_is_named() {
    inside_lab!();
    let uvmm = Uvmm::new().unwrap();
    let kernel = variable("GUEST_KERNEL").unwrap();
    let run = |initrd: &str, word: &str| {
        let arguments =
            ["run", "--serial", "null", "--memory", "64M", "--kernel", kernel.to_str().unwrap()];
        refused(&uvmm, &[&arguments[..], &["--initrd", initrd]].concat(), word);
    };
    run("/no/such/initrd", "/no/such/initrd");
    run("/proc", "/proc");
    let large = uvmm.dir().join("large");
    fs::File::create(&large).unwrap().set_len(1 << 30).unwrap();
    run(large.to_str().unwrap(), "the initrd need");
}

#[test]
fn impossible_sizes_and_counts_are_refused() {
    inside_lab!();
    let uvmm = Uvmm::new().unwrap();
    for memory in ["0", "1M", "63M", "many", "-1", "1000T", "99999999999999999999G"] {
        refused(&uvmm, &["run", "--serial", "null", &format!("--memory={memory}")], "memory");
    }
    for cpus in ["0", "9", "300", "two", "-1"] {
        refused(&uvmm, &["run", "--serial", "null", &format!("--cpus={cpus}")], "cpus");
    }
    refused(&uvmm, &["run", "--serial", "null", "--name", "../x"], "name");
    refused(&uvmm, &["run", "--serial", "socket=/no/such/dir/s"], "/no/such/dir");
    refused(&uvmm, &["run", "--config", "/no/such/file"], "/no/such/file");
}

#[test]
fn a_name_in_use_is_refused_and_its_owner_goes_on() {
    inside_lab!();
    let uvmm = Uvmm::new().unwrap();
    let mut vm = tiny(&uvmm);
    refused(&uvmm, &["run", "--serial", "null", "--name", "tiny"], "tiny");
    goes_on(&mut vm);
}

#[test]
fn a_peer_that_is_not_uvmm_does_not_hurt_the_guest() {
    inside_lab!();
    let uvmm = Uvmm::new().unwrap();
    let mut vm = tiny(&uvmm);
    let nobody = free_address().unwrap();
    failed(&uvmm.migrate(&vm, &nobody).unwrap());
    goes_on(&mut vm);
    type Peer = fn(&mut std::net::TcpStream);
    let peers: [(&str, Peer); 3] = [
        ("closes at once", |_| {}),
        ("speaks another protocol", |stream| {
            drop(stream.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n"));
        }),
        ("sends garbage without end", |stream| while stream.write_all(&[0xa5; 4096]).is_ok() {}),
    ];
    for (what, act) in peers {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let peer =
            thread::Builder::new().spawn(move || act(&mut listener.accept().unwrap().0)).unwrap();
        let report = uvmm.migrate(&vm, &address).unwrap();
        assert_eq!(report.status, "failed", "a peer that {what}");
        assert!(report.error.is_some_and(|error| !error.contains('\n')), "a peer that {what}");
        peer.join().unwrap();
        goes_on(&mut vm);
    }
}

#[test]
fn a_peer_that_says_nothing_is_not_waited_for_without_end() {
    inside_lab!();
    let uvmm = Uvmm::new().unwrap();
    let mut vm = tiny(&uvmm);
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    failed(&uvmm.migrate(&vm, &listener.local_addr().unwrap().to_string()).unwrap());
    goes_on(&mut vm);
}

#[test]
fn a_destination_that_hears_garbage_waits_on_or_says_why_not() {
    inside_lab!();
    let uvmm = Uvmm::new().unwrap();
    let (mut vm, address) = uvmm.incoming("incoming").unwrap();
    let mut stream = std::net::TcpStream::connect(&address).unwrap();
    drop(stream.write_all(&[0x5a; 100_000]));
    stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    drop(stream.read_to_end(&mut Vec::new()));
    if !vm.runs() {
        let errors = vm.errors().unwrap();
        assert!(!vm.wait(SHORT).unwrap().success());
        assert_eq!(errors.lines().count(), 1, "{errors}");
    }
}

#[test]
fn a_machine_without_kvm_is_told_what_to_do() {
    inside_lab!();
    let uvmm = Uvmm::new().unwrap();
    // A file system of its own hides the device from this one process.
    let binary = variable("UVMM").unwrap();
    let script = "mount -t tmpfs none /dev && exec \"$0\" run --serial null";
    let output = std::process::Command::new("unshare")
        .args(["-m", "sh", "-c", script])
        .arg(&binary)
        .env("UVMM_RUNTIME_DIR", uvmm.runtime_dir())
        .output()
        .unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.code().is_some_and(|code| code != 0));
    assert!(errors.lines().count() == 1 && errors.contains("/dev/kvm"), "{errors}");
}

#[test]
fn a_full_disk_under_the_serial_file_does_not_stop_the_guest() {
    inside_lab!();
    let uvmm = Uvmm::new().unwrap();
    let mut vm =
        uvmm.command(["run", "--name", "full", "--serial", "file=/dev/full"]).spawn().unwrap();
    let mut running = false;
    for _ in 0..100 {
        running = uvmm.call(&["info", "--vm", "full"]).unwrap().0.success();
        if running {
            break;
        }
        thread::sleep(Duration::from_millis(100));
    }
    assert!(running);
    assert!(matches!(vm.try_wait(), Ok(None)), "uvmm ended: {:?}", vm.try_wait());
    vm.kill().unwrap();
    vm.wait().unwrap();
}

/// The built-in guest, which needs no files and boots at once.
fn tiny(uvmm: &Uvmm) -> Vm {
    let mut vm = uvmm.run("tiny", vec!["--memory".into(), "64M".into()]).unwrap();
    vm.serial.expect("uvmm tiny guest", SHORT).unwrap();
    vm.serial.send("fill 1").unwrap();
    vm
}

fn failed(report: &Report) {
    assert_eq!(report.status, "failed");
    let error = report.error.as_deref().unwrap_or_default();
    assert!(!error.is_empty() && !error.contains('\n'), "{error:?}");
}

/// Insists that the guest runs and that its memory is what it wrote.
fn goes_on(vm: &mut Vm) {
    vm.serial.send("verify").unwrap();
    vm.serial.expect("verify ok", SHORT).unwrap();
}
