//! Processes that end in the middle, and those that come after them.

use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use super::fake::{FakeHost, Fault, LOW_PAGES, World};
use super::journeys::patience;
use super::network::{Limits, Network};
use crate::asking::ask;
use crate::destination::receive;
use crate::error::Error;
use crate::handover::{Giving, Handover, Taking, Token};
use crate::patience::Cancel;
use crate::progress::{Progress, Watch};
use crate::record::{About, FileRecord, Record, Role, Side};

/// What a process wrote that then ended.
fn left(directory: &Path, token: Token, role: Role) {
    FileRecord::new(directory, About::default()).write(token, role).unwrap();
}

fn roles(directory: &Path) -> Vec<Option<Role>> {
    let list = FileRecord::list(directory).unwrap();
    list.into_iter().map(|written| written.role).collect()
}

/// Both sides ended; the destination is started again, and somebody asks in place of the source.
fn asked_after(there: Option<Taking>) -> (Giving, Vec<Option<Role>>, Vec<Option<Role>>) {
    let (ours, theirs) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let token = Token::random().unwrap();
    left(ours.path(), token, Role::Source(Giving::Asked));
    if let Some(state) = there {
        left(theirs.path(), token, Role::Destination(state));
    }
    let (mut network, door) = Network::new(Limits::NONE, None);
    let (done, world) = (Cancel::new(), Arc::<World>::default());
    let mut host = FakeHost { world: world.clone(), fault: Fault::None, low_pages: LOW_PAGES };
    let record = Box::new(FileRecord::new(theirs.path(), About::default()));
    let cancel = done.clone();
    let destination = thread::Builder::new().spawn(move || {
        let watch = Watch { progress: &mut |_: &Progress| {}, cancel, record };
        receive(&mut host, door, &patience(), watch).err().unwrap()
    });
    let (written, record) =
        FileRecord::take_over(ours.path(), token, Side::Source).unwrap().unwrap();
    let Some(Role::Source(state)) = written.role else { panic!("{written:?}") };
    let mut handover = Handover::gave(token, state, Box::new(record));
    let said = ask(&mut handover, || network.connect(), &patience()).unwrap();
    for _ in 0..200 {
        if said.is_settled() && !roles(theirs.path()).is_empty() {
            thread::sleep(Duration::from_millis(5)); // DONE is on its way
        }
    }
    done.cancel();
    assert!(matches!(destination.unwrap().join().unwrap().error, Error::Cancelled));
    assert_eq!(world.runners(), (false, false), "nothing runs by being asked about");
    (said, roles(ours.path()), roles(theirs.path()))
}

#[test]
fn a_destination_that_was_restarted_says_what_the_one_before_it_had_decided() {
    for (there, said) in [
        (Taking::Ready, Giving::Back),
        (Taking::Dead, Giving::Back),
        (Taking::Running, Giving::Given),
    ] {
        assert_eq!(asked_after(Some(there)), (said, vec![], vec![]), "{there:?}");
    }
}

#[test]
fn a_destination_that_finds_nothing_decides_nothing() {
    let undecided = vec![Some(Role::Source(Giving::Asked))];
    assert_eq!(asked_after(None), (Giving::Asked, undecided, vec![]));
}

#[test]
fn nobody_speaks_for_a_destination_that_lives() {
    let directory = tempfile::tempdir().unwrap();
    let token = Token::random().unwrap();
    let mut living = FileRecord::new(directory.path(), About::default());
    living.write(token, Role::Destination(Taking::Ready)).unwrap();
    let other = FileRecord::new(directory.path(), About::default());
    assert!(other.earlier(token).unwrap().is_none());
    assert_eq!(roles(directory.path()), [Some(Role::Destination(Taking::Ready))]);
}
