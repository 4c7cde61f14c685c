//! Finding the commit that a fault came with, by halves.

use std::collections::{BTreeMap, BTreeSet};

use super::{CommitId, Repository};
use crate::Error;

/// What was found out about a commit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// The fault is not in it.
    Good,
    /// The fault is in it.
    Bad,
    /// It cannot be told, for instance because it does not start.
    Unknown,
}

/// A search for the first bad commit: the one that has the fault while nothing
/// that it was made from has. It takes that whatever was made from a bad commit
/// is bad.
///
/// ```
/// use qvd_storage::repository::{Bisect, Verdict};
///
/// // Each was made from the one before; the fault came with 6.
/// let parents = (2..=100).map(|commit| (commit, vec![commit - 1])).collect();
/// let mut search = Bisect::new(parents, &[1], 100)?;
/// let mut tried = 0;
/// while let Some(commit) = search.next() {
///     tried += 1;
///     search.judge(commit, if commit >= 6 { Verdict::Bad } else { Verdict::Good });
/// }
/// assert_eq!(search.suspects(), [6]);
/// assert!(tried <= 7);
/// # Ok::<(), qvd_storage::repository::NothingBetween>(())
/// ```
#[derive(Debug, Clone)]
pub struct Bisect<C> {
    parents: BTreeMap<C, Vec<C>>,
    /// The last known bad commit and all it was made from that may be first.
    candidates: BTreeSet<C>,
    bad: C,
    unknown: BTreeSet<C>,
}

/// Why there is nothing to search.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the bad commit is one of the good ones, or what a good one was made from")]
pub struct NothingBetween;

impl<C: Ord + Copy> Bisect<C> {
    /// A search among `bad` and what it was made from (`parents`, which may leave
    /// out commits without any), but for what the commits of `good` were made from.
    ///
    /// # Errors
    /// [`NothingBetween`].
    pub fn new(parents: BTreeMap<C, Vec<C>>, good: &[C], bad: C) -> Result<Self, NothingBetween> {
        let mut search = Self { parents, candidates: BTreeSet::new(), bad, unknown: BTreeSet::new() };
        search.candidates = search.ancestry(bad);
        for &good in good {
            search.exclude(good);
        }
        if search.candidates.contains(&bad) { Ok(search) } else { Err(NothingBetween) }
    }

    /// A commit and all that it was made from.
    fn ancestry(&self, of: C) -> BTreeSet<C> {
        let (mut found, mut todo) = (BTreeSet::from([of]), vec![of]);
        while let Some(commit) = todo.pop() {
            let parents = self.parents.get(&commit).into_iter().flatten();
            todo.extend(parents.copied().filter(|&parent| found.insert(parent)));
        }
        found
    }

    fn exclude(&mut self, good: C) {
        for commit in self.ancestry(good) {
            self.candidates.remove(&commit);
        }
    }

    /// How many of the candidates would be left if `commit` were bad.
    fn weight(&self, commit: C) -> usize {
        self.ancestry(commit).intersection(&self.candidates).count()
    }

    /// The commit that it is best to look at next: whatever comes of it, as many
    /// as possible are ruled out. `None` when nothing is left to be found out.
    #[must_use]
    pub fn next(&self) -> Option<C> {
        let all = self.candidates.len();
        let open = self.candidates.iter().copied().filter(|c| *c != self.bad && !self.unknown.contains(c));
        open.max_by_key(|&commit| {
            let weight = self.weight(commit);
            weight.min(all - weight)
        })
    }

    /// Takes account of what was found out about a commit.
    pub fn judge(&mut self, commit: C, verdict: Verdict) {
        match verdict {
            Verdict::Good => self.exclude(commit),
            Verdict::Bad => {
                let left = self.ancestry(commit);
                self.candidates.retain(|candidate| left.contains(candidate));
                self.bad = commit;
            }
            Verdict::Unknown => drop(self.unknown.insert(commit)),
        }
    }

    /// How many commits may be the first bad one, as far as is known.
    #[must_use]
    pub fn left(&self) -> usize {
        self.candidates.len()
    }

