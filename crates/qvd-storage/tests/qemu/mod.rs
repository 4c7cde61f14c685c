//! QEMU's programs, as the judge of what is written to disks.
#![allow(dead_code, unreachable_pub, clippy::unwrap_used, clippy::panic)]

use std::{
    io::{BufRead, BufReader, Write},
    path::Path,
    process::{Child, Command, Stdio},
};

use qvd_storage::Device;

/// Calls `qemu-img`, demands success, returns what it said.
pub fn img(args: &[&str]) -> String {
    let output = Command::new("qemu-img").args(args).output().unwrap();
    assert!(output.status.success(), "qemu-img {args:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// Lets `qemu-io` execute commands on a disk. `read -P` compares and fails.
pub fn io(device: &Device, commands: &[&str]) {
    let output = run_io(device.format.name(), &device.path, commands);
    assert!(!output.contains("Pattern verification failed"), "{}: {output}", device.path.display());
}

pub fn run_io(format: &str, path: &Path, commands: &[&str]) -> String {
    let commands = commands.iter().flat_map(|command| ["-c", command]);
    let output = Command::new("qemu-io").args(["-f", format]).args(commands).arg(path).output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{}: {said}", path.display());
    said
}

/// What `qemu-img info` says of a disk.
pub fn info(device: &Device) -> serde_json::Value {
    let path = device.path.to_str().unwrap();
    serde_json::from_str(&img(&["info", "--output=json", "-f", device.format.name(), path])).unwrap()
}

/// How many corruptions and leaks `qemu-img check` finds.
pub fn check(device: &Device) -> (u64, u64) {
    check_file(&device.path)
}

/// As [`check`], for a file.
pub fn check_file(path: &Path) -> (u64, u64) {
    let output = Command::new("qemu-img").args(["check", "--output=json", "-f", "qcow2"]).arg(path).output().unwrap();
    let said: serde_json::Value = serde_json::from_slice(&output.stdout)
        .unwrap_or_else(|_| panic!("{}: {}", path.display(), String::from_utf8_lossy(&output.stderr)));
    let number = |name: &str| said.get(name).and_then(serde_json::Value::as_u64).unwrap_or(0);
    assert_eq!(number("check-errors"), 0, "{said}");
    (number("corruptions"), number("leaks"))
}

/// A process of QEMU that has a disk open until this is dropped.
pub struct Holder(Child);

impl Holder {
    pub fn of(device: &Device) -> Self {
        Self::of_file(&device.path, device.format.name())
    }

    /// As it holds a disk whose base is not there.
    pub fn of_file(path: &Path, format: &str) -> Self {
        let mut child = Command::new("qemu-io")
            .args(["-f", format])
            .arg(path)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        // Its answer to a command says that the disk is open.
        let input = child.stdin.as_mut().unwrap();
        input.write_all(b"length\n").unwrap();
        let mut line = String::new();
        let mut output = BufReader::new(child.stdout.take().unwrap());
        while !line.trim_start_matches("qemu-io> ").starts_with(|c: char| c.is_ascii_digit()) {
            line.clear();
            assert!(output.read_line(&mut line).unwrap() > 0, "qemu-io ended");
        }
        child.stdout = Some(output.into_inner());
        Self(child)
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        // It ends at the end of its input.
        drop(self.0.stdin.take());
        self.0.wait().unwrap();
    }
}
