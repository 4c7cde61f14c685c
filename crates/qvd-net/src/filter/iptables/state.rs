//! What a `-save` command shows.

use std::collections::BTreeMap;

/// A chain: its rules as they are shown, without its name, and how many packets
/// each has seen.
#[derive(Debug, Default)]
struct Chain {
    rules: Vec<String>,
    packets: Vec<u64>,
}

/// The chains of a table.
type Table = BTreeMap<String, Chain>;

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
                continue;
            }
            let (counted, line) = counted(line);
            if let Some((chain, rule)) = line.strip_prefix("-A ").and_then(|rule| rule.split_once(' ')) {
                let chain = table.entry(chain.to_owned()).or_default();
                chain.rules.push(rule.trim_end().to_owned());
                chain.packets.push(counted);
            }
        }
        Self(tables)
    }

    pub(super) fn chains(&self, table: &str) -> impl Iterator<Item = (&str, &[String])> {
        self.0.get(table).into_iter().flatten().map(|(name, chain)| (&**name, &*chain.rules))
    }

    pub(super) fn has_chain(&self, table: &str, chain: &str) -> bool {
        self.0.get(table).is_some_and(|table| table.contains_key(chain))
    }

    pub(super) fn rules(&self, table: &str, chain: &str) -> &[String] {
        self.0.get(table).and_then(|table| table.get(chain)).map_or(&[], |chain| &chain.rules)
    }

    /// The rules of a table, each with its chain and the packets that it has seen.
    pub(super) fn counts(&self, table: &str) -> impl Iterator<Item = (&str, &str, u64)> {
        let all = self.0.get(table).into_iter().flatten();
        all.flat_map(|(name, Chain { rules, packets })| {
            rules.iter().zip(packets).map(move |(rule, &packets)| (&**name, &**rule, packets))
        })
    }

    /// MACs are shown in capitals by some of the programs.
    pub(super) fn has_rule(&self, table: &str, chain: &str, rule: &str) -> bool {
        self.rules(table, chain).iter().any(|shown| shown.eq_ignore_ascii_case(rule))
    }
}

/// How many packets a rule has seen, if that is shown, and the rule: counts stand
/// before it, or behind it with older ones of ebtables.
fn counted(line: &str) -> (u64, &str) {
    let before = || line.strip_prefix('[').and_then(|rest| rest.split_once("] "));
    let behind = || line.rsplit_once(" -c ").map(|(rule, counts)| (counts, rule));
    before().or_else(behind).map_or((0, line), |(counts, rule)| {
        (counts.split([':', ' ']).next().and_then(|packets| packets.parse().ok()).unwrap_or_default(), rule)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_shown_is_understood() {
        let state = State::parse(
            "# Generated\n*raw\n:PREROUTING ACCEPT [3:252]\n:qvd1-7 - [0:0]\n-A PREROUTING -j qvd1-hook\n\
             [12:840] -A qvd1-7 -s 10.0.0.2/32 -j ACCEPT\nCOMMIT\n*nat\n:x DROP\nCOMMIT\n",
        );
        assert!(state.has_chain("raw", "qvd1-7") && state.has_chain("nat", "x") && !state.has_chain("nat", "qvd1-7"));
        assert!(state.has_rule("raw", "PREROUTING", "-j qvd1-hook"));
        assert_eq!(state.rules("raw", "qvd1-7").len(), 1);
        assert_eq!(state.chains("raw").count(), 2);
        let counts: Vec<_> = state.counts("raw").map(|(chain, _, packets)| (chain, packets)).collect();
        assert_eq!(counts, [("PREROUTING", 0), ("qvd1-7", 12)]);
        let older = State::parse("*nat\n-A x -p ARP -j y -c 7 90\n");
        assert_eq!(older.counts("nat").collect::<Vec<_>>(), [("x", "-p ARP -j y", 7)]);
    }
}
