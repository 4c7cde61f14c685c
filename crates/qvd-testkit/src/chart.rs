//! Pictures of what a benchmark measured, for the documentation.

use std::error::Error;

use plotters::{
    prelude::*,
    style::text_anchor::{HPos, Pos, VPos},
};

/// Colours that are told apart on white by people who see few.
/// Source: Okabe and Ito, "Color Universal Design", 2008.
const COLOURS: [RGBColor; 4] =
    [RGBColor(0, 114, 178), RGBColor(230, 159, 0), RGBColor(0, 158, 115), RGBColor(204, 121, 167)];

/// Width of a picture in pixels.
const WIDTH: u32 = 900;

/// Width of the names, and height of the line that says what the colours mean.
const LEFT: u32 = 190;
const LEGEND: u32 = 24;

/// Bars beside names, on a logarithmic axis.
#[derive(Debug, Clone, Default)]
pub struct Bars {
    /// What is shown.
    pub title: String,
    /// What the axis counts.
    pub axis: String,
    /// What each of a row's bars is; up to four.
    pub series: Vec<String>,
    /// Names, and a value for each series where there is one.
    pub rows: Vec<(String, Vec<Option<f64>>)>,
}

impl Bars {
    /// Draws them as SVG.
    ///
    /// # Errors
    /// There is nothing to draw, or a value that has no logarithm.
    pub fn svg(&self) -> Result<String, Box<dyn Error>> {
        let values: Vec<f64> = self.rows.iter().flat_map(|(_, values)| values.iter().flatten().copied()).collect();
        if values.is_empty() || values.iter().any(|value| !value.is_finite() || *value <= 0.0) {
            return Err(format!("`{}` has no values that a logarithmic axis can show", self.title).into());
        }
        // The axis begins below the least, so that every bar is seen.
        let least = 10_f64.powf(values.iter().copied().fold(f64::INFINITY, f64::min).log10().floor());
        let most = values.iter().copied().fold(0.0, f64::max) * 3.0;
        let rows = f64::from(u32::try_from(self.rows.len())?);
        let height = 134 + u32::try_from(self.rows.len() * (self.series.len() * 13 + 8))?;
        let mut picture = String::new();
        {
            let area = SVGBackend::with_string(&mut picture, (WIDTH, height)).into_drawing_area();
            area.fill(&WHITE)?;
            let mut chart = ChartBuilder::on(&area)
                .caption(&self.title, ("sans-serif", 18))
                .margin(10)
                .margin_bottom(10 + LEGEND)
                .margin_right(30)
                .x_label_area_size(40)
                .y_label_area_size(LEFT)
                .build_cartesian_2d((least..most).log_scale(), rows..0.0)?;
            chart
                .configure_mesh()
                .disable_y_mesh()
                .disable_y_axis()
                .x_desc(&self.axis)
                .label_style(("sans-serif", 12))
                .light_line_style(WHITE)
                .x_label_formatter(&|value| plain(*value))
                .draw()?;
            for number in 0..self.series.len() {
                let colour = COLOURS[number % COLOURS.len()];
                let bars = self
                    .bars(number)
                    .map(|(from, to, value)| Rectangle::new([(least, from), (value, to)], colour.filled()));
                chart.draw_series(bars)?;
                let style = TextStyle::from(("sans-serif", 11)).pos(Pos::new(HPos::Left, VPos::Center));
                chart.draw_series(self.bars(number).map(|(from, to, value)| {
                    Text::new(plain(value), (value * 1.05, f64::midpoint(from, to)), style.clone())
                }))?;
            }
            let style = TextStyle::from(("sans-serif", 13)).pos(Pos::new(HPos::Right, VPos::Center));
            for (row, (name, _)) in (0_u32..).zip(&self.rows) {
                let at = chart.backend_coord(&(least, f64::from(row) + 0.5));
                area.draw(&Text::new(name.as_str(), (at.0 - 8, at.1), style.clone()))?;
            }
            if self.series.len() > 1 {
                self.legend(&area, height)?;
            }
            area.present()?;
        }
        Ok(picture)
    }

    /// What each colour means, in a line at the bottom.
    fn legend(
        &self,
        area: &DrawingArea<SVGBackend<'_>, plotters::coord::Shift>,
        height: u32,
    ) -> Result<(), Box<dyn Error>> {
        let step = (WIDTH as i32 - LEFT as i32 - 20) / i32::try_from(self.series.len())?;
        let style = TextStyle::from(("sans-serif", 12)).pos(Pos::new(HPos::Left, VPos::Center));
        for (number, series) in (0_i32..).zip(&self.series) {
            let (x, y) = (LEFT as i32 + 10 + number * step, height as i32 - 18);
            let colour = COLOURS[usize::try_from(number)? % COLOURS.len()];
            area.draw(&Rectangle::new([(x, y - 5), (x + 12, y + 5)], colour.filled()))?;
            area.draw(&Text::new(series.as_str(), (x + 18, y), style.clone()))?;
        }
        Ok(())
    }

    /// Top, bottom and value of one series's bars.
    fn bars(&self, series: usize) -> impl Iterator<Item = (f64, f64, f64)> + '_ {
        let step = 0.86 / f64::from(u32::try_from(self.series.len()).unwrap_or(1));
        let within = 0.07 + step * f64::from(u32::try_from(series).unwrap_or(0));
        (0_u32..).zip(&self.rows).filter_map(move |(row, (_, values))| {
            let value = (*values.get(series)?)?;
            let from = f64::from(row) + within;
            Some((from, from + step * 0.9, value))
        })
    }
}

/// A number with as many digits as matter.
fn plain(value: f64) -> String {
    match value {
        v if v >= 100.0 => format!("{v:.0}"),
        v if v >= 10.0 => format!("{v:.1}"),
        v if v >= 0.1 => format!("{v:.2}"),
        v => format!("{v:.3}"),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn every_name_and_value_is_in_the_picture() {
        let bars = Bars {
            title: "Making a root".to_owned(),
            axis: "ms".to_owned(),
            series: vec!["make".to_owned(), "remove".to_owned()],
            rows: vec![
                ("overlayfs".to_owned(), vec![Some(0.31), Some(0.055)]),
                ("cp -a".to_owned(), vec![Some(1234.0), None]),
            ],
        };
        let svg = bars.svg().unwrap();
        for word in ["<svg", "overlayfs", "cp -a", "0.31", "0.055", "1234", "remove"] {
            assert!(svg.contains(word), "{word} is not in {svg}");
        }
    }

    #[test]
    fn nothing_and_impossible_values_are_refused() {
        assert!(Bars::default().svg().is_err());
        let zero =
            Bars { series: vec!["x".to_owned()], rows: vec![("a".to_owned(), vec![Some(0.0)])], ..Bars::default() };
        assert!(zero.svg().is_err());
    }
}
