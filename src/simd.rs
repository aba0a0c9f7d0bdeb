//! CPU tiers: the same scalar body compiled for several instruction sets, chosen once a process.
//!
//! A body is written with fixed lane counts and without fused multiply-add, so that every tier gives the same bits; the
//! tiers differ in speed alone. `BIASCORR_MAX_ISA` (`baseline`, `avx2`, `avx512`) forces a lower tier. Every armv8-a CPU has
//! NEON, which the bodies are compiled for there as they are.

use std::sync::atomic::{AtomicU8, Ordering};

use crate::error::Error;

/// An instruction set that kernels are compiled for, lowest first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Isa {
    /// Plain x86-64, or whatever else this was compiled for.
    Baseline,
    /// armv8-a.
    Neon,
    /// AVX2, FMA and F16C.
    Avx2,
    /// AVX-512 F, BW, DQ and VL.
    Avx512,
}

/// Proof that this CPU has an instruction set: made by [`tier`] and by nothing else, so that whoever holds one may call what was
/// compiled for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Tier(Isa);

impl Tier {
    /// What the CPU has at least.
    #[inline(always)]
    pub fn isa(self) -> Isa {
        self.0
    }

    /// The name that `BIASCORR_MAX_ISA` and `show_config` use.
    pub fn name(self) -> &'static str {
        self.0.name()
    }

    /// # Safety
    /// The CPU has the instruction set.
    #[expect(unsafe_code, reason = "inside a clone the tier is a constant, which the compiler can see")]
    #[inline(always)]
    pub(crate) const unsafe fn proven(isa: Isa) -> Tier {
        Tier(isa)
    }
}

/// Those that some CPU of this architecture has.
#[cfg(target_arch = "x86_64")]
const KNOWN: &[Isa] = &[Isa::Baseline, Isa::Avx2, Isa::Avx512];
#[cfg(target_arch = "aarch64")]
const KNOWN: &[Isa] = &[Isa::Baseline, Isa::Neon];
#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
const KNOWN: &[Isa] = &[Isa::Baseline];

impl Isa {
    fn name(self) -> &'static str {
        match self {
            Isa::Baseline => "baseline",
            Isa::Neon => "neon",
            Isa::Avx2 => "avx2",
            Isa::Avx512 => "avx512",
        }
    }

    fn from_name(name: &str) -> Result<Isa, Error> {
        let known = KNOWN.iter().copied();
        known.clone().find(|isa| isa.name() == name).ok_or_else(|| Error::Isa {
            found: name.to_owned(),
            known: known.map(|isa| format!("{:?}", isa.name())).collect::<Vec<_>>().join(", "),
        })
    }
}

/// The limit that the environment sets, if any.
fn limit() -> Result<Option<Isa>, Error> {
    std::env::var_os("BIASCORR_MAX_ISA").map(|name| Isa::from_name(&name.to_string_lossy())).transpose()
}

/// Fails where `BIASCORR_MAX_ISA` names no instruction set of this architecture. [`tier`] takes it for no limit.
pub fn check_limit() -> Result<(), Error> {
    limit().map(drop)
}

/// The tier in use: the best of this CPU, at most `BIASCORR_MAX_ISA`.
pub fn tier() -> Tier {
    /// 1 more than the place of the tier in use in [`KNOWN`]; 0 before it was asked for. No lock: a forked child could find it held.
    static PLACE: AtomicU8 = AtomicU8::new(0);
    match usize::from(PLACE.load(Ordering::Relaxed)) {
        0 => {
            let isa = limit().ok().flatten().map_or(probe(), |limit| limit.min(probe()));
            let place = KNOWN.iter().position(|&known| known == isa).map_or(0, |at| at as u8 + 1);
            PLACE.store(place, Ordering::Relaxed);
            Tier(isa)
        }
        place => Tier(KNOWN[place - 1]),
    }
}

#[cfg(target_arch = "x86_64")]
fn probe() -> Isa {
    let avx2 = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c");
    let avx512 = is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512dq")
        && is_x86_feature_detected!("avx512vl");
    match (avx2, avx512) {
        (true, true) => Isa::Avx512,
        (true, false) => Isa::Avx2,
        _ => Isa::Baseline,
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn probe() -> Isa {
    if cfg!(target_arch = "aarch64") { Isa::Neon } else { Isa::Baseline }
}

/// Defines a function that runs an `#[inline(always)]` body compiled for the tier in use, which is its first argument.
///
/// `tiered!(fn name<T: Bound>(argument: Type, ...) -> Output = body);`
macro_rules! tiered {
    ($(#[$doc:meta])* $vis:vis fn $name:ident<$($t:ident: $bound:path),*>($($arg:ident: $ty:ty),* $(,)?)
     $(-> $out:ty)? = $body:path) => {
        $(#[$doc])*
        $vis fn $name<$($t: $bound),*>($($arg: $ty),*) $(-> $out)? {
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma,f16c")]
            #[expect(unsafe_code, reason = "the clone says what the CPU has")]
            fn avx2<$($t: $bound),*>($($arg: $ty),*) $(-> $out)? {
                // SAFETY: these are the features of the clone.
                $body(unsafe { $crate::simd::Tier::proven($crate::simd::Isa::Avx2) }, $($arg),*)
            }
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")]
            #[expect(unsafe_code, reason = "as above")]
            fn avx512<$($t: $bound),*>($($arg: $ty),*) $(-> $out)? {
                // SAFETY: as above.
                $body(unsafe { $crate::simd::Tier::proven($crate::simd::Isa::Avx512) }, $($arg),*)
            }
            let tier = $crate::simd::tier();
            #[cfg(target_arch = "x86_64")]
            #[expect(unsafe_code, reason = "calls a clone that needs CPU features")]
            match tier.isa() {
                // SAFETY: the tier proves that this CPU has exactly the features of the clone.
                $crate::simd::Isa::Avx512 => return unsafe { avx512::<$($t),*>($($arg),*) },
                // SAFETY: as above.
                $crate::simd::Isa::Avx2 => return unsafe { avx2::<$($t),*>($($arg),*) },
                _ => {}
            }
            $body(tier, $($arg),*)
        }
    };
}
pub(crate) use tiered;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_back() {
        for &isa in KNOWN {
            assert_eq!(Isa::from_name(isa.name()), Ok(isa));
        }
        for name in ["sse9", "", "AVX2", "avx2 "] {
            assert!(matches!(Isa::from_name(name), Err(Error::Isa { found, .. }) if found == name));
        }
    }

    #[test]
    fn the_tier_is_at_most_what_the_cpu_has() {
        assert!(tier().isa() <= probe());
        assert!(KNOWN.contains(&probe()));
        assert_eq!(tier(), tier());
    }
}
