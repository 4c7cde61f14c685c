//! How long a container takes from the request until its program runs, and
//! until nothing of it is left. One line per configuration:
//! `name start_median_us start_min_us total_median_us rounds`.
//!
//! Configurations take turns, so that whatever else the machine does falls on
//! all of them. Needs root; prints why and ends well where it cannot run.
//! `QVD_BENCH_ROUNDS` sets the number of rounds.
#![allow(clippy::unwrap_used, clippy::print_stdout, clippy::print_stderr)]

use std::{
    fs::{self, File},
    hint::black_box,
    os::{
        fd::{AsFd, OwnedFd},
        unix::fs::{PermissionsExt, chown},
    },
    path::Path,
    process::Command,
    time::{Duration, Instant},
};

use qvd_core::{DesktopId, Instance, UidRange};
use qvd_sys::mount::{FsContext, Restrictions, clone_dir, open_dir_path};
use qvd_virt::{ContainerSpec, Program, Runtime};

/// What one configuration took.
struct Row {
    name: &'static str,
    overlay: bool,
    /// Memory that this process has touched: what a clone has to copy.
    ballast_mib: usize,
    start_us: Vec<u128>,
    total_us: Vec<u128>,
}

fn main() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("SKIPPED: starting containers needs root");
        return;
    }
    let rounds = std::env::var("QVD_BENCH_ROUNDS").ok().and_then(|text| text.parse().ok()).unwrap_or(60);
    let row = |name, overlay, ballast_mib| Row { name, overlay, ballast_mib, start_us: vec![], total_us: vec![] };
    let mut small = [row("virt-bind", false, 0), row("virt-overlay", true, 0)];
    // Apart from the others, because releasing so much memory disturbs them.
    let mut large = [
        row("virt-bind-16MiB-parent", false, 16),
        row("virt-bind-64MiB-parent", false, 64),
        row("virt-bind-256MiB-parent", false, 256),
    ];
    let bed = tempfile::tempdir().unwrap();
    let ids = UidRange::of_slot(60_000).unwrap();
    let tree = bed.path().join("tree");
    plant(&tree, ids);
    let runtime = Runtime::new(Instance::new(0xbe7c)).unwrap();
    for rows in [&mut small[..], &mut large[..]] {
        for round in 0..=rounds {
            for row in &mut *rows {
                // Not zeroed by the kernel: each page is really there.
                let ballast = black_box(vec![1_u8; row.ballast_mib << 20]);
                let root = if row.overlay { overlay(bed.path(), &tree, ids) } else { bind(&tree) };
                let (start, total) = cycle(&runtime, root, &tree, ids);
                drop(ballast);
                // The first round warms up.
                if round > 0 {
                    row.start_us.push(start.as_micros());
                    row.total_us.push(total.as_micros());
                }
            }
        }
    }
    for row in small.iter_mut().chain(&mut large) {
        row.start_us.sort_unstable();
        row.total_us.sort_unstable();
        let (start, total) = (&row.start_us, &row.total_us);
        println!("{} {} {} {} {rounds}", row.name, start[rounds / 2], start[0], total[rounds / 2]);
    }
}

fn cycle(runtime: &Runtime, root: OwnedFd, tree: &Path, ids: UidRange) -> (Duration, Duration) {
    let file = File::open(tree.join("bin/true")).unwrap();
    let program = Program { file: file.into(), argv: vec!["true".to_owned()], env: vec![] };
    let spec = ContainerSpec::new(DesktopId::new(1).unwrap(), root, ids, program);
    let begin = Instant::now();
    let mut container = runtime.prepare(spec).unwrap().start().unwrap();
    let start = begin.elapsed();
    container.wait(Duration::from_secs(60)).unwrap();
    container.close().unwrap();
    (start, begin.elapsed())
}

fn bind(tree: &Path) -> OwnedFd {
    clone_dir(open_dir_path(tree).unwrap().as_fd()).unwrap()
}

fn overlay(bed: &Path, tree: &Path, ids: UidRange) -> OwnedFd {
    for name in ["upper", "work"] {
        let dir = bed.join(name);
        if dir.exists() {
            fs::remove_dir_all(&dir).unwrap();
        }
        fs::create_dir(&dir).unwrap();
        chown(&dir, Some(ids.base()), Some(ids.base())).unwrap();
    }
    let fs = FsContext::open("overlay").unwrap();
    fs.set("lowerdir", tree.to_str().unwrap()).unwrap();
    fs.set("upperdir", bed.join("upper").to_str().unwrap()).unwrap();
    fs.set("workdir", bed.join("work").to_str().unwrap()).unwrap();
    fs.set_flag("volatile").unwrap();
    fs.mount(Restrictions::default()).unwrap()
}

/// A tree with `true` and its libraries, and the directories that an image has.
fn plant(tree: &Path, ids: UidRange) {
    for dir in ["bin", "proc", "sys", "dev", "tmp", "run"] {
        fs::create_dir_all(tree.join(dir)).unwrap();
    }
    let listed = Command::new("ldd").arg("/bin/true").output().unwrap();
    let listed = String::from_utf8(listed.stdout).unwrap();
    for file in listed.split_ascii_whitespace().filter(|word| word.starts_with('/')).chain(["/bin/true"]) {
        let inside = tree.join(file.trim_start_matches('/'));
        fs::create_dir_all(inside.parent().unwrap()).unwrap();
        fs::copy(file, inside).unwrap();
    }
    fs::set_permissions(tree, fs::Permissions::from_mode(0o755)).unwrap();
    chown(tree, Some(ids.base()), Some(ids.base())).unwrap();
}
