//! A network that breaks while a guest moves: the guest runs at exactly one place, and is whole.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use tests::network::{Breaking, Fault, Place, Way, Word};
use tests::vm::{Report, SHORT, Uvmm, Vm};
use tests::{inside_lab, tier};

/// How many, unless `UVMM_FAULTS` says: as many as it takes to break each word of the hand-over in
/// each way, and as many among all other bytes.
const FAULTS: usize = 32;
const KINDS: [Fault; 4] = [Fault::Cut, Fault::Flip, Fault::Gone, Fault::Stall];

/// Numbers that look random, and come again with the same seed.
struct Dice(u64);

impl Dice {
    fn new() -> Self {
        let seed = tier::seed();
        println!("{}={seed}", tier::SEED);
        Self(seed)
    }

    /// One below `bound`.
    fn throw(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ mixed >> 31) % bound
    }

    /// Where the `number`th network breaks, if a whole migration takes so many bytes each way: half
    /// of them somewhere among all bytes, and half in the hand-over.
    fn place(&mut self, number: usize, [out, back]: [u64; 2]) -> Place {
        let turn = number / 2 % 4;
        match (number % 2, turn) {
            (0, 0 | 1) => Place::Byte(Way::Out, self.throw(out)),
            (0, 2) => Place::Byte(Way::Out, self.throw(1000)),
            (0, _) => Place::Byte(Way::Back, self.throw(back)),
            _ => Place::Within(Word::ALL[turn], self.throw(Word::SIZE)),
        }
    }
}

/// Tries to move `source` to `destination` through `network`.
fn try_moving(uvmm: &Uvmm, source: &Vm, network: &Breaking) -> Report {
    let mut command: Command = uvmm.command(["migrate", "--vm", &source.name, "--json"]);
    // What is not checked may be bent without anybody's notice.
    command.args(["--to", network.address(), "--checksums", "--undecided-after", "2s"]);
    // How it converges is not what this is about.
    command.args(["--downtime-limit", "10s"]);
    let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    Report::of(child, SHORT).unwrap()
}

/// Where the guest is, by the word of uvmm: whether it arrived. If that is open, the network heals
/// and an operator has the destination asked.
fn arrived(uvmm: &Uvmm, source: &Vm, network: &Breaking, report: &Report) -> bool {
    match report.status.as_str() {
        "completed" => true,
        "failed" => false,
        "undecided" => {
            assert!(!is_running(uvmm, source), "nobody may run it here unasked");
            network.heal();
            let (status, said, errors) =
                uvmm.call(&["resolve", "--vm", &source.name, "--ask"]).unwrap();
            assert!(status.success(), "{errors}");
            let there = said.contains("the guest runs at");
            assert!(there || said.contains("it goes on here"), "{said}");
            there
        }
        other => panic!("{other}: {report:?}"),
    }
}

/// Whether a process of uvmm says that a guest runs in it.
fn is_running(uvmm: &Uvmm, vm: &Vm) -> bool {
    uvmm.info(&vm.name).is_ok_and(|info| info["state"] == "running")
}

/// How many vCPUs a process of uvmm has; none once it has ended, or its guest has left.
fn processors(vm: &Vm) -> usize {
    let tasks = std::fs::read_dir(format!("/proc/{}/task", vm.pid()));
    let names = tasks.into_iter().flatten().flatten();
    let names = names.filter_map(|task| std::fs::read_to_string(task.path().join("comm")).ok());
    names.filter(|name| name.starts_with("vcpu")).count()
}

/// Whether its vCPUs end: they may take a moment to, once its guest has left.
fn lets_go(vm: &Vm) -> bool {
    let deadline = Instant::now() + Duration::from_secs(20);
    while processors(vm) > 0 && Instant::now() < deadline {
        thread::sleep(Duration::from_millis(20));
    }
    processors(vm) == 0
}

/// A guest on its way from fault to fault.
struct Journey {
    uvmm: Uvmm,
    vm: Vm,
    /// Whether it arrived here without the source's last word: then this process goes on answering
    /// for a while after the guest has left.
    unheard: bool,
    /// How many bytes a whole migration takes each way.
    whole: [u64; 2],
    checked: u64,
}

