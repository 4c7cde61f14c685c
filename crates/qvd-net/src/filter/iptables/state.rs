//! What a `-save` command shows.

use std::collections::BTreeMap;

/// The chains of a table, each with its rules as they are shown, without the
/// name of the chain.
type Table = BTreeMap<String, Vec<String>>;

/// Everything that one program has loaded.
#[derive(Debug, Default)]
pub(super) struct State(BTreeMap<String, Table>);

impl State {
    pub(super) fn parse(shown: &str) -> Self {
        let mut tables = BTreeMap::<String, Table>::new();
        let mut current = None;
        for line in shown.lines() {
            if let Some(name) = line.strip_prefix('*') {
                current = Some(tables.entry(name.trim().to_owned()).or_default());
                continue;
            }
            let Some(table) = current.as_mut() else { continue };
            if let Some(chain) = line.strip_prefix(':') {
                table.entry(chain.split(' ').next().unwrap_or_default().to_owned()).or_default();
            } else if let Some((chain, rule)) = line.strip_prefix("-A ").and_then(|rule| rule.split_once(' ')) {
                table.entry(chain.to_owned()).or_default().push(rule.trim_end().to_owned());
            }
        }
        Self(tables)
    }

    pub(super) fn chains(&self, table: &str) -> impl Iterator<Item = (&str, &[String])> {
        self.0.get(table).into_iter().flatten().map(|(name, rules)| (&**name, &**rules))
    }

    pub(super) fn has_chain(&self, table: &str, chain: &str) -> bool {
        self.0.get(table).is_some_and(|table| table.contains_key(chain))
    }

    pub(super) fn rules(&self, table: &str, chain: &str) -> &[String] {
        self.0.get(table).and_then(|table| table.get(chain)).map_or(&[], Vec::as_slice)
    }

    pub(super) fn has_rule(&self, table: &str, chain: &str, rule: &str) -> bool {
        self.rules(table, chain).iter().any(|shown| shown == rule)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_shown_is_understood() {
        let state = State::parse(
            "# Generated\n*raw\n:PREROUTING ACCEPT [3:252]\n:qvd1-7 - [0:0]\n-A PREROUTING -j qvd1-hook\n\
             -A qvd1-7 -s 10.0.0.2/32 -j ACCEPT\nCOMMIT\n*nat\n:x DROP\nCOMMIT\n",
        );
        assert!(state.has_chain("raw", "qvd1-7") && state.has_chain("nat", "x") && !state.has_chain("nat", "qvd1-7"));
        assert!(state.has_rule("raw", "PREROUTING", "-j qvd1-hook"));
        assert_eq!(state.rules("raw", "qvd1-7").len(), 1);
        assert_eq!(state.chains("raw").count(), 2);
    }
}
