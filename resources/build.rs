//! Builds the tiny guest with the compiler that Rust links with anyway.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

const SOURCES: [&str; 7] =
    ["start.S", "command.c", "memory.c", "clock.c", "serial.c", "text.c", "pattern.c"];

const FLAGS: [&str; 17] = [
    "-std=gnu11",
    "-O2",
    "-Wall",
    "-Wextra",
    "-m64",
    "-march=x86-64",
    "-ffreestanding",
    // The guest saves no vector registers and the CPU has them switched off.
    "-mgeneral-regs-only",
    "-mno-red-zone",
    "-mcmodel=small",
    "-fno-pic",
    "-fno-stack-protector",
    "-fno-asynchronous-unwind-tables",
    "-fcf-protection=none",
    // There is no memset here for the compiler to call.
    "-fno-tree-loop-distribute-patterns",
    "-nostdlib",
    "-static",
];

const LINKER: [&str; 6] = [
    "-no-pie",
    "-s",
    "-Wl,--build-id=none",
    "-Wl,-z,noexecstack",
    "-Wl,-z,max-page-size=4096",
    "-Wl,-n",
];

fn main() {
    if let Err(why) = build() {
        println!("cargo::error=the tiny guest cannot be built: {why}");
    }
}

fn build() -> Result<(), String> {
    let variable = |name| env::var(name).map_err(|_| format!("{name} is not set: run cargo"));
    if variable("CARGO_CFG_TARGET_ARCH")? != "x86_64" {
        return Err("it is written for x86_64".into());
    }
    let sources = Path::new(&variable("CARGO_MANIFEST_DIR")?).join("tiny-guest");
    let output = PathBuf::from(variable("OUT_DIR")?).join("tiny-guest");
    let compiler = env::var("CC").unwrap_or_else(|_| "cc".into());
    println!("cargo::rerun-if-changed={}", sources.display());
    println!("cargo::rerun-if-env-changed=CC");

    let result = Command::new(&compiler)
        .args(FLAGS)
        .args(LINKER)
        .arg(format!("-Wl,-T,{}", sources.join("layout.lds").display()))
        .arg("-o")
        .arg(&output)
        .args(SOURCES.map(|name| sources.join(name)))
        .output()
        .map_err(|why| format!("{compiler}: {why}; install gcc or clang, or set CC"))?;
    let said = String::from_utf8_lossy(&result.stderr);
    for line in said.lines() {
        println!("cargo::warning={line}");
    }
    if result.status.success() { Ok(()) } else { Err(format!("{compiler}: {}", result.status)) }
}
