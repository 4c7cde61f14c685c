//! A gate that lets few through at once.

use std::sync::{Condvar, Mutex, PoisonError};

/// Lets at most so many do at once what makes the kernel work: more of them
/// would be no faster, and each would wait longer than it may.
#[derive(Debug)]
pub(crate) struct Gate {
    free: Mutex<usize>,
    freed: Condvar,
}

impl Gate {
    pub(crate) fn new(most: usize) -> Self {
        Self { free: Mutex::new(most.max(1)), freed: Condvar::new() }
    }

    /// Does it when it is this one's turn.
    pub(crate) fn through<T>(&self, work: impl FnOnce() -> T) -> T {
        let free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        let mut free = self.freed.wait_while(free, |free| *free == 0).unwrap_or_else(PoisonError::into_inner);
        *free -= 1;
        drop(free);
        // Given back also when the work panics.
        let _place = Place(self);
        work()
    }
}

struct Place<'a>(&'a Gate);

impl Drop for Place<'_> {
    fn drop(&mut self) {
        *self.0.free.lock().unwrap_or_else(PoisonError::into_inner) += 1;
        self.0.freed.notify_one();
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::{
        sync::{
            Barrier,
            atomic::{AtomicUsize, Ordering},
        },
        thread,
    };

    use super::*;

    #[test]
    fn no_more_than_so_many_are_inside_and_all_come_through() {
        let (gate, inside, most, done) = (Gate::new(3), AtomicUsize::new(0), AtomicUsize::new(0), AtomicUsize::new(0));
        let begin = Barrier::new(20);
        thread::scope(|scope| {
            for _ in 0..20 {
                scope.spawn(|| {
                    begin.wait();
                    gate.through(|| {
                        most.fetch_max(inside.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
                        thread::yield_now();
                        inside.fetch_sub(1, Ordering::SeqCst);
                    });
                    done.fetch_add(1, Ordering::SeqCst);
                });
            }
        });
        assert!(most.load(Ordering::SeqCst) <= 3);
        assert_eq!(done.load(Ordering::SeqCst), 20);
    }

    #[test]
    fn a_panic_gives_its_place_back() {
        let gate = Gate::new(1);
        let broken = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| gate.through(|| panic!("as it should"))));
        assert!(broken.is_err());
        assert_eq!(gate.through(|| 7), 7);
    }
}
