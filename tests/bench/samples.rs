//! Medians and other quantiles. Reports contain medians instead of means. Other work on the machine
//! can only increase a measured value. Such work would increase the mean, but it hardly changes the
//! median.

/// The sorted values of one measured quantity.
#[derive(Clone, Debug, Default)]
pub(crate) struct Samples(Vec<f64>);

impl Samples {
    pub(crate) fn new(mut values: Vec<f64>) -> Self {
        values.sort_by(f64::total_cmp);
        Samples(values)
    }

    /// Returns the quantile for `share`. The fraction `share` of all values is less than or equal
    /// to this quantile. Returns `None` if there are no values.
    pub(crate) fn quantile(&self, share: f64) -> Option<f64> {
        let last = self.0.len().checked_sub(1)?;
        let position = share.clamp(0.0, 1.0) * last as f64;
        let below = *self.0.get(position.floor() as usize)?;
        let above = *self.0.get(position.ceil() as usize)?;
        Some(below + (above - below) * position.fract())
    }

    pub(crate) fn median(&self) -> Option<f64> {
        self.quantile(0.5)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_quantile_is_interpolated_between_two_values() {
        let samples = Samples::new(vec![4.0, 1.0, 3.0, 2.0]);
        assert_eq!(samples.median(), Some(2.5));
        assert_eq!(samples.quantile(0.0), Some(1.0));
        assert_eq!(samples.quantile(1.0), Some(4.0));
        assert_eq!(Samples::default().median(), None);
    }
}
