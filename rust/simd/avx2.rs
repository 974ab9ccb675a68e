//! Registers of AVX2: eight float32 or four float64. Single operations alone; exponentials and logarithms
//! of every register are in `exp_log.rs`.

// A function of vectors has to become part of one that is compiled for their instructions.
#![allow(clippy::inline_always, clippy::wildcard_imports)]

use std::arch::x86_64::*;

use crate::simd::avx512::Avx512;
use crate::simd::doubles::Doubles;
use crate::simd::interleaved::Interleaved;
use crate::simd::lanes::{FloatBits, Lanes};
use crate::simd::wide::{LossDoubles, Wide};
use crate::simd::{WithDoubles, WithLanes};

/// Exists only where the processor has AVX2.
#[derive(Debug, Clone, Copy)]
pub struct Avx2(());

impl Avx2 {
    /// `None` where the processor lacks the instructions.
    pub fn new() -> Option<Self> {
        is_x86_feature_detected!("avx2").then_some(Self(()))
    }

    /// Those of a processor with AVX-512, which has AVX2 as well.
    #[inline(always)]
    pub(super) fn of_avx512(_: Avx512) -> Self {
        Self(())
    }

    /// Does the work in a function that is compiled for these instructions.
    pub fn run<W: WithLanes<f32>>(self, work: W) -> W::Output {
        #[target_feature(enable = "avx2,popcnt")]
        fn compiled<W: WithLanes<f32>>(lanes: Avx2, work: W) -> W::Output {
            work.run(lanes)
        }
        // SAFETY: `self` exists, so the processor has the instructions. All that have AVX2 have popcnt.
        unsafe { compiled(self, work) }
    }
}

/// Exists only where the processor has AVX2 and fused multiply-adds.
#[derive(Debug, Clone, Copy)]
pub struct Avx2Fused(());

impl Avx2Fused {
    /// `None` where the processor lacks the instructions.
    pub fn new() -> Option<Self> {
        (is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma")).then_some(Self(()))
    }

    /// Does the work in a function that is compiled for these instructions.
    pub fn run<W: WithDoubles>(self, work: W) {
        #[target_feature(enable = "avx2,fma,popcnt")]
        fn compiled<W: WithDoubles>(lanes: Avx2Fused, work: W) {
            if W::NARROW {
                work.run(Interleaved(lanes));
            } else {
                work.run(Interleaved(Interleaved(lanes)));
            }
        }
        // SAFETY: `self` exists, so the processor has the instructions. All that have AVX2 have popcnt.
        unsafe { compiled(self, work) }
    }

    /// Does work of the loss in a function that is compiled for these instructions.
    pub fn run_loss<W: WithLanes<f64>>(self, work: W) -> W::Output {
        #[target_feature(enable = "avx2,fma,popcnt")]
        fn compiled<W: WithLanes<f64>>(lanes: Avx2Fused, work: W) -> W::Output {
            work.run(Wide(Interleaved(lanes)))
        }
        // SAFETY: as in `run`.
        unsafe { compiled(self, work) }
    }
}

/// For each mask of eight lanes, the indices of the lanes that are set, one a byte.
const SET_LANES: [u64; 256] = {
    let mut all = [0; 256];
    let mut mask = 0;
    while mask < 256 {
        let (mut lane, mut place) = (0, 0);
        while lane < 8 {
            if mask >> lane & 1 == 1 {
                all[mask] |= (lane as u64) << (8 * place);
                place += 1;
            }
            lane += 1;
        }
        mask += 1;
    }
    all
};

/// For each mask of eight lanes, the number of lanes set before each lane, one a byte.
const RANKS: [u64; 256] = {
    let mut all = [0; 256];
    let mut mask = 0;
    while mask < 256 {
        let (mut lane, mut rank) = (0, 0);
        while lane < 8 {
            all[mask] |= rank << (8 * lane);
            rank += (mask >> lane & 1) as u64;
            lane += 1;
        }
        mask += 1;
    }
    all
};

/// The words of [`SET_LANES`] or [`RANKS`] for each mask of four doubles, by the table of their halves.
const fn of_doubles(halves: &[u64; 256]) -> [u64; 16] {
    let mut all = [0; 16];
    let mut mask = 0;
    while mask < 16 {
        let (mut both, mut lane) = (0, 0);
        while lane < 4 {
            both |= ((mask >> lane & 1) * 3) << (2 * lane);
            lane += 1;
        }
        all[mask] = halves[both];
        mask += 1;
    }
    all
}

/// [`SET_LANES`] of four doubles, in words.
const SET_DOUBLES: [u64; 16] = of_doubles(&SET_LANES);

/// [`RANKS`] of four doubles, in words.
const DOUBLE_RANKS: [u64; 16] = of_doubles(&RANKS);

/// Eight bytes as eight words.
///
/// # Safety
/// The processor has the instructions.
#[inline(always)]
unsafe fn permutation(bytes: u64) -> __m256i {
    // SAFETY: required of the caller.
    unsafe { _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(bytes as i64)) }
}

