use std::{
    collections::HashMap,
    hash::Hash,
    net::{IpAddr, Ipv6Addr},
    time::{Duration, Instant},
};

/// Failed sign-ins that a user name may have at once, and how long until it
/// may have one more: a person who mistypes never waits, a program that
/// guesses gets 7200 tries a day.
const PER_USER: Allowance = Allowance { burst: 5, refill: Duration::from_secs(12) };

/// The same for a source address, behind which there may be a whole site.
const PER_SOURCE: Allowance = Allowance { burst: 20, refill: Duration::from_secs(3) };

/// Most names and most addresses that are remembered. Each takes some 100 bytes.
const MAX_TRACKED: usize = 8192;

#[derive(Debug, Clone, Copy)]
struct Allowance {
    burst: u32,
    refill: Duration,
}

/// Slows down who guesses passwords: per user name and per source address.
///
/// An attempt is charged before the password is looked at, so many at once do
/// not slip through, and given back when it was right.
#[derive(Debug)]
pub(crate) struct Limiter {
    users: Table<String>,
    sources: Table<IpAddr>,
}

impl Limiter {
    pub(crate) fn new() -> Self {
        Self { users: Table::new(PER_USER), sources: Table::new(PER_SOURCE) }
    }

    /// Charges an attempt, or says how long to wait. A refused attempt costs nothing.
    pub(crate) fn charge(&mut self, now: Instant, user: &str, source: Option<IpAddr>) -> Result<(), Duration> {
        let source = source.map(network_of);
        let wait = self.users.wait(now, user).max(source.map_or(Duration::ZERO, |s| self.sources.wait(now, &s)));
        if !wait.is_zero() {
            return Err(wait);
        }
        self.users.charge(now, user.to_owned());
        if let Some(source) = source {
            self.sources.charge(now, source);
        }
        Ok(())
    }

    /// The charged attempt was right: gives the address its charge back and
    /// forgets the name's failures, for it was the user who mistyped.
    pub(crate) fn forgive(&mut self, user: &str, source: Option<IpAddr>) {
        self.users.forget(user);
        if let Some(source) = source {
            self.sources.give_back(&network_of(source));
        }
    }
}

/// An IPv6 subscriber has a whole /64 (RFC 6177) and may use a new address for
/// every attempt; an IPv4 address is itself, also when written as IPv6.
fn network_of(source: IpAddr) -> IpAddr {
    match source.to_canonical() {
        IpAddr::V4(v4) => IpAddr::V4(v4),
        IpAddr::V6(v6) => IpAddr::V6(Ipv6Addr::from_bits(v6.to_bits() & !u128::from(u64::MAX))),
    }
}

/// One bucket a key, kept as the moment at which it will be whole again.
#[derive(Debug)]
struct Table<K> {
    allowance: Allowance,
    whole_at: HashMap<K, Instant>,
}

impl<K: Eq + Hash + Clone> Table<K> {
    fn new(allowance: Allowance) -> Self {
        Self { allowance, whole_at: HashMap::new() }
    }

    fn wait<Q: Eq + Hash + ?Sized>(&self, now: Instant, key: &Q) -> Duration
    where
        K: std::borrow::Borrow<Q>,
    {
        let missing = self.whole_at.get(key).map_or(Duration::ZERO, |at| at.saturating_duration_since(now));
        missing.saturating_sub(self.allowance.refill * (self.allowance.burst - 1))
    }

    fn charge(&mut self, now: Instant, key: K) {
        if self.whole_at.len() >= MAX_TRACKED && !self.whole_at.contains_key(&key) {
            self.make_room(now);
        }
        let at = self.whole_at.entry(key).or_insert(now);
        *at = now.max(*at) + self.allowance.refill;
    }

    fn give_back<Q: Eq + Hash + ?Sized>(&mut self, key: &Q)
    where
        K: std::borrow::Borrow<Q>,
    {
        if let Some(at) = self.whole_at.get_mut(key)
            && let Some(earlier) = at.checked_sub(self.allowance.refill)
        {
            *at = earlier;
        }
    }

    fn forget<Q: Eq + Hash + ?Sized>(&mut self, key: &Q)
    where
        K: std::borrow::Borrow<Q>,
    {
        self.whole_at.remove(key);
    }

