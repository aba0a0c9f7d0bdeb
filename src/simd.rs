//! CPU tiers: the same scalar body compiled for several instruction sets, chosen once a process.
//!
//! A body is written with fixed lane counts and without fused multiply-add, so that every tier gives the same bits; the
//! tiers differ in speed alone. `BIASCORR_MAX_ISA` (`baseline`, `avx2`, `avx512`) forces a lower tier. Every armv8-a CPU has
//! NEON, which the bodies are compiled for there as they are.

use std::sync::OnceLock;

/// An instruction set that kernels are compiled for, lowest first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Tier {
    /// Plain x86-64.
    Baseline,
    /// armv8-a.
    Neon,
    /// AVX2, FMA and F16C.
    Avx2,
    /// AVX-512 F, BW, DQ and VL.
    Avx512,
}

impl Tier {
    const ALL: [Tier; 4] = [Tier::Baseline, Tier::Neon, Tier::Avx2, Tier::Avx512];

    /// The name that `BIASCORR_MAX_ISA` and `show_config` use.
    pub fn name(self) -> &'static str {
        match self {
            Tier::Baseline => "baseline",
            Tier::Neon => "neon",
            Tier::Avx2 => "avx2",
            Tier::Avx512 => "avx512",
        }
    }

    fn from_name(name: &str) -> Option<Tier> {
        Tier::ALL.into_iter().find(|tier| tier.name() == name)
    }
}

/// The tier in use: the best of this CPU, at most `BIASCORR_MAX_ISA`. An unknown name limits nothing.
pub fn tier() -> Tier {
    static TIER: OnceLock<Tier> = OnceLock::new();
    *TIER.get_or_init(|| {
        let limit = std::env::var("BIASCORR_MAX_ISA").ok().and_then(|name| Tier::from_name(&name));
        limit.map_or(probe(), |limit| limit.min(probe()))
    })
}

#[cfg(target_arch = "x86_64")]
fn probe() -> Tier {
    let avx2 = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c");
    let avx512 = is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512dq")
        && is_x86_feature_detected!("avx512vl");
    match (avx2, avx512) {
        (true, true) => Tier::Avx512,
        (true, false) => Tier::Avx2,
        _ => Tier::Baseline,
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn probe() -> Tier {
    if cfg!(target_arch = "aarch64") { Tier::Neon } else { Tier::Baseline }
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
            fn avx2<$($t: $bound),*>($($arg: $ty),*) $(-> $out)? {
                $body($crate::simd::Tier::Avx2, $($arg),*)
            }
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")]
            fn avx512<$($t: $bound),*>($($arg: $ty),*) $(-> $out)? {
                $body($crate::simd::Tier::Avx512, $($arg),*)
            }
            #[cfg(target_arch = "x86_64")]
            #[expect(unsafe_code, reason = "calls a clone that needs CPU features")]
            match $crate::simd::tier() {
                // SAFETY: `tier` has probed this CPU for exactly the features of the clone.
                $crate::simd::Tier::Avx512 => return unsafe { avx512::<$($t),*>($($arg),*) },
                // SAFETY: as above.
                $crate::simd::Tier::Avx2 => return unsafe { avx2::<$($t),*>($($arg),*) },
                _ => {}
            }
            $body($crate::simd::Tier::Baseline, $($arg),*)
        }
    };
}
pub(crate) use tiered;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_back() {
        for tier in Tier::ALL {
            assert_eq!(Tier::from_name(tier.name()), Some(tier));
        }
        assert_eq!(Tier::from_name("sse9"), None);
    }

    #[test]
    fn the_tier_is_at_most_what_the_cpu_has() {
        assert!(tier() <= probe());
    }
}