impl Lanes for Avx2 {
    type Scalar = f32;
    type Float = __m256;
    /// All bits of a lane, or none.
    type Mask = __m256;
    const COUNT: usize = 8;

    #[inline(always)]
    fn load(self, from: &[f32]) -> __m256 {
        // SAFETY: `self` exists, so the processor has the instructions; `from` has 8 elements.
        unsafe { _mm256_loadu_ps(from[..8].as_ptr()) }
    }
    #[inline(always)]
    fn store(self, values: __m256, to: &mut [f32]) {
        // SAFETY: `self` exists, so the processor has the instructions; `to` has 8 elements.
        unsafe {
            _mm256_storeu_ps(to[..8].as_mut_ptr(), values);
        }
    }
    #[inline(always)]
    fn load_mask(self, from: &[u8]) -> __m256 {
        // SAFETY: `self` exists, so the processor has the instructions; `from` has 8 elements.
        unsafe {
            let bytes = _mm256_cvtepu8_epi32(_mm_loadl_epi64(from[..8].as_ptr().cast()));
            _mm256_castsi256_ps(_mm256_cmpgt_epi32(bytes, _mm256_setzero_si256()))
        }
    }
    #[inline(always)]
    fn compress(self, mask: __m256, a: __m256, to: &mut [f32]) {
        // SAFETY: `self` exists, so the processor has the instructions; `to` has 8 elements.
        unsafe {
            let lanes = permutation(SET_LANES[self.bits(mask) as usize]);
            _mm256_storeu_ps(to[..8].as_mut_ptr(), _mm256_permutevar8x32_ps(a, lanes));
        }
    }
    #[inline(always)]
    fn expand(self, mask: __m256, from: &[f32]) -> __m256 {
        // SAFETY: `self` exists, so the processor has the instructions; `from` has 8 elements.
        unsafe {
            let places = permutation(RANKS[self.bits(mask) as usize]);
            let spread = _mm256_permutevar8x32_ps(_mm256_loadu_ps(from[..8].as_ptr()), places);
            _mm256_and_ps(mask, spread)
        }
    }

    instructions! {
        fn splat(self, value: f64) -> __m256 { _mm256_set1_ps(value as f32) }
        fn add(self, a: __m256, b: __m256) -> __m256 { _mm256_add_ps(a, b) }
        fn sub(self, a: __m256, b: __m256) -> __m256 { _mm256_sub_ps(a, b) }
        fn mul(self, a: __m256, b: __m256) -> __m256 { _mm256_mul_ps(a, b) }
        fn div(self, a: __m256, b: __m256) -> __m256 { _mm256_div_ps(a, b) }
        fn abs(self, a: __m256) -> __m256 { _mm256_andnot_ps(_mm256_set1_ps(-0.0), a) }
        fn min(self, a: __m256, b: __m256) -> __m256 { _mm256_min_ps(a, b) }
        fn max(self, a: __m256, b: __m256) -> __m256 { _mm256_max_ps(a, b) }
        // The instruction returns its second operand if either is NaN.
        fn clamp_max(self, limit: f64, a: __m256) -> __m256 {
            _mm256_min_ps(_mm256_set1_ps(limit as f32), a)
        }
        fn clamp_min(self, limit: f64, a: __m256) -> __m256 {
            _mm256_max_ps(_mm256_set1_ps(limit as f32), a)
        }
        fn less(self, a: __m256, b: __m256) -> __m256 { _mm256_cmp_ps::<_CMP_LT_OQ>(a, b) }
        fn less_or_equal(self, a: __m256, b: __m256) -> __m256 { _mm256_cmp_ps::<_CMP_LE_OQ>(a, b) }
        fn is_nan(self, a: __m256) -> __m256 { _mm256_cmp_ps::<_CMP_UNORD_Q>(a, a) }
        fn and(self, a: __m256, b: __m256) -> __m256 { _mm256_and_ps(a, b) }
        fn or(self, a: __m256, b: __m256) -> __m256 { _mm256_or_ps(a, b) }
        fn and_not(self, a: __m256, b: __m256) -> __m256 { _mm256_andnot_ps(b, a) }
        fn select(self, mask: __m256, a: __m256, b: __m256) -> __m256 {
            _mm256_blendv_ps(b, a, mask)
        }
        fn mask_of(self, bits: u32) -> __m256 {
            let each = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
            let here = _mm256_and_si256(_mm256_set1_epi32(bits as i32), each);
            _mm256_castsi256_ps(_mm256_cmpeq_epi32(here, each))
        }
        fn bits(self, mask: __m256) -> u32 { _mm256_movemask_ps(mask) as u32 }
    }
}