    /// The commits that may be the first bad one: one alone once it is found, or
    /// several where it could not be told of those in between.
    #[must_use]
    pub fn suspects(&self) -> Vec<C> {
        self.candidates.iter().copied().collect()
    }
}

impl Repository {
    /// A search in the history of `bad`.
    ///
    /// # Errors
    /// A commit is missing or damaged; inside, why there is nothing to search.
    pub fn bisect(&self, good: &[CommitId], bad: CommitId) -> Result<Result<Bisect<CommitId>, NothingBetween>, Error> {
        let mut parents = BTreeMap::new();
        for &of in good.iter().chain([&bad]) {
            parents.extend(self.log(of)?.into_iter().map(|logged| (logged.id, logged.parents)));
        }
        Ok(Bisect::new(parents, good, bad))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Histories in which each commit was made from up to two earlier ones.
    fn histories() -> impl Strategy<Value = BTreeMap<usize, Vec<usize>>> {
        proptest::collection::vec(proptest::collection::vec(any::<prop::sample::Index>(), 1..3), 1..40).prop_map(
            |rows| {
                let parents = |(commit, row): (usize, Vec<prop::sample::Index>)| {
                    let earlier: BTreeSet<_> = row.iter().map(|index| index.index(commit + 1)).collect();
                    (commit + 1, earlier.into_iter().collect())
                };
                rows.into_iter().enumerate().map(parents).collect()
            },
        )
    }

    proptest! {
        #[test]
        fn the_first_bad_one_is_found(
            parents in histories(),
            fault: prop::sample::Index,
            bad: prop::sample::Index,
            silent in proptest::collection::btree_set(0_usize..41, 0..6),
        ) {
            let last = parents.len();
            let fault = fault.index(last) + 1;
            let whole = Bisect::new(parents.clone(), &[], last).unwrap();
            let is_bad = |commit| whole.ancestry(commit).contains(&fault);
            let bads: Vec<_> = (1..=last).filter(|&commit| is_bad(commit)).collect();
            let bad = bads[bad.index(bads.len())];
            // The very first is good: nothing was made from nothing but it.
            let mut search = Bisect::new(parents.clone(), &[0], bad).unwrap();
            let mut tried = BTreeSet::new();
            while let Some(commit) = search.next() {
                prop_assert!(tried.insert(commit), "{commit} was looked at before");
                let verdict = match (silent.contains(&commit), is_bad(commit)) {
                    (true, _) => Verdict::Unknown,
                    (_, true) => Verdict::Bad,
                    _ => Verdict::Good,
                };
                search.judge(commit, verdict);
            }
            let suspects = search.suspects();
            prop_assert!(suspects.contains(&fault), "{fault} is not among {suspects:?}");
            let told = suspects.iter().filter(|commit| !silent.contains(commit)).count();
            prop_assert!(told <= 1, "nothing kept {suspects:?} from being told apart");
        }
    }

    #[test]
    fn a_line_takes_as_many_looks_as_it_has_binary_digits() {
        let parents: BTreeMap<u32, Vec<u32>> = (1..=255).map(|commit| (commit, vec![commit - 1])).collect();
        for fault in [1, 2, 100, 254, 255] {
            let mut search = Bisect::new(parents.clone(), &[0], 255).unwrap();
            let mut looks = 0;
            while let Some(commit) = search.next() {
                looks += 1;
                search.judge(commit, if commit >= fault { Verdict::Bad } else { Verdict::Good });
            }
            assert_eq!(search.suspects(), [fault]);
            assert!(looks <= 8, "{looks} looks for {fault}");
        }
    }

    #[test]
    fn good_and_bad_have_to_be_apart() {
        let parents: BTreeMap<u32, Vec<u32>> = (1..5).map(|commit| (commit, vec![commit - 1])).collect();
        assert_eq!(Bisect::new(parents.clone(), &[3], 3).unwrap_err(), NothingBetween);
        assert_eq!(Bisect::new(parents, &[4], 3).unwrap_err(), NothingBetween);
    }
}
