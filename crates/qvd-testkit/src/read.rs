//! Where the objects of a census are found. Everything is read from `/proc`
//! and `/sys` of the calling thread, so that a test inside its own namespaces
//! counts those; only nftables needs its program.

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    fs, io,
    path::Path,
    process::Command,
};

use rustix::io::Errno;

use crate::{
    census::{Found, Kind, Scope},
    need::cgroup_roots,
};

/// The objects of every kind.
pub(crate) fn all(scope: &Scope) -> Vec<(Kind, Found)> {
    let processes = Processes::read();
    let counted = processes.counted(scope);
    let marked = |found: Found| found.map(|names| names.into_iter().filter(|name| scope.holds(name)).collect());
    vec![
        (Kind::Mount, marked(mounts())),
        (Kind::Link, marked(links())),
        (Kind::Address, marked(addresses())),
        (Kind::Route, marked(routes())),
        (Kind::Nftables, marked(nftables())),
        (Kind::Cgroup, marked(cgroups())),
        (Kind::LoopDevice, marked(loop_devices())),
        (Kind::Namespace, Ok(namespaces(&counted))),
        (Kind::Process, Ok(processes.names(&counted))),
        (Kind::Ipc, marked(ipc())),
        (Kind::File, files(scope)),
    ]
}

fn mounts() -> Found {
    // Source: proc_pid_mountinfo(5). Ids and peer groups differ from mount to
    // mount of the same thing, so they do not count.
    Ok(fs::read_to_string("/proc/thread-self/mountinfo")?
        .lines()
        .filter_map(|line| {
            let (mount, source) = line.split_once(" - ")?;
            let mut mount = mount.split(' ').skip(3);
            let (root, target) = (mount.next()?, mount.next()?);
            let mut source = source.split(' ');
            let (kind, device) = (source.next()?, source.next()?);
            Some(format!("{target} is {root} of {kind} {device}"))
        })
        .collect())
}

fn links() -> Found {
    Ok(fs::read_to_string("/proc/thread-self/net/dev")?
        .lines()
        .filter_map(|line| Some(line.split_once(':')?.0.trim().to_owned()))
        .collect())
}

fn addresses() -> Found {
    let mut found = BTreeSet::new();
    // `|-- ADDRESS` is followed by `/32 host LOCAL` where the address is ours.
    let trie = fs::read_to_string("/proc/thread-self/net/fib_trie")?;
    let mut last = "";
    for line in trie.lines().map(str::trim) {
        match line.split_once("-- ") {
            Some((_, address)) => last = address,
            None if line == "/32 host LOCAL" => drop(found.insert(last.to_owned())),
            None => {}
        }
    }
    // Absent without IPv6. Columns: address, index, prefix, scope, flags, link.
    let v6 = fs::read_to_string("/proc/thread-self/net/if_inet6").unwrap_or_default();
    for line in v6.lines() {
        let columns: Vec<&str> = line.split_whitespace().collect();
        if let [address, _, _, _, _, link] = columns[..] {
            found.insert(format!("{address} on {link}"));
        }
    }
    Ok(found.into_iter().collect())
}

fn routes() -> Found {
    // Columns: link, destination, gateway, flags, …; hexadecimal.
    Ok(fs::read_to_string("/proc/thread-self/net/route")?
        .lines()
        .skip(1)
        .map(|line| line.split_whitespace().take(3).collect::<Vec<_>>().join(" "))
        .collect())
}

fn nftables() -> Found {
    // `--stateless` leaves out what packets change: counters and quotas.
    let output = match Command::new("nft").args(["--stateless", "list", "ruleset"]).output() {
        Ok(output) => output,
        // Without the program nobody here made any.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    if !output.status.success() {
        return Err(io::Error::other(String::from_utf8_lossy(&output.stderr).trim().to_owned()));
    }
    Ok(nftables_lines(&String::from_utf8_lossy(&output.stdout)))
}

