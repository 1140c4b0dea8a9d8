//! Order statistics. Medians and not means: what disturbs a measurement only ever adds to it.

/// The values of one measured quantity, in order of size.
#[derive(Clone, Debug, Default)]
pub(crate) struct Samples(Vec<f64>);

impl Samples {
    pub(crate) fn new(mut values: Vec<f64>) -> Self {
        values.sort_by(f64::total_cmp);
        Samples(values)
    }

    /// The value that this share of all values does not exceed; `None` without values.
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
    fn quantiles_lie_between_neighbours() {
        let samples = Samples::new(vec![4.0, 1.0, 3.0, 2.0]);
        assert_eq!(samples.median(), Some(2.5));
        assert_eq!(samples.quantile(0.0), Some(1.0));
        assert_eq!(samples.quantile(1.0), Some(4.0));
        assert_eq!(Samples::default().median(), None);
    }
}
