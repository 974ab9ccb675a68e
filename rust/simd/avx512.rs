//! Registers of AVX-512: sixteen float32 or eight float64. Single operations alone; exponentials and logarithms
//! of every register are in `exp_log.rs`.

// A function of vectors has to become part of one that is compiled for their instructions.
#![allow(clippy::inline_always, clippy::wildcard_imports)]

use std::arch::x86_64::*;

use crate::simd::avx2::Avx2;
use crate::simd::doubles::Doubles;
use crate::simd::interleaved::Interleaved;
use crate::simd::lanes::{FloatBits, Lanes};
use crate::simd::wide::{LossDoubles, Wide};
use crate::simd::{WithDoubles, WithLanes};

/// Exists only where the processor has AVX-512 F, BW, DQ and VL.
#[derive(Debug, Clone, Copy)]
pub struct Avx512(());

impl Avx512 {
    /// `None` where the processor lacks an instruction.
    pub fn new() -> Option<Self> {
        (is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vl"))
        .then_some(Self(()))
    }

    /// Does the work in a function that is compiled for these instructions.
    pub fn run<W: WithLanes<f32>>(self, work: W) -> W::Output {
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,popcnt")]
        fn compiled<W: WithLanes<f32>>(lanes: Avx512, work: W) -> W::Output {
            work.run(lanes)
        }
        // SAFETY: `self` exists, so the processor has the instructions. All that have AVX-512 have popcnt.
        unsafe { compiled(self, work) }
    }

    /// Does work on doubles in a function that is compiled for these instructions.
    pub fn run_doubles<W: WithDoubles>(self, work: W) {
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,popcnt")]
        fn compiled<W: WithDoubles>(lanes: Avx512, work: W) {
            if W::NARROW {
                work.run(Interleaved(lanes));
            } else {
                work.run(Interleaved(Interleaved(lanes)));
            }
        }
        // SAFETY: as in `run`.
        unsafe { compiled(self, work) }
    }

    /// Does work of the loss in float64 in a function that is compiled for these instructions.
    pub fn run_loss<W: WithLanes<f64>>(self, work: W) -> W::Output {
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,popcnt")]
        fn compiled<W: WithLanes<f64>>(lanes: Avx512, work: W) -> W::Output {
            work.run(Wide(lanes))
        }
        // SAFETY: as in `run`.
        unsafe { compiled(self, work) }
    }
}

impl Lanes for Avx512 {
    type Scalar = f32;
    type Float = __m512;
    type Mask = __mmask16;
    const COUNT: usize = 16;

    #[inline(always)]
    fn load(self, from: &[f32]) -> __m512 {
        // SAFETY: `self` exists, so the processor has the instructions; `from` has 16 elements.
        unsafe { _mm512_loadu_ps(from[..16].as_ptr()) }
    }
    #[inline(always)]
    fn store(self, values: __m512, to: &mut [f32]) {
        // SAFETY: `self` exists, so the processor has the instructions; `to` has 16 elements.
        unsafe {
            _mm512_storeu_ps(to[..16].as_mut_ptr(), values);
        }
    }
    #[inline(always)]
    fn load_mask(self, from: &[u8]) -> __mmask16 {
        // SAFETY: `self` exists, so the processor has the instructions; `from` has 16 elements.
        unsafe {
            let bytes = _mm_loadu_si128(from[..16].as_ptr().cast());
            _mm_test_epi8_mask(bytes, bytes)
        }
    }
    #[inline(always)]
    fn and(self, a: __mmask16, b: __mmask16) -> __mmask16 {
        a & b
    }
    #[inline(always)]
    fn or(self, a: __mmask16, b: __mmask16) -> __mmask16 {
        a | b
    }
    #[inline(always)]
    fn and_not(self, a: __mmask16, b: __mmask16) -> __mmask16 {
        a & !b
    }
    #[inline(always)]
    fn bits(self, mask: __mmask16) -> u32 {
        u32::from(mask)
    }
    #[inline(always)]
    fn mask_of(self, bits: u32) -> __mmask16 {
        bits as __mmask16
    }
    #[inline(always)]
    fn compress(self, mask: __mmask16, a: __m512, to: &mut [f32]) {
        // A compressing store would be microcode on some processors.
        // SAFETY: `self` exists, so the processor has the instructions; `to` has 16 elements.
        unsafe {
            _mm512_storeu_ps(to[..16].as_mut_ptr(), _mm512_maskz_compress_ps(mask, a));
        }
    }
    #[inline(always)]
    fn expand(self, mask: __mmask16, from: &[f32]) -> __m512 {
        // SAFETY: `self` exists, so the processor has the instructions; `from` has 16 elements.
        unsafe { _mm512_maskz_expand_ps(mask, _mm512_loadu_ps(from[..16].as_ptr())) }
    }

