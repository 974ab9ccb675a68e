//! Vector registers: [`lanes`] for the loss, [`doubles`] for the solver, and the instruction sets of both.

#[cfg(target_arch = "x86_64")]
pub(crate) mod avx2;
#[cfg(target_arch = "x86_64")]
pub(crate) mod avx512;
pub(crate) mod doubles;
pub(crate) mod lanes;