impl FloatBits for Avx2 {
    type Words = __m256i;

    #[inline(always)]
    fn select_words(self, mask: __m256, a: __m256i, b: __m256i) -> __m256i {
        self.as_words(self.select(mask, self.as_floats(a), self.as_floats(b)))
    }
    #[inline(always)]
    fn pick(self, row: &[u32; 16], index: __m256i, lower: __m256) -> __m256i {
        // SAFETY: `self` exists, so the processor has the instructions; eight words of the row follow each start.
        unsafe {
            // The permutation takes indices modulo 8.
            let [upper_half, lower_half] = [0, 8].map(|half| {
                _mm256_permutevar8x32_epi32(_mm256_loadu_si256(row[half..].as_ptr().cast()), index)
            });
            self.select_words(lower, lower_half, upper_half)
        }
    }
    #[inline(always)]
    unsafe fn gather(self, words: &[u32], index: __m256i) -> __m256i {
        // SAFETY: `self` exists, so the processor has the instructions; the caller keeps the indices inside.
        unsafe { _mm256_i32gather_epi32::<4>(words.as_ptr().cast(), index) }
    }
    #[inline(always)]
    unsafe fn gather_four(self, words: &[u32], index: __m256i) -> [__m256; 4] {
        // Eight loads and a transposition are faster than four gathers, as in AVX-512.
        // SAFETY: `self` exists, so the processor has the instructions; the caller keeps the indices inside.
        unsafe {
            let mut places = [0_u32; 8];
            _mm256_storeu_si256(places.as_mut_ptr().cast(), index);
            let four =
                |token: usize| _mm_loadu_ps(words.as_ptr().add(places[token] as usize).cast());
            let every_fourth = |first: usize| {
                _mm256_insertf128_ps::<1>(_mm256_castps128_ps256(four(first)), four(first + 4))
            };
            let (a, b, c, d) = (every_fourth(0), every_fourth(1), every_fourth(2), every_fourth(3));
            let (ab, cd) = (_mm256_unpacklo_ps(a, b), _mm256_unpacklo_ps(c, d));
            let (ab_high, cd_high) = (_mm256_unpackhi_ps(a, b), _mm256_unpackhi_ps(c, d));
            let (ab, cd) = (_mm256_castps_pd(ab), _mm256_castps_pd(cd));
            let (ab_high, cd_high) = (_mm256_castps_pd(ab_high), _mm256_castps_pd(cd_high));
            [
                _mm256_castpd_ps(_mm256_unpacklo_pd(ab, cd)),
                _mm256_castpd_ps(_mm256_unpackhi_pd(ab, cd)),
                _mm256_castpd_ps(_mm256_unpacklo_pd(ab_high, cd_high)),
                _mm256_castpd_ps(_mm256_unpackhi_pd(ab_high, cd_high)),
            ]
        }
    }