    /// Forgets who is whole again, and else the half nearest to it: many new
    /// keys push out each other, not the one that is being held back.
    fn make_room(&mut self, now: Instant) {
        self.whole_at.retain(|_, at| *at > now);
        if self.whole_at.len() < MAX_TRACKED {
            return;
        }
        let mut moments: Vec<Instant> = self.whole_at.values().copied().collect();
        let middle = moments.len() / 2;
        let (_, &mut median, _) = moments.select_nth_unstable(middle);
        let mut surplus = middle;
        self.whole_at.retain(|_, at| {
            let goes = *at <= median && surplus > 0;
            surplus -= usize::from(goes);
            !goes
        });
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn ip(text: &str) -> Option<IpAddr> {
        Some(text.parse().unwrap())
    }

    #[test]
    fn a_name_waits_after_its_burst_and_is_heard_again_when_told() {
        let (mut limiter, now) = (Limiter::new(), Instant::now());
        for n in 0..PER_USER.burst {
            assert_eq!(limiter.charge(now, "ada", ip(&format!("192.0.2.{n}"))), Ok(()));
        }
        let wait = limiter.charge(now, "ada", ip("198.51.100.1")).unwrap_err();
        assert_eq!(wait, PER_USER.refill);
        assert_eq!(limiter.charge(now + wait - Duration::from_nanos(1), "ada", None), Err(Duration::from_nanos(1)));
        assert_eq!(limiter.charge(now + wait, "ada", None), Ok(()));
        assert!(limiter.charge(now + wait, "ada", None).is_err());
        assert_eq!(limiter.charge(now, "bob", None), Ok(()), "another name is not held back");
    }

    #[test]
    fn a_source_waits_after_its_burst_whatever_the_names() {
        let (mut limiter, now) = (Limiter::new(), Instant::now());
        for n in 0..PER_SOURCE.burst {
            assert_eq!(limiter.charge(now, &format!("user{n}"), ip("192.0.2.1")), Ok(()));
        }
        assert_eq!(limiter.charge(now, "new", ip("192.0.2.1")), Err(PER_SOURCE.refill));
        assert_eq!(limiter.charge(now, "new", ip("::ffff:192.0.2.1")), Err(PER_SOURCE.refill));
        assert_eq!(limiter.charge(now, "new", ip("192.0.2.2")), Ok(()));
    }

    #[test]
    fn a_network_of_ipv6_counts_as_one() {
        let (mut limiter, now) = (Limiter::new(), Instant::now());
        for n in 0..PER_SOURCE.burst {
            assert_eq!(limiter.charge(now, &format!("user{n}"), ip(&format!("2001:db8::{n:x}"))), Ok(()));
        }
        assert!(limiter.charge(now, "new", ip("2001:db8::ffff")).is_err());
        assert_eq!(limiter.charge(now, "new", ip("2001:db8:0:1::1")), Ok(()));
    }

    #[test]
    fn success_costs_nothing() {
        let (mut limiter, now) = (Limiter::new(), Instant::now());
        for _ in 0..1000 {
            assert_eq!(limiter.charge(now, "ada", ip("192.0.2.1")), Ok(()));
            limiter.forgive("ada", ip("192.0.2.1"));
        }
    }

    #[test]
    fn success_of_one_name_does_not_clear_the_address() {
        let (mut limiter, now) = (Limiter::new(), Instant::now());
        for n in 1..PER_SOURCE.burst {
            assert_eq!(limiter.charge(now, &format!("user{n}"), ip("192.0.2.1")), Ok(()));
        }
        assert_eq!(limiter.charge(now, "mallory", ip("192.0.2.1")), Ok(()));
        limiter.forgive("mallory", ip("192.0.2.1"));
        assert_eq!(limiter.charge(now, "ada", ip("192.0.2.1")), Ok(()));
        assert!(limiter.charge(now, "ada", ip("192.0.2.1")).is_err());
    }

    #[test]
    fn many_names_neither_fill_memory_nor_free_the_one_held_back() {
        let (mut limiter, now) = (Limiter::new(), Instant::now());
        for _ in 0..PER_USER.burst {
            assert_eq!(limiter.charge(now, "ada", None), Ok(()));
        }
        for n in 0..10 * MAX_TRACKED {
            assert_eq!(limiter.charge(now, &format!("user{n}"), None), Ok(()));
            assert!(limiter.users.whole_at.len() <= MAX_TRACKED);
        }
        assert!(limiter.charge(now, "ada", None).is_err());
    }
}