/// Each line with the blocks around it, so that a line of our table is told
/// from the same line in another.
fn nftables_lines(ruleset: &str) -> Vec<String> {
    let mut around: Vec<&str> = Vec::new();
    let mut lines = Vec::new();
    for line in ruleset.lines().map(str::trim).filter(|line| !line.is_empty()) {
        if line == "}" {
            around.pop();
            continue;
        }
        let block = line.strip_suffix(" {");
        around.push(block.unwrap_or(line));
        lines.push(around.join(" > "));
        if block.is_none() {
            around.pop();
        }
    }
    lines
}

fn cgroups() -> Found {
    let mut found = Vec::new();
    for root in cgroup_roots()? {
        walk(Path::new(&root), &mut |path, kind| {
            if kind.is_dir() {
                found.push(path.display().to_string());
            }
        })?;
    }
    Ok(found)
}

fn loop_devices() -> Found {
    let mut found = Vec::new();
    for entry in entries(Path::new("/sys/block"))? {
        // Absent when nothing is behind the device.
        if let Ok(file) = fs::read_to_string(entry.path().join("loop/backing_file")) {
            found.push(format!("{} on {}", entry.file_name().to_string_lossy(), file.trim()));
        }
    }
    Ok(found)
}

fn ipc() -> Found {
    let mut found = Vec::new();
    for kind in ["shm", "sem", "msg"] {
        // Absent where the kernel was built without System V IPC.
        let table = fs::read_to_string(format!("/proc/sysvipc/{kind}")).unwrap_or_default();
        // Columns: key and id; what follows changes with use.
        for line in table.lines().skip(1) {
            let id: Vec<&str> = line.split_whitespace().take(2).collect();
            found.push(format!("{kind} {}", id.join(" ")));
        }
    }
    for directory in ["/dev/shm", "/dev/mqueue"] {
        walk(Path::new(directory), &mut |path, _| found.push(path.display().to_string()))?;
    }
    Ok(found)
}

fn files(scope: &Scope) -> Found {
    let mut found = Vec::new();
    for directory in &scope.directories {
        walk(directory, &mut |path, _| found.push(path.display().to_string()))?;
    }
    Ok(found)
}

/// Entries of a directory; none when it is not there (any more).
fn entries(directory: &Path) -> io::Result<Vec<fs::DirEntry>> {
    match fs::read_dir(directory) {
        Ok(entries) => Ok(entries.filter_map(Result::ok).collect()),
        // The kernel says "no such device" of a cgroup removed meanwhile.
        Err(error) if error.kind() == io::ErrorKind::NotFound || Errno::from_io_error(&error) == Some(Errno::NODEV) => {
            Ok(Vec::new())
        }
        Err(error) => Err(error),
    }
}

/// Calls `visit` for everything below `directory`; links are not followed.
fn walk(directory: &Path, visit: &mut dyn FnMut(&Path, fs::FileType)) -> io::Result<()> {
    for entry in entries(directory)? {
        let (path, kind) = (entry.path(), entry.file_type()?);
        visit(&path, kind);
        if kind.is_dir() {
            walk(&path, visit)?;
        }
    }
    Ok(())
}

type Pid = u32;

/// Set in the flags of a kernel thread. Source: Linux `include/linux/sched.h`.
const PF_KTHREAD: u64 = 0x0020_0000;

struct Process {
    parent: Pid,
    comm: String,
    zombie: bool,
    cgroups: String,
}

/// Every process of this pid namespace, without kernel threads.
struct Processes(HashMap<Pid, Process>);

impl Processes {
    fn read() -> Self {
        let pids = entries(Path::new("/proc")).unwrap_or_default();
        let pids = pids.iter().filter_map(|entry| entry.file_name().to_str()?.parse::<Pid>().ok());
        // One that ends meanwhile is not there, which is the truth.
        Self(pids.filter_map(|pid| Some((pid, Process::read(pid)?))).collect())
    }