    instructions! {
        fn words(self, value: u32) -> __m256i { _mm256_set1_epi32(value as i32) }
        fn as_words(self, a: __m256) -> __m256i { _mm256_castps_si256(a) }
        fn as_floats(self, a: __m256i) -> __m256 { _mm256_castsi256_ps(a) }
        fn add_words(self, a: __m256i, b: __m256i) -> __m256i { _mm256_add_epi32(a, b) }
        fn sub_words(self, a: __m256i, b: __m256i) -> __m256i { _mm256_sub_epi32(a, b) }
        fn and_words(self, a: __m256i, b: __m256i) -> __m256i { _mm256_and_si256(a, b) }
        fn or_words(self, a: __m256i, b: __m256i) -> __m256i { _mm256_or_si256(a, b) }
        fn shift_left(self, a: __m256i, by: __m256i) -> __m256i { _mm256_sllv_epi32(a, by) }
        fn shift_right(self, a: __m256i, by: __m256i) -> __m256i { _mm256_srlv_epi32(a, by) }
        fn min_words(self, a: __m256i, b: __m256i) -> __m256i { _mm256_min_epu32(a, b) }
        fn max_words(self, a: __m256i, b: __m256i) -> __m256i { _mm256_max_epu32(a, b) }
    }
}

impl Doubles for Avx2Fused {
    type Float = __m256d;
    /// All bits of a lane, or none.
    type Mask = __m256d;
    type Words = __m256i;
    const COUNT: usize = 4;

    #[inline(always)]
    fn load(self, from: &[f64]) -> __m256d {
        // SAFETY: `self` exists, so the processor has the instructions; `from` has 4 elements.
        unsafe { _mm256_loadu_pd(from[..4].as_ptr()) }
    }
    #[inline(always)]
    fn store(self, values: __m256d, to: &mut [f64]) {
        // SAFETY: `self` exists, so the processor has the instructions; `to` has 4 elements.
        unsafe {
            _mm256_storeu_pd(to[..4].as_mut_ptr(), values);
        }
    }

    instructions! {
        fn splat(self, value: f64) -> __m256d { _mm256_set1_pd(value) }
        fn add(self, a: __m256d, b: __m256d) -> __m256d { _mm256_add_pd(a, b) }
        fn sub(self, a: __m256d, b: __m256d) -> __m256d { _mm256_sub_pd(a, b) }
        fn mul(self, a: __m256d, b: __m256d) -> __m256d { _mm256_mul_pd(a, b) }
        fn div(self, a: __m256d, b: __m256d) -> __m256d { _mm256_div_pd(a, b) }
        fn sqrt(self, a: __m256d) -> __m256d { _mm256_sqrt_pd(a) }
        fn mul_add(self, a: __m256d, b: __m256d, c: __m256d) -> __m256d { _mm256_fmadd_pd(a, b, c) }
        fn less(self, a: __m256d, b: __m256d) -> __m256d { _mm256_cmp_pd::<_CMP_LT_OQ>(a, b) }
        fn and(self, a: __m256d, b: __m256d) -> __m256d { _mm256_and_pd(a, b) }
        fn or(self, a: __m256d, b: __m256d) -> __m256d { _mm256_or_pd(a, b) }
        fn not(self, a: __m256d) -> __m256d {
            _mm256_xor_pd(a, _mm256_castsi256_pd(_mm256_set1_epi64x(-1)))
        }
        fn select(self, mask: __m256d, a: __m256d, b: __m256d) -> __m256d {
            _mm256_blendv_pd(b, a, mask)
        }
        fn bits(self, mask: __m256d) -> u32 { _mm256_movemask_pd(mask) as u32 }
        fn words(self, value: u64) -> __m256i { _mm256_set1_epi64x(value as i64) }
        fn as_words(self, a: __m256d) -> __m256i { _mm256_castpd_si256(a) }
        fn as_floats(self, a: __m256i) -> __m256d { _mm256_castsi256_pd(a) }
        fn add_words(self, a: __m256i, b: __m256i) -> __m256i { _mm256_add_epi64(a, b) }
        fn sub_words(self, a: __m256i, b: __m256i) -> __m256i { _mm256_sub_epi64(a, b) }
        fn and_words(self, a: __m256i, b: __m256i) -> __m256i { _mm256_and_si256(a, b) }
        fn exponent_up(self, a: __m256i) -> __m256i { _mm256_slli_epi64::<52>(a) }
        fn exponent_down(self, a: __m256i) -> __m256i { _mm256_srli_epi64::<52>(a) }
    }
}

