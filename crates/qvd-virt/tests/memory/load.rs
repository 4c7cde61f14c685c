//! What was recorded of real guests.

use std::collections::BTreeMap;

/// One second of a guest.
#[derive(Debug, Clone, Copy)]
pub struct Sample {
    /// What its programs and its kernel need, in MiB: all but what is available.
    pub used: f64,
    /// Files that it keeps although it could do without, in MiB.
    pub cached: f64,
    /// Whether its programs work.
    pub busy: bool,
}

/// A recorded guest, second by second. It begins again at its end.
#[derive(Debug, Clone)]
pub struct Load(Vec<Sample>);

impl Load {
    /// What it does in a second.
    pub fn at(&self, second: usize) -> Sample {
        self.0[second % self.0.len()]
    }

    /// The most that it ever needs, in MiB.
    pub fn peak(&self) -> f64 {
        self.0.iter().map(|sample| sample.used).fold(0.0, f64::max)
    }

    pub fn mean(&self) -> f64 {
        self.0.iter().map(|sample| sample.used).sum::<f64>() / self.0.len() as f64
    }
}

/// The loads of `loads.csv`, by name. Its first lines say how it was recorded.
pub fn recorded() -> BTreeMap<String, Load> {
    let mut loads: BTreeMap<String, Load> = BTreeMap::new();
    for line in include_str!("loads.csv").lines().filter(|line| !line.starts_with('#')) {
        let words: Vec<_> = line.split(',').collect();
        let [name, used, cached, busy] = words.as_slice() else { panic!("not a sample: {line}") };
        let sample = Sample { used: used.parse().unwrap(), cached: cached.parse().unwrap(), busy: *busy == "1" };
        loads.entry((*name).to_owned()).or_insert_with(|| Load(Vec::new())).0.push(sample);
    }
    loads
}
