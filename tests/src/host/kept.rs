//! The state every lab host begins with: booted once, kept, and never changed.
//!
//! An emulated machine needs a quarter of a minute to boot, load its modules and bring up its
//! NICs. None of that depends on what is run in it, so it is done once for each combination of
//! kernel, initial file system and QEMU. A lab host maps the memory of that state copy-on-write.
use std::collections::hash_map::DefaultHasher;
use std::fs;
use std::hash::{Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::Command;

use tempfile::TempDir;

use super::booting::Booting;
use super::machine::{self, Machine, Nesting};
use crate::artefacts::Artefacts;
use crate::error::{Context, Result, reading, writing};
use crate::{cache, program};

/// How often to begin: QEMU loses an interrupt now and then without which Linux stands still, and
/// there is no [`heartbeat`](super::heartbeat) yet.
const TRIES: u8 = 3;

/// A kept state.
pub(super) struct Kept {
    /// The content of the memory.
    pub(super) memory: PathBuf,
    /// Everything else, as QEMU saves it.
    pub(super) state: PathBuf,
}

impl Kept {
    /// The state for `artefacts`, made now if there is none yet.
    pub(super) fn get(artefacts: &Artefacts) -> Result<Self> {
        let _others_wait = cache::lock()?;
        let dir = cache::dir()?.join("kept");
        let name = format!("{:016x}", identity(artefacts)?);
        let here = dir.join(&name);
        if !here.exists() {
            if dir.exists() {
                // States of other kernels or initial file systems: large, and not used again.
                fs::remove_dir_all(&dir).context(|| writing(&dir))?;
            }
            fs::create_dir_all(&dir).context(|| writing(&dir))?;
            eprintln!("lab: booting the lab host once; later ones begin with its state");
            let half = made(artefacts, &dir)?;
            fs::rename(half.keep(), &here).context(|| writing(&here))?;
        }
        Ok(Self { memory: here.join("memory"), state: here.join("state") })
    }

    /// Forgets the state; lab hosts that run from it go on.
    pub(super) fn discard(&self) -> Result<()> {
        let _others_wait = cache::lock()?;
        let dir = self.state.parent().expect("it lies in the cache");
        fs::remove_dir_all(dir).context(|| writing(dir))
    }
}

/// Changes with everything that the state depends on.
fn identity(artefacts: &Artefacts) -> Result<u64> {
    let mut hasher = DefaultHasher::new();
    let initrd = &artefacts.host_initrd;
    fs::read(initrd).context(|| reading(initrd))?.hash(&mut hasher);
    artefacts.kernel.version.hash(&mut hasher);
    machine::arguments().hash(&mut hasher);
    Nesting::here().parameters().hash(&mut hasher);
    program::run(Command::new("qemu-system-x86_64").arg("--version"))?.hash(&mut hasher);
    Ok(hasher.finish())
}

/// A new state in a directory of its own in `dir`.
fn made(artefacts: &Artefacts, dir: &Path) -> Result<TempDir> {
    let once = || {
        let half = tempfile::tempdir_in(dir).context(|| writing(dir))?;
        make(artefacts, half.path())?;
        drop(fs::remove_file(half.path().join("agent")));
        Ok(half)
    };
    (1..TRIES).fold(once(), |made, _| {
        made.or_else(|error| {
            eprintln!("lab: {error}\nlab: once more");
            once()
        })
    })
}

fn make(artefacts: &Artefacts, dir: &Path) -> Result<()> {
    let (socket, memory) = (dir.join("agent"), dir.join("memory"));
    let console = cache::dir()?.join("console-first.log");
    let machine = Machine { artefacts, socket: &socket, console: &console, memory: &memory };
    let mut booting = Booting::new(&machine, || machine.boot())?;
    let stream = booting.connection()?;
    booting.first(&stream, |received| match String::from_utf8_lossy(received).as_ref() {
        "ready\n" => Ok(Some(())),
        said if said.ends_with('\n') => Err(said.to_owned()),
        _ => Ok(None),
    })?;
    machine::keep(booting.up(), &dir.join("state"))
}
