//! A change of chains, as text for the `-restore` commands.

use std::fmt::Write as _;

use super::Kind;

/// Lines of one table.
#[derive(Debug, Default)]
struct Table {
    name: &'static str,
    chains: String,
    rules: String,
}

/// A change: of some tables, one after the other.
#[derive(Debug, Default)]
pub(super) struct Chains {
    tables: Vec<Table>,
    policy: &'static str,
}

impl Chains {
    pub(super) fn new(kind: Kind) -> Self {
        // What stands where iptables has no policy for chains of users.
        Self { tables: Vec::new(), policy: if kind == Kind::Ebtables { "RETURN" } else { "- [0:0]" } }
    }

    fn table(&mut self, name: &'static str) -> &mut Table {
        let place = self.tables.iter().position(|table| table.name == name).unwrap_or_else(|| {
            self.tables.push(Table { name, ..Table::default() });
            self.tables.len() - 1
        });
        // Found or pushed above.
        &mut self.tables[place]
    }

    /// Makes a chain of exactly these rules.
    pub(super) fn chain(&mut self, table: &'static str, name: &str, rules: &[String]) {
        self.ensure(table, name);
        let table = self.table(table);
        let _infallible = writeln!(table.rules, "-F {name}");
        for rule in rules {
            let _infallible = writeln!(table.rules, "-A {name} {rule}");
        }
    }

    /// Makes a chain, whatever is in it.
    pub(super) fn ensure(&mut self, table: &'static str, name: &str) {
        let policy = self.policy;
        let _infallible = writeln!(self.table(table).chains, ":{name} {policy}");
    }

    pub(super) fn line(&mut self, table: &'static str, line: &str) {
        let _infallible = writeln!(self.table(table).rules, "{line}");
    }

    pub(super) fn render(&self) -> String {
        self.tables.iter().map(|table| format!("*{}\n{}{}COMMIT\n", table.name, table.chains, table.rules)).collect()
    }
}
