//! Whether a desktop talks with other hosts, from the kernel's tables.

use std::{
    fs::File,
    io::{self, Read as _},
    net::{Ipv4Addr, Ipv6Addr},
    path::Path,
};

/// Largest table of connections read, in bytes: some thousand of them. With
/// more, a desktop is not idle.
const TABLE_MAX_BYTES: u64 = 1 << 20;

/// Whether a program of a network namespace has a TCP connection to another
/// host; `net` is its directory below `/proc`, such as `/proc/PID/net`. What
/// cannot be read counts as one.
#[must_use]
pub fn has_streams(net: &Path) -> bool {
    ["tcp", "tcp6"].into_iter().any(|table| match read(&net.join(table)) {
        Ok(text) => text.lines().skip(1).any(is_stream),
        // A kernel without IPv6 has no such table.
        Err(error) => error.kind() != io::ErrorKind::NotFound,
    })
}

fn read(path: &Path) -> io::Result<String> {
    let mut text = String::new();
    File::open(path)?.take(TABLE_MAX_BYTES).read_to_string(&mut text)?;
    Ok(text)
}

/// Source: Linux `Documentation/networking/proc_net_tcp.rst`; state 01 is
/// `TCP_ESTABLISHED`, addresses are words of the machine's own byte order.
fn is_stream(line: &str) -> bool {
    let mut fields = line.split_ascii_whitespace();
    let (Some(remote), Some("01")) = (fields.nth(2), fields.next()) else { return false };
    let Some((address, _port)) = remote.split_once(':') else { return false };
    let words: Option<Vec<u32>> = address
        .as_bytes()
        .chunks(8)
        .map(|word| u32::from_str_radix(std::str::from_utf8(word).ok()?, 16).ok())
        .collect();
    match words.as_deref() {
        Some(&[word]) => !Ipv4Addr::from(word.to_ne_bytes()).is_loopback(),
        Some(&[a, b, c, d]) => {
            let mut bytes = [0; 16];
            for (place, word) in bytes.chunks_exact_mut(4).zip([a, b, c, d]) {
                place.copy_from_slice(&word.to_ne_bytes());
            }
            let address = Ipv6Addr::from(bytes);
            !address.is_loopback() && !address.to_ipv4_mapped().is_some_and(|mapped| mapped.is_loopback())
        }
        _ => true,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn streams_to_other_hosts_are_told_from_those_inside() {
        let line = |remote: &str, state: &str| format!("   0: 0100007F:1F90 {remote} {state} 00000000:00000000 00:0");
        let v4 = |address: Ipv4Addr| format!("{:08X}:01BB", u32::from_ne_bytes(address.octets()));
        assert!(is_stream(&line(&v4(Ipv4Addr::new(192, 0, 2, 1)), "01")));
        assert!(!is_stream(&line(&v4(Ipv4Addr::new(192, 0, 2, 1)), "0A")), "listening");
        assert!(!is_stream(&line(&v4(Ipv4Addr::LOCALHOST), "01")));
        let v6 = |address: Ipv6Addr| {
            let words = address.octets();
            let words = words.chunks_exact(4).map(|w| u32::from_ne_bytes([w[0], w[1], w[2], w[3]]));
            words.map(|word| format!("{word:08X}")).collect::<String>() + ":01BB"
        };
        assert!(is_stream(&line(&v6(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1)), "01")));
        assert!(!is_stream(&line(&v6(Ipv6Addr::LOCALHOST), "01")));
        assert!(!is_stream(&line(&v6(Ipv4Addr::LOCALHOST.to_ipv6_mapped()), "01")));
    }
}
