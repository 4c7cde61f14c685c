//! Clones that stand ready.

use std::{collections::VecDeque, time::Duration};

use crate::{
    Error,
    vm::{Vm, VmState},
};

/// Clones that stand ready, so that whoever comes need not wait for one.
#[derive(Debug)]
pub struct Pool {
    ready: VecDeque<Vm>,
    size: usize,
}

impl Pool {
    /// An empty pool that is to hold `size` machines.
    #[must_use]
    pub const fn new(size: usize) -> Self {
        Self { ready: VecDeque::new(), size }
    }

    /// Fills it with what `make` makes.
    ///
    /// # Errors
    /// What `make` says; those made so far stay.
    pub fn fill(&mut self, mut make: impl FnMut() -> Result<Vm, Error>) -> Result<(), Error> {
        while self.ready.len() < self.size {
            self.ready.push_back(make()?);
        }
        Ok(())
    }

    /// The one that has waited longest and still is there.
    pub fn take(&mut self) -> Option<Vm> {
        while let Some(mut vm) = self.ready.pop_front() {
            match vm.watch(Duration::ZERO) {
                Ok(VmState::Down(_)) | Err(_) => drop(vm),
                Ok(_) => return Some(vm),
            }
        }
        None
    }

    /// How many stand ready.
    #[must_use]
    pub fn len(&self) -> usize {
        self.ready.len()
    }

    /// Whether none does.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.ready.is_empty()
    }

    /// Ends them all. Idempotent; what fails stays.
    ///
    /// # Errors
    /// The first that does not go away.
    pub fn close(&mut self) -> Result<(), Error> {
        while let Some(vm) = self.ready.front_mut() {
            vm.close()?;
            self.ready.pop_front();
        }
        Ok(())
    }
}
