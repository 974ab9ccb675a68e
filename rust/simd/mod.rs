//! Vector registers, and which instructions run.
//!
//! The loss is written over the registers of [`lanes`], the solver over those of [`doubles`]. Both are compiled for
//! every set of instructions, and the widest set of the processor runs.
//!
//! The environment variable `BANDPO_SIMD` limits the choice: `portable`, `avx2` or `avx512` is the widest set that
//! may run. It is read once. Under `portable`, `x86_64` solves every token by the scalar solver, because vectors of
//! doubles need fused multiply-adds.

/// Methods of intrinsics that need nothing but the instructions.
#[cfg(target_arch = "x86_64")]
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
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
pub(crate) mod doubles;
pub(crate) mod exp_log;
mod interleaved;
pub(crate) mod lanes;
mod lookup;
pub(crate) mod pairs;
mod portable;
#[cfg(test)]
mod tests;
mod wide;

use std::env;
use std::sync::LazyLock;

use crate::error::{Error, Result};
#[cfg(target_arch = "x86_64")]
use crate::simd::avx2::{Avx2, Avx2Fused};
#[cfg(target_arch = "x86_64")]
use crate::simd::avx512::Avx512;
use crate::simd::doubles::Doubles;
use crate::simd::exp_log::Exponentials;
use crate::simd::interleaved::Interleaved;
use crate::simd::lookup::LookUp;
use crate::simd::portable::{Portable, PortableDoubles};
use crate::simd::wide::Wide;

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
    const NAMES: [(&str, Self); 3] =
        [("portable", Self::Portable), ("avx2", Self::Avx2), ("avx512", Self::Avx512)];

    fn from_environment() -> Result<Self> {
        let Some(value) = env::var_os(SWITCH) else { return Ok(Self::Avx512) };
        let named = Self::NAMES.iter().find(|(name, _)| value == *name);
        named.map(|&(_, level)| level).ok_or_else(|| Error::Argument {
            argument: SWITCH,
            value: format!("{:?}", value.to_string_lossy()),
            allowed: "portable, avx2 or avx512",
        })
    }
}

/// Registers of the loss in float32 that the processor has.
#[derive(Debug, Clone, Copy)]
enum AnyLanes {
    Portable,
    #[cfg(target_arch = "x86_64")]
    Avx2(Avx2),
    #[cfg(target_arch = "x86_64")]
    Avx512(Avx512),
}

impl AnyLanes {
    /// All registers, from narrow to wide.
    #[cfg(test)]
    fn all() -> Vec<Self> {
        Self::up_to(Level::Avx512)
    }

    /// Registers up to a level, from narrow to wide.
    #[cfg_attr(not(target_arch = "x86_64"), allow(unused))]
    fn up_to(level: Level) -> Vec<Self> {
        let mut found = vec![Self::Portable];
        #[cfg(target_arch = "x86_64")]
        {
            found.extend(Avx2::new().filter(|_| level >= Level::Avx2).map(Self::Avx2));
            found.extend(Avx512::new().filter(|_| level >= Level::Avx512).map(Self::Avx512));
        }
        found
    }

    fn run<W: WithLanes<f32>>(self, work: W) -> W::Output {
        match self {
            Self::Portable => work.run(Portable),
            #[cfg(target_arch = "x86_64")]
            Self::Avx2(lanes) => lanes.run(work),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512(lanes) => lanes.run(work),
        }
    }
}

/// Registers of the solver, and of the loss in float64, that the processor has.
#[derive(Debug, Clone, Copy)]
pub(crate) enum AnyDoubles {
    Portable,
    #[cfg(target_arch = "x86_64")]
    Avx2(Avx2Fused),
    #[cfg(target_arch = "x86_64")]
    Avx512(Avx512),
}

impl AnyDoubles {
    /// All registers, from narrow to wide.
    #[cfg(test)]
    pub(crate) fn all() -> Vec<Self> {
        Self::up_to(Level::Avx512)
    }

    /// Registers up to a level, from narrow to wide.
    #[cfg_attr(not(target_arch = "x86_64"), allow(unused))]
    fn up_to(level: Level) -> Vec<Self> {
        let mut found = vec![Self::Portable];
        #[cfg(target_arch = "x86_64")]
        {
            found.extend(Avx2Fused::new().filter(|_| level >= Level::Avx2).map(Self::Avx2));
            found.extend(Avx512::new().filter(|_| level >= Level::Avx512).map(Self::Avx512));
        }
        found
    }

