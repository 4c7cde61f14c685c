//! What machines are born from: one template for each kind of machine of each
//! tenant, made when the first of its kind starts.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
};

use qvd_core::{DesktopSpec, Digest, TenantName};
use qvd_virt::vm::Template;

use super::Failure;

/// What has to be the same for machines of one template. What memory shares can
/// be told by its timing, so no two tenants have one in common.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Kind {
    tenant: TenantName,
    image: Digest,
    memory_bytes: u64,
    millicpu: u32,
}

impl Kind {
    /// The kind of a desktop's machine.
    pub(crate) fn of(spec: &DesktopSpec) -> Self {
        let (memory_bytes, millicpu) = (spec.limits.memory.get(), spec.limits.cpu.0);
        Self { tenant: spec.tenant.clone(), image: spec.image, memory_bytes, millicpu }
    }
}

/// A place for a template; who makes one holds it, and others wait.
type Place = Arc<Mutex<Option<Arc<Template>>>>;

/// The templates of a node, for as long as it lives: its clones have their memory
/// in any case.
#[derive(Debug, Default)]
pub(crate) struct Templates {
    places: Mutex<HashMap<Kind, Place>>,
    /// One is made at a time: a boot takes all there is.
    making: Mutex<()>,
}

impl Templates {
    /// The template of a kind, made by `make` if there is none.
    pub(crate) fn of(
        &self,
        kind: &Kind,
        make: impl FnOnce() -> Result<Template, Failure>,
    ) -> Result<Arc<Template>, Failure> {
        let place = Arc::clone(lock(&self.places).entry(kind.clone()).or_default());
        let mut place = lock(&place);
        if let Some(template) = place.as_ref() {
            return Ok(Arc::clone(template));
        }
        let _alone = lock(&self.making);
        Ok(Arc::clone(place.insert(Arc::new(make()?))))
    }

    /// Forgets a template that does not fit any more. Clones of it run on.
    pub(crate) fn forget(&self, kind: &Kind, template: &Arc<Template>) {
        let place = lock(&self.places).get(kind).cloned();
        if let Some(place) = place {
            // Somebody may have made it anew.
            lock(&place).take_if(|there| Arc::ptr_eq(there, template));
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