impl Journey {
    /// Tries to move it through a network that breaks; gives the report, and whether it moved.
    fn meet(self, number: usize, place: Place, fault: Fault) -> (Self, Report, bool) {
        let Self { uvmm, mut vm, unheard, mut whole, mut checked } = self;
        let (incoming, address) = uvmm.incoming(&format!("host-{}", number + 1)).unwrap();
        let network = Breaking::to(&address, place, fault).unwrap();
        let report = try_moving(&uvmm, &vm, &network);
        let moved = arrived(&uvmm, &vm, &network, &report);
        if moved {
            if !unheard {
                assert_eq!(vm.wait(SHORT).unwrap().code(), Some(0), "{}", vm.errors().unwrap());
            }
            assert!(!is_running(&uvmm, &vm) && lets_go(&vm), "{number}: it runs twice");
            whole = [Way::Out, Way::Back].map(|way| network.passed(way));
            vm = incoming;
        } else {
            let still = processors(&incoming) == 0 || !is_running(&uvmm, &incoming);
            assert!(still, "{number}: it runs twice");
        }
        checked = vm.works_on(checked).unwrap();
        let in_done = matches!(place, Place::Within(Word::Done, _));
        let unheard = if moved { in_done } else { unheard };
        assert!(network.broke() || moved, "it stayed where nothing broke: {report:?}");
        if let (Place::Within(word, _), true) = (place, network.broke()) {
            let given = matches!(word, Word::Running | Word::Done);
            assert_eq!(moved, given, "{number}: who had it when {word:?} was lost? {report:?}");
        }
        (Self { uvmm, vm, unheard, whole, checked }, report, moved)
    }
}

/// How the faults ended.
#[derive(Debug, Default)]
struct Ends {
    stayed: usize,
    arrived: usize,
    /// Those among them that were decided by asking.
    asked: usize,
    /// How many times each of [`KINDS`] met a word of the hand-over.
    words: [usize; KINDS.len()],
}

impl Ends {
    fn count(&mut self, place: Place, kind: usize, moved: bool, asked: bool) {
        *(if moved { &mut self.arrived } else { &mut self.stayed }) += 1;
        self.asked += usize::from(asked);
        self.words[kind] += usize::from(matches!(place, Place::Within(..)));
    }

    /// Whether they are all that there are. The dice have no say in this: of the first
    /// [`FAULTS`], one of each kind breaks each of READY, COMMIT, RUNNING and DONE, and one each
    /// takes COMMIT and RUNNING away with the network.
    fn are_all(&self) -> bool {
        let each_kind = self.words.iter().all(|&count| count >= Word::ALL.len());
        self.stayed >= 8 && self.arrived >= 8 && self.asked >= 2 && each_kind
    }
}

#[test]
fn faults_leave_the_guest_whole_at_exactly_one_place() {
    inside_lab!();
    let (uvmm, mut dice) = (Uvmm::new().unwrap(), Dice::new());
    let vm = uvmm.working_guest("host-0", &["--memory", "96M", "--cpus", "2"], 4, 2).unwrap();
    let mut journey = Journey { uvmm, vm, unheard: false, whole: [32 << 20, 200], checked: 0 };
    let mut ends = Ends::default();
    let faults = std::env::var("UVMM_FAULTS").map_or(FAULTS, |count| count.parse().unwrap());
    for number in 0..faults {
        // A word meets another kind each time.
        let kind = (number / 2 + number / 8) % KINDS.len();
        let (fault, place) = (KINDS[kind], dice.place(number, journey.whole));
        let since = Instant::now();
        let (went_on, report, moved) = journey.meet(number, place, fault);
        journey = went_on;
        ends.count(place, kind, moved, report.status == "undecided");
        let (at, took) = (if moved { "there" } else { "here" }, since.elapsed());
        let Report { status, error, total_ms, .. } = report;
        let why = error.unwrap_or_default();
        println!(
            "{number}: {fault:?} {place:?}: {status} in {total_ms} ms of {took:.1?}, {at}: {why}"
        );
    }
    println!("{faults} faults: {ends:?}");
    assert!(faults < FAULTS || ends.are_all(), "not every end came: {ends:?}");
    let open = journey.uvmm.call(&["resolve"]).unwrap().1;
    assert!(open.contains("there is no undecided migration"), "{open}");
}
