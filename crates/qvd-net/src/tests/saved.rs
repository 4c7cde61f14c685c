//! Rules as the `-save` commands tell them, to be loaded again without one.

use std::{
    io::Write as _,
    process::{Command, Stdio},
};

use qvd_testkit::Need;

use super::world::INSTANCE;

/// What tests of the commands need of a host.
pub(super) const NEEDS: &[Need] = &[Need::Root, Need::Namespaces, Need::Program("ebtables"), Need::Program("iptables")];

/// What a program had loaded when it was asked.
pub(super) struct Saved {
    program: &'static str,
    text: String,
}

/// A rule: its table and its line, and where that is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Line {
    at: usize,
    pub(super) table: String,
    pub(super) text: String,
}

impl Line {
    /// Its table and what it says.
    pub(super) fn name(&self) -> String {
        format!("{}: {}", self.table, self.text)
    }
}

impl Saved {
    pub(super) fn now(program: &'static str) -> Self {
        let output = Command::new(format!("{program}-save")).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        Self { program, text: String::from_utf8(output.stdout).unwrap() }
    }

    /// The rules of ours.
    pub(super) fn rules(&self) -> Vec<Line> {
        let bridge = INSTANCE.bridge_name();
        let mut table = String::new();
        let mut rules = Vec::new();
        for (at, text) in self.text.lines().enumerate() {
            if let Some(name) = text.strip_prefix('*') {
                name.clone_into(&mut table);
            } else if text.starts_with("-A ") && text.contains(&*bridge) {
                rules.push(Line { at, table: table.clone(), text: text.to_owned() });
            }
        }
        rules
    }

    /// Loads all but one line.
    pub(super) fn load_without(&self, left_out: Option<&Line>) {
        let left_out = left_out.map(|line| line.at);
        let lines = self.text.lines().enumerate().filter(|&(at, _)| Some(at) != left_out);
        let text: String = lines.map(|(_, line)| format!("{line}\n")).collect();
        let mut restore = Command::new(format!("{}-restore", self.program)).stdin(Stdio::piped()).spawn().unwrap();
        restore.stdin.take().unwrap().write_all(text.as_bytes()).unwrap();
        assert!(restore.wait().unwrap().success(), "{text}");
    }
}
