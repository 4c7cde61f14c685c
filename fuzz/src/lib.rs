//! The targets of `qvd-fuzz` for libFuzzer.

#[doc(hidden)]
pub use {libfuzzer_sys, qvd_fuzz};

/// Gives the target of this name what libFuzzer makes.
#[macro_export]
macro_rules! fuzz {
    ($name:literal) => {
        thread_local! {
            static WORLD: $crate::qvd_fuzz::World = $crate::qvd_fuzz::World::new();
        }
        $crate::libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
            WORLD.with(|world| ($crate::qvd_fuzz::named($name).run)(world, bytes));
        });
    };
}