impl Avx2Fused {
    /// [`Lanes::compress`] of four doubles. Returns their number.
    #[inline(always)]
    fn compress(self, mask: __m256d, a: __m256d, to: &mut [f64]) -> usize {
        let bits = self.bits(mask);
        // SAFETY: `self` exists, so the processor has the instructions; `to` has 4 elements.
        unsafe {
            let lanes = permutation(SET_DOUBLES[bits as usize]);
            let packed = _mm256_permutevar8x32_ps(_mm256_castpd_ps(a), lanes);
            _mm256_storeu_pd(to[..4].as_mut_ptr(), _mm256_castps_pd(packed));
        }
        bits.count_ones() as usize
    }

    /// [`Lanes::expand`] of four doubles. Returns their number too.
    #[inline(always)]
    fn expand(self, mask: __m256d, from: &[f64]) -> (__m256d, usize) {
        let bits = self.bits(mask);
        // SAFETY: `self` exists, so the processor has the instructions; `from` has 4 elements.
        let spread = unsafe {
            let places = permutation(DOUBLE_RANKS[bits as usize]);
            let packed = _mm256_castpd_ps(_mm256_loadu_pd(from[..4].as_ptr()));
            _mm256_and_pd(mask, _mm256_castps_pd(_mm256_permutevar8x32_ps(packed, places)))
        };
        (spread, bits.count_ones() as usize)
    }

    instructions! {
        fn less_or_equal(self, a: __m256d, b: __m256d) -> __m256d { _mm256_cmp_pd::<_CMP_LE_OQ>(a, b) }
        fn load_mask(self, four: u32) -> __m256d {
            let bytes = _mm256_cvtepu8_epi64(_mm_cvtsi32_si128(four as i32));
            _mm256_castsi256_pd(_mm256_cmpgt_epi64(bytes, _mm256_setzero_si256()))
        }
        fn mask_of(self, bits: u32) -> __m256d {
            let each = _mm256_setr_epi64x(1, 2, 4, 8);
            let here = _mm256_and_si256(_mm256_set1_epi64x(i64::from(bits)), each);
            _mm256_castsi256_pd(_mm256_cmpeq_epi64(here, each))
        }
    }
}

impl LossDoubles for Interleaved<Avx2Fused> {
    type Narrow = Avx2;

    #[inline(always)]
    fn narrow(self) -> Avx2 {
        Avx2(())
    }
    #[inline(always)]
    fn less_or_equal(self, a: Self::Float, b: Self::Float) -> Self::Mask {
        (self.0.less_or_equal(a.0, b.0), self.0.less_or_equal(a.1, b.1))
    }
    #[inline(always)]
    fn load_mask(self, from: &[u8]) -> Self::Mask {
        let four = |first: usize| {
            u32::from_le_bytes([from[first], from[first + 1], from[first + 2], from[first + 3]])
        };
        (self.0.load_mask(four(0)), self.0.load_mask(four(4)))
    }
    #[inline(always)]
    fn mask_of(self, bits: u32) -> Self::Mask {
        (self.0.mask_of(bits), self.0.mask_of(bits >> 4))
    }
    #[inline(always)]
    fn compress(self, mask: Self::Mask, a: Self::Float, to: &mut [f64]) {
        let count = self.0.compress(mask.0, a.0, to);
        self.0.compress(mask.1, a.1, &mut to[count..]);
    }
    #[inline(always)]
    fn expand(self, mask: Self::Mask, from: &[f64]) -> Self::Float {
        let (first, count) = self.0.expand(mask.0, from);
        (first, self.0.expand(mask.1, &from[count..]).0)
    }

    instructions! {
        fn rounded(self, a: (__m256d, __m256d)) -> __m256 {
            _mm256_set_m128(_mm256_cvtpd_ps(a.1), _mm256_cvtpd_ps(a.0))
        }
        fn widened(self, a: __m256) -> (__m256d, __m256d) {
            (
                _mm256_cvtps_pd(_mm256_castps256_ps128(a)),
                _mm256_cvtps_pd(_mm256_extractf128_ps::<1>(a)),
            )
        }
    }
}