    instructions! {
        fn splat(self, value: f64) -> __m512 { _mm512_set1_ps(value as f32) }
        fn add(self, a: __m512, b: __m512) -> __m512 { _mm512_add_ps(a, b) }
        fn sub(self, a: __m512, b: __m512) -> __m512 { _mm512_sub_ps(a, b) }
        fn mul(self, a: __m512, b: __m512) -> __m512 { _mm512_mul_ps(a, b) }
        fn div(self, a: __m512, b: __m512) -> __m512 { _mm512_div_ps(a, b) }
        fn abs(self, a: __m512) -> __m512 { _mm512_abs_ps(a) }
        fn min(self, a: __m512, b: __m512) -> __m512 { _mm512_min_ps(a, b) }
        fn max(self, a: __m512, b: __m512) -> __m512 { _mm512_max_ps(a, b) }
        // The instruction returns its second operand if either is NaN.
        fn clamp_max(self, limit: f64, a: __m512) -> __m512 {
            _mm512_min_ps(_mm512_set1_ps(limit as f32), a)
        }
        fn clamp_min(self, limit: f64, a: __m512) -> __m512 {
            _mm512_max_ps(_mm512_set1_ps(limit as f32), a)
        }
        fn less(self, a: __m512, b: __m512) -> __mmask16 { _mm512_cmp_ps_mask::<_CMP_LT_OQ>(a, b) }
        fn less_or_equal(self, a: __m512, b: __m512) -> __mmask16 {
            _mm512_cmp_ps_mask::<_CMP_LE_OQ>(a, b)
        }
        fn is_nan(self, a: __m512) -> __mmask16 { _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(a, a) }
        fn select(self, mask: __mmask16, a: __m512, b: __m512) -> __m512 {
            _mm512_mask_blend_ps(mask, b, a)
        }
    }
}

impl FloatBits for Avx512 {
    type Words = __m512i;