    /// Those of the scope, this process not among them.
    fn counted(&self, scope: &Scope) -> Vec<Pid> {
        let ours: HashSet<Pid> = self.ancestry(std::process::id()).collect();
        let in_scope = |pid: Pid, process: &Process| {
            scope.marks.is_empty()
                || scope.holds(&process.comm)
                || scope.holds(&process.cgroups)
                || self.ancestry(pid).any(|ancestor| ancestor == std::process::id())
        };
        self.0
            .iter()
            // The shell that runs a census before is not the one after.
            .filter(|&(pid, process)| !ours.contains(pid) && in_scope(*pid, process))
            .map(|(&pid, _)| pid)
            .collect()
    }

    /// A process, its parent, and so on.
    fn ancestry(&self, pid: Pid) -> impl Iterator<Item = Pid> {
        std::iter::successors(Some(pid), |pid| self.0.get(pid).map(|process| process.parent))
    }

    fn names(&self, counted: &[Pid]) -> Vec<String> {
        let name = |pid| {
            let process: &Process = self.0.get(pid)?;
            Some(format!("{pid} {}{}", process.comm, if process.zombie { " (zombie)" } else { "" }))
        };
        counted.iter().filter_map(name).collect()
    }
}

impl Process {
    fn read(pid: Pid) -> Option<Self> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // Source: proc_pid_stat(5). The name stands in parentheses and may
        // itself hold any character, so its end is the last one.
        let (start, rest) = stat.rsplit_once(')')?;
        let (_, comm) = start.split_once('(')?;
        let fields: Vec<&str> = rest.split_whitespace().collect();
        let (state, parent, flags) = (fields.first()?, fields.get(1)?, fields.get(6)?);
        if flags.parse::<u64>().ok()? & PF_KTHREAD != 0 {
            return None;
        }
        Some(Self {
            parent: parent.parse().ok()?,
            comm: comm.to_owned(),
            zombie: *state == "Z",
            cgroups: fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap_or_default(),
        })
    }
}

/// Namespaces that the threads of `pids` and of this process are in, and those
/// that they hold open.
fn namespaces(pids: &[Pid]) -> Vec<String> {
    let mut found = BTreeSet::new();
    for pid in pids.iter().copied().chain([std::process::id()]) {
        let process = format!("/proc/{pid}");
        let mut places = vec![format!("{process}/fd")];
        for task in entries(Path::new(&format!("{process}/task"))).unwrap_or_default() {
            places.push(task.path().join("ns").display().to_string());
        }
        for link in places.iter().flat_map(|place| entries(Path::new(place)).unwrap_or_default()) {
            let Ok(target) = fs::read_link(link.path()) else { continue };
            // Such as `net:[4026531840]`; other descriptors read `pipe:[…]`.
            if let Some((kind, _)) = target.to_str().and_then(|text| text.split_once(":["))
                && matches!(kind, "cgroup" | "ipc" | "mnt" | "net" | "pid" | "time" | "user" | "uts")
            {
                found.insert(target.display().to_string());
            }
        }
    }
    found.into_iter().collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_rule_is_told_from_the_same_rule_elsewhere() {
        let ruleset = "table inet a {\n\tset s {\n\t\telements = { 10.0.0.1,\n\t\t\t 10.0.0.2 }\n\t}\n\n\tchain c {\n\
                       \t\tdrop\n\t}\n}\ntable inet b {\n\tchain c {\n\t\tdrop\n\t}\n}\n";
        let lines = nftables_lines(ruleset);
        assert!(lines.contains(&"table inet a > chain c > drop".to_owned()), "{lines:?}");
        assert!(lines.contains(&"table inet b > chain c > drop".to_owned()), "{lines:?}");
        assert!(lines.contains(&"table inet a > set s > 10.0.0.2 }".to_owned()), "{lines:?}");
    }

    #[test]
    fn this_host_can_be_read() {
        assert!(mounts().unwrap().iter().any(|mount| mount.starts_with("/proc is / of proc ")));
        assert!(links().unwrap().contains(&"lo".to_owned()));
        assert!(Processes::read().0.contains_key(&std::process::id()));
        assert!(namespaces(&[]).iter().any(|namespace| namespace.starts_with("net:[")));
    }
}
