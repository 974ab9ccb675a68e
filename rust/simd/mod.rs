//! Vector registers, and which instructions run.
//!
//! The loss is written over the registers of [`lanes`], the solver over those of [`doubles`]. Both are compiled for
//! every set of instructions, and the widest set of the processor runs.
//!
//! The environment variable `BANDPO_SIMD` limits the choice: `portable`, `avx2` or `avx512` is the widest set that
//! may run. It is read once. Under `portable`, `x86_64` solves every token by the scalar solver, because vectors of
//! doubles need fused multiply-adds.

#[cfg(target_arch = "x86_64")]
/// Methods of intrinsics that need nothing but the instructions.
macro_rules! instructions {
    ($(fn $name:ident($self:ident $(, $argument:ident: $kind:ty)*) -> $result:ty $body:block)*) => {$(
        #[inline(always)]
        fn $name($self $(, $argument: $kind)*) -> $result {
            // SAFETY: a register of this type exists only where the processor has the instructions.
            unsafe { $body }
        }
    )*};
}

#[cfg(target_arch = "x86_64")]
pub(crate) mod avx2;
#[cfg(target_arch = "x86_64")]
pub(crate) mod avx512;
pub(crate) mod doubles;
mod interleaved;
pub(crate) mod lanes;
mod lookup;
pub(crate) mod math;
pub(crate) mod portable;
#[cfg(test)]
mod tests;

use std::env;
use std::sync::LazyLock;

use crate::error::{Error, Result};
#[cfg(target_arch = "x86_64")]
use crate::simd::avx2::{Avx2, Avx2Fused};
#[cfg(target_arch = "x86_64")]
use crate::simd::avx512::Avx512;
use crate::simd::interleaved::Interleaved;
use crate::simd::lookup::LookUp;
use crate::simd::math::Exponentials;
use crate::simd::portable::{Double, Portable, PortableDoubles};

/// Environment variable that names a [`Level`].
const SWITCH: &str = "BANDPO_SIMD";

/// Widest instructions that may run.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Level {
    Portable,
    Avx2,
    Avx512,
}

impl Level {
    fn from_environment() -> Result<Self> {
        let Some(value) = env::var_os(SWITCH) else { return Ok(Self::Avx512) };
        match value.to_str() {
            Some("portable") => Ok(Self::Portable),
            Some("avx2") => Ok(Self::Avx2),
            Some("avx512") => Ok(Self::Avx512),
            _ => Err(Error::Argument {
                argument: SWITCH,
                value: format!("{:?}", value.to_string_lossy()),
                allowed: "portable, avx2 or avx512",
            }),
        }
    }
}

/// Registers that the processor has and [`SWITCH`] allows.
struct Available {
    #[cfg(target_arch = "x86_64")]
    avx512: Option<Avx512>,
    #[cfg(target_arch = "x86_64")]
    avx2: Option<Avx2>,
    #[cfg(target_arch = "x86_64")]
    avx2_fused: Option<Avx2Fused>,
}

impl Available {
    #[cfg_attr(not(target_arch = "x86_64"), allow(unused_variables))]
    fn up_to(level: Level) -> Self {
        Self {
            #[cfg(target_arch = "x86_64")]
            avx512: Avx512::new().filter(|_| level >= Level::Avx512),
            #[cfg(target_arch = "x86_64")]
            avx2: Avx2::new().filter(|_| level >= Level::Avx2),
            #[cfg(target_arch = "x86_64")]
            avx2_fused: Avx2Fused::new().filter(|_| level >= Level::Avx2),
        }
    }
}

static AVAILABLE: LazyLock<Result<Available>> =
    LazyLock::new(|| Level::from_environment().map(Available::up_to));

/// Refuses a [`SWITCH`] that names no level. Python checks on import, otherwise the first use of vectors panics.
#[cfg(feature = "python")]
pub(crate) fn check() -> Result<()> {
    AVAILABLE.as_ref().map(|_| ()).map_err(Clone::clone)
}

/// Name of the widest instructions that run.
#[cfg(feature = "python")]
pub(crate) fn level() -> &'static str {
    #[cfg(target_arch = "x86_64")]
    {
        let available = available();
        if available.avx512.is_some() {
            return "avx512";
        }
        if available.avx2.is_some() {
            return "avx2";
        }
    }
    "portable"
}

#[cfg(target_arch = "x86_64")]
fn available() -> &'static Available {
    AVAILABLE.as_ref().unwrap_or_else(|error| panic!("{error}"))
}

/// Registers with all functions of the loss.
pub trait LossLanes: Exponentials + LookUp {}
impl<L: Exponentials + LookUp> LossLanes for L {}

/// Work on registers of any width.
pub trait WithLanes<T> {
    type Output;
    fn run<L: LossLanes<Scalar = T>>(self, lanes: L) -> Self::Output;
}

/// Number in a lane of the loss.
pub trait Number: Copy {
    const ZERO: Self;
    /// Does the work on the widest registers that may run.
    fn run<W: WithLanes<Self>>(work: W) -> W::Output;
    fn to_f64(self) -> f64;
}

impl Number for f32 {
    const ZERO: Self = 0.0;

    fn run<W: WithLanes<Self>>(work: W) -> W::Output {
        #[cfg(target_arch = "x86_64")]
        {
            let available = available();
            if let Some(lanes) = available.avx512 {
                return lanes.run(work);
            }
            if let Some(lanes) = available.avx2 {
                return lanes.run(work);
            }
        }
        work.run(Portable)
    }

    fn to_f64(self) -> f64 {
        f64::from(self)
    }
}

impl Number for f64 {
    const ZERO: Self = 0.0;

    fn run<W: WithLanes<Self>>(work: W) -> W::Output {
        work.run(Double)
    }

    fn to_f64(self) -> f64 {
        self
    }
}

/// Does the work on the widest doubles that may run. Returns false, and does nothing, if none has fused
/// multiply-adds.
pub(crate) fn widest<W: doubles::Work>(work: W) -> bool {
    #[cfg(target_arch = "x86_64")]
    {
        let available = available();
        if let Some(lanes) = available.avx512 {
            lanes.run_doubles(work);
            return true;
        }
        if let Some(lanes) = available.avx2_fused {
            lanes.run_doubles(work);
            return true;
        }
    }
    if cfg!(target_arch = "aarch64") {
        work.run(Interleaved(PortableDoubles));
        return true;
    }
    false
}