    #[inline(always)]
    fn pick(self, row: &[u32; 16], index: __m512i, _: __mmask16) -> __m512i {
        // SAFETY: `self` exists, so the processor has the instructions; the row has 16 words.
        unsafe { _mm512_permutexvar_epi32(index, _mm512_loadu_si512(row.as_ptr().cast())) }
    }
    #[inline(always)]
    unsafe fn gather(self, words: &[u32], index: __m512i) -> __m512i {
        // SAFETY: `self` exists, so the processor has the instructions; the caller keeps the indices inside.
        unsafe { _mm512_i32gather_epi32::<4>(index, words.as_ptr().cast()) }
    }
    #[inline(always)]
    unsafe fn gather_four(self, words: &[u32], index: __m512i) -> [__m512; 4] {
        // Sixteen loads and a transposition: several times as fast as four gathers in microcode, and no slower
        // than gathers elsewhere.
        // SAFETY: `self` exists, so the processor has the instructions; the caller keeps the indices inside.
        unsafe {
            let mut places = [0_u32; 16];
            _mm512_storeu_si512(places.as_mut_ptr().cast(), index);
            let four =
                |token: usize| _mm_loadu_ps(words.as_ptr().add(places[token] as usize).cast());
            let every_fourth = |first: usize| {
                let vector = _mm512_castps128_ps512(four(first));
                let vector = _mm512_insertf32x4::<1>(vector, four(first + 4));
                let vector = _mm512_insertf32x4::<2>(vector, four(first + 8));
                _mm512_insertf32x4::<3>(vector, four(first + 12))
            };
            let (a, b, c, d) = (every_fourth(0), every_fourth(1), every_fourth(2), every_fourth(3));
            let (ab, cd) = (_mm512_unpacklo_ps(a, b), _mm512_unpacklo_ps(c, d));
            let (ab_high, cd_high) = (_mm512_unpackhi_ps(a, b), _mm512_unpackhi_ps(c, d));
            let (ab, cd) = (_mm512_castps_pd(ab), _mm512_castps_pd(cd));
            let (ab_high, cd_high) = (_mm512_castps_pd(ab_high), _mm512_castps_pd(cd_high));
            [
                _mm512_castpd_ps(_mm512_unpacklo_pd(ab, cd)),
                _mm512_castpd_ps(_mm512_unpackhi_pd(ab, cd)),
                _mm512_castpd_ps(_mm512_unpacklo_pd(ab_high, cd_high)),
                _mm512_castpd_ps(_mm512_unpackhi_pd(ab_high, cd_high)),
            ]
        }
    }

    instructions! {
        fn words(self, value: u32) -> __m512i { _mm512_set1_epi32(value as i32) }
        fn as_words(self, a: __m512) -> __m512i { _mm512_castps_si512(a) }
        fn as_floats(self, a: __m512i) -> __m512 { _mm512_castsi512_ps(a) }
        fn add_words(self, a: __m512i, b: __m512i) -> __m512i { _mm512_add_epi32(a, b) }
        fn sub_words(self, a: __m512i, b: __m512i) -> __m512i { _mm512_sub_epi32(a, b) }
        fn and_words(self, a: __m512i, b: __m512i) -> __m512i { _mm512_and_si512(a, b) }
        fn or_words(self, a: __m512i, b: __m512i) -> __m512i { _mm512_or_si512(a, b) }
        fn shift_left(self, a: __m512i, by: __m512i) -> __m512i { _mm512_sllv_epi32(a, by) }
        fn shift_right(self, a: __m512i, by: __m512i) -> __m512i { _mm512_srlv_epi32(a, by) }
        fn min_words(self, a: __m512i, b: __m512i) -> __m512i { _mm512_min_epu32(a, b) }
        fn max_words(self, a: __m512i, b: __m512i) -> __m512i { _mm512_max_epu32(a, b) }
        fn select_words(self, mask: __mmask16, a: __m512i, b: __m512i) -> __m512i {
            _mm512_mask_blend_epi32(mask, b, a)
        }
    }
}

impl Doubles for Avx512 {
    type Float = __m512d;
    type Mask = __mmask8;
    type Words = __m512i;
    const COUNT: usize = 8;

    #[inline(always)]
    fn load(self, from: &[f64]) -> __m512d {
        // SAFETY: `self` exists, so the processor has the instructions; `from` has 8 elements.
        unsafe { _mm512_loadu_pd(from[..8].as_ptr()) }
    }
    #[inline(always)]
    fn store(self, values: __m512d, to: &mut [f64]) {
        // SAFETY: `self` exists, so the processor has the instructions; `to` has 8 elements.
        unsafe {
            _mm512_storeu_pd(to[..8].as_mut_ptr(), values);
        }
    }
    #[inline(always)]
    fn and(self, a: __mmask8, b: __mmask8) -> __mmask8 {
        a & b
    }
    #[inline(always)]
    fn or(self, a: __mmask8, b: __mmask8) -> __mmask8 {
        a | b
    }
    #[inline(always)]
    fn not(self, a: __mmask8) -> __mmask8 {
        !a
    }
    #[inline(always)]
    fn bits(self, mask: __mmask8) -> u32 {
        u32::from(mask)
    }