    /// True if the compiler fuses multiply-adds of the portable registers.
    const PORTABLE_FUSES: bool = cfg!(target_arch = "aarch64");

    /// True if the processor fuses multiply-adds in these registers. Otherwise they are slower than scalars.
    fn fuses(self) -> bool {
        Self::PORTABLE_FUSES || !matches!(self, Self::Portable)
    }

    pub(crate) fn run<W: WithDoubles>(self, work: W) {
        match self {
            // Registers that do not fuse run in tests alone, and need not be compiled otherwise.
            Self::Portable if !(Self::PORTABLE_FUSES || cfg!(test)) => {}
            Self::Portable if W::NARROW => work.run(PortableDoubles),
            Self::Portable => work.run(Interleaved(PortableDoubles)),
            #[cfg(target_arch = "x86_64")]
            Self::Avx2(lanes) => lanes.run(work),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512(lanes) => lanes.run_doubles(work),
        }
    }

    fn run_loss<W: WithLanes<f64>>(self, work: W) -> W::Output {
        match self {
            Self::Portable => work.run(Wide(Interleaved(PortableDoubles))),
            #[cfg(target_arch = "x86_64")]
            Self::Avx2(lanes) => lanes.run_loss(work),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512(lanes) => lanes.run_loss(work),
        }
    }
}

/// Widest registers that may run.
struct Widest {
    lanes: AnyLanes,
    doubles: AnyDoubles,
}

static WIDEST: LazyLock<Result<Widest>> = LazyLock::new(|| {
    let level = Level::from_environment()?;
    Ok(Widest {
        lanes: AnyLanes::up_to(level).pop().unwrap_or(AnyLanes::Portable),
        doubles: AnyDoubles::up_to(level).pop().unwrap_or(AnyDoubles::Portable),
    })
});

/// Refuses a [`SWITCH`] that names no level. Python checks on import, otherwise the first use of vectors panics.
#[cfg(feature = "python")]
pub(crate) fn check() -> Result<()> {
    WIDEST.as_ref().map(|_| ()).map_err(Clone::clone)
}

/// Name of the widest instructions that run in the loss.
#[cfg(feature = "python")]
pub(crate) fn level() -> &'static str {
    let level = match widest().lanes {
        AnyLanes::Portable => Level::Portable,
        #[cfg(target_arch = "x86_64")]
        AnyLanes::Avx2(_) => Level::Avx2,
        #[cfg(target_arch = "x86_64")]
        AnyLanes::Avx512(_) => Level::Avx512,
    };
    Level::NAMES[level as usize].0
}

fn widest() -> &'static Widest {
    WIDEST.as_ref().unwrap_or_else(|error| panic!("{error}"))
}

/// Registers with all functions of the loss.
pub trait LossLanes: Exponentials + LookUp {}
impl<L: Exponentials + LookUp> LossLanes for L {}

/// Work of the loss on registers of any width.
pub trait WithLanes<T> {
    type Output;
    fn run<L: LossLanes<Scalar = T>>(self, lanes: L) -> Self::Output;
}

/// Work of the solver on registers of any width.
pub(crate) trait WithDoubles {
    /// True for work on half as many lanes.
    const NARROW: bool = false;
    fn run<L: Doubles>(self, lanes: L);
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
        widest().lanes.run(work)
    }

    fn to_f64(self) -> f64 {
        f64::from(self)
    }
}

impl Number for f64 {
    const ZERO: Self = 0.0;

    fn run<W: WithLanes<Self>>(work: W) -> W::Output {
        widest().doubles.run_loss(work)
    }

    fn to_f64(self) -> f64 {
        self
    }
}

/// Does the work on the widest doubles that may run. Returns false, and does nothing, if they do not fuse
/// multiply-adds.
pub(crate) fn run_doubles<W: WithDoubles>(work: W) -> bool {
    let doubles = widest().doubles;
    let fuses = doubles.fuses();
    if fuses {
        doubles.run(work);
    }
    fuses
}
