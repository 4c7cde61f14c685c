//! What the desktop uses, from `/proc` inside.

use std::{fs, io::Read};

use qvd_guest::GuestMemory;

/// Longest part of a `/proc` file that is looked at.
const MAX_READ: u64 = 4096;
/// Longest list of sockets that is looked at, in bytes.
const MAX_SOCKETS: u64 = 4 * 1024 * 1024;
/// Most processes looked at; a desktop may have no more by its limits.
const MAX_PROCESSES: usize = 65_536;

/// Proportional set size in bytes from the text of a `smaps_rollup`.
fn pss_bytes(text: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix("Pss:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

fn read(path: &str, limit: u64) -> Option<String> {
    let mut text = String::new();
    fs::File::open(path).ok()?.take(limit).read_to_string(&mut text).ok()?;
    Some(text)
}

/// Process ids inside.
pub(crate) fn processes() -> Vec<u32> {
    let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
    entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok()).take(MAX_PROCESSES).collect()
}

/// Processes of this user that have not ended.
pub(crate) fn running_as(uid: u32) -> Vec<u32> {
    let is_theirs = |pid: &u32| {
        let status = read(&format!("/proc/{pid}/status"), MAX_READ).unwrap_or_default();
        let field =
            |name: &str| status.lines().find_map(|line| line.strip_prefix(name)?.split_ascii_whitespace().next());
        field("Uid:").is_some_and(|text| text.parse() == Ok(uid)) && field("State:").is_some_and(|state| state != "Z")
    };
    processes().into_iter().filter(is_theirs).collect()
}

/// Whether a process is the kernel's own.
///
/// Source: proc(5), the ninth field of `stat`; Linux `include/linux/sched.h`,
/// `PF_KTHREAD`.
pub(crate) fn is_kernels(pid: u32) -> bool {
    const PF_KTHREAD: u32 = 0x0020_0000;
    let stat = read(&format!("/proc/{pid}/stat"), MAX_READ).unwrap_or_default();
    // Before this there is a name, which may have anything in it.
    let flags = stat.rsplit_once(')').and_then(|(_, rest)| rest.split_ascii_whitespace().nth(6)?.parse::<u32>().ok());
    flags.is_some_and(|flags| flags & PF_KTHREAD != 0)
}

/// Proportional set size of one process in bytes, if we may see it.
pub(crate) fn pss(pid: u32) -> Option<u64> {
    pss_bytes(&read(&format!("/proc/{pid}/smaps_rollup"), MAX_READ)?)
}

/// Memory as the text of `/proc/meminfo` says.
fn meminfo(text: &str) -> GuestMemory {
    let value = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
        line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
    };
    let value = |name| value(name).unwrap_or(0);
    GuestMemory {
        total: value("MemTotal"),
        free: value("MemFree"),
        available: value("MemAvailable"),
        // What is in memory alone is no cache of anything.
        cached: value("Cached").saturating_sub(value("Shmem")),
    }
}

/// Memory of this machine.
pub(crate) fn memory() -> GuestMemory {
    meminfo(&read("/proc/meminfo", MAX_READ).unwrap_or_default())
}

/// Connections in `/proc/net/unix` that were accepted on `socket`.
///
/// Source: `net/unix/af_unix.c`, `unix_seq_show`: the sixth column is the state
/// (3 is connected), the eighth the path the socket was bound to.
fn connected(text: &str, socket: &str) -> usize {
    let is_connected = |line: &&str| {
        let mut columns = line.split_ascii_whitespace();
        columns.nth(5) == Some("03") && columns.nth(1) == Some(socket)
    };
    text.lines().filter(is_connected).count()
}

/// Whether `/proc/net/unix` shows somebody listening on `socket`.
///
/// Source: as above; the fourth column has `__SO_ACCEPTCON`, 0x10000.
fn listening(text: &str, socket: &str) -> bool {
    text.lines().any(|line| {
        let mut columns = line.split_ascii_whitespace();
        columns.nth(3) == Some("00010000") && columns.nth(3) == Some(socket)
    })
}

/// Whether somebody listens on a unix socket. Asked without connecting: some
/// listeners accept only once.
pub(crate) fn listens(socket: &str) -> bool {
    read("/proc/net/unix", MAX_SOCKETS).is_some_and(|text| listening(&text, socket))
}

/// Clients connected to a listening unix socket.
pub(crate) fn clients(socket: &str) -> u32 {
    let text = read("/proc/net/unix", MAX_SOCKETS).unwrap_or_default();
    u32::try_from(connected(&text, socket)).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rollup_is_read_in_bytes() {
        let text = "5581-7ffe ---p 00000000 00:00 0    [rollup]\nRss:    2000 kB\nPss:    1034 kB\nPss_Dirty: 9 kB\n";
        assert_eq!(pss_bytes(text), Some(1034 * 1024));
        assert_eq!(pss_bytes("Pss: many kB"), None);
        assert_eq!(pss_bytes(""), None);
    }

    #[test]
    fn memory_is_read_in_bytes_and_a_tmpfs_is_no_cache() {
        let text = "MemTotal:  100 kB\nMemFree: 10 kB\nMemAvailable: 50 kB\nCached: 40 kB\nShmem: 15 kB\n";
        let memory = meminfo(text);
        assert_eq!((memory.total, memory.free, memory.cached), (100 << 10, 10 << 10, 25 << 10));
    }

    #[test]
    fn only_connections_to_the_socket_count_and_listeners_are_told_apart() {
        let text = "Num       RefCount Protocol Flags    Type St Inode Path\n\
            0000000000000000: 00000002 00000000 00010000 0001 01 78644 /run/rfb.sock\n\
            0000000000000000: 00000003 00000000 00000000 0001 03 78645 /run/rfb.sock\n\
            0000000000000000: 00000003 00000000 00000000 0001 03 78646 /run/other.sock\n\
            0000000000000000: 00000003 00000000 00000000 0001 03 78647\n";
        assert_eq!(connected(text, "/run/rfb.sock"), 1);
        assert!(listening(text, "/run/rfb.sock"));
        assert!(!listening(text, "/run/other.sock"));
    }
}