    instructions! {
        fn splat(self, value: f64) -> __m512d { _mm512_set1_pd(value) }
        fn add(self, a: __m512d, b: __m512d) -> __m512d { _mm512_add_pd(a, b) }
        fn sub(self, a: __m512d, b: __m512d) -> __m512d { _mm512_sub_pd(a, b) }
        fn mul(self, a: __m512d, b: __m512d) -> __m512d { _mm512_mul_pd(a, b) }
        fn div(self, a: __m512d, b: __m512d) -> __m512d { _mm512_div_pd(a, b) }
        fn sqrt(self, a: __m512d) -> __m512d { _mm512_sqrt_pd(a) }
        fn mul_add(self, a: __m512d, b: __m512d, c: __m512d) -> __m512d { _mm512_fmadd_pd(a, b, c) }
        fn less(self, a: __m512d, b: __m512d) -> __mmask8 { _mm512_cmp_pd_mask::<_CMP_LT_OQ>(a, b) }
        fn select(self, mask: __mmask8, a: __m512d, b: __m512d) -> __m512d {
            _mm512_mask_blend_pd(mask, b, a)
        }
        fn words(self, value: u64) -> __m512i { _mm512_set1_epi64(value as i64) }
        fn as_words(self, a: __m512d) -> __m512i { _mm512_castpd_si512(a) }
        fn as_floats(self, a: __m512i) -> __m512d { _mm512_castsi512_pd(a) }
        fn add_words(self, a: __m512i, b: __m512i) -> __m512i { _mm512_add_epi64(a, b) }
        fn sub_words(self, a: __m512i, b: __m512i) -> __m512i { _mm512_sub_epi64(a, b) }
        fn and_words(self, a: __m512i, b: __m512i) -> __m512i { _mm512_and_si512(a, b) }
        fn exponent_up(self, a: __m512i) -> __m512i { _mm512_slli_epi64::<52>(a) }
        fn exponent_down(self, a: __m512i) -> __m512i { _mm512_srli_epi64::<52>(a) }
    }
}

impl LossDoubles for Avx512 {
    type Narrow = Avx2;

    #[inline(always)]
    fn narrow(self) -> Avx2 {
        Avx2::of_avx512(self)
    }
    #[inline(always)]
    fn load_mask(self, from: &[u8]) -> __mmask8 {
        // SAFETY: `self` exists, so the processor has the instructions; `from` has 8 elements.
        unsafe {
            let bytes = _mm_loadl_epi64(from[..8].as_ptr().cast());
            _mm_test_epi8_mask(bytes, bytes) as __mmask8
        }
    }
    #[inline(always)]
    fn mask_of(self, bits: u32) -> __mmask8 {
        bits as __mmask8
    }
    #[inline(always)]
    fn compress(self, mask: __mmask8, a: __m512d, to: &mut [f64]) {
        // SAFETY: `self` exists, so the processor has the instructions; `to` has 8 elements.
        unsafe {
            _mm512_storeu_pd(to[..8].as_mut_ptr(), _mm512_maskz_compress_pd(mask, a));
        }
    }
    #[inline(always)]
    fn expand(self, mask: __mmask8, from: &[f64]) -> __m512d {
        // SAFETY: `self` exists, so the processor has the instructions; `from` has 8 elements.
        unsafe { _mm512_maskz_expand_pd(mask, _mm512_loadu_pd(from[..8].as_ptr())) }
    }

    instructions! {
        fn rounded(self, a: __m512d) -> __m256 { _mm512_cvtpd_ps(a) }
        fn widened(self, a: __m256) -> __m512d { _mm512_cvtps_pd(a) }
        fn less_or_equal(self, a: __m512d, b: __m512d) -> __mmask8 {
            _mm512_cmp_pd_mask::<_CMP_LE_OQ>(a, b)
        }
    }
}
