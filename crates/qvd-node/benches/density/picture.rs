//! Memory and start latency against the number alive, as SVG.

use std::fmt::Write as _;

/// One look while desktops were being started.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Point {
    pub(crate) alive: u32,
    pub(crate) used_mib: f64,
    pub(crate) session_ms: f64,
}

const WIDTH: f64 = 360.0;
const HEIGHT: f64 = 220.0;
const MARGIN: f64 = 50.0;

pub(crate) fn draw(points: &[Point]) -> String {
    let most = points.iter().map(|point| point.alive).max().unwrap_or(1);
    let panel = |at: f64, title: &str, of: fn(&Point) -> f64| {
        let highest = points.iter().map(of).fold(1.0, f64::max) * 1.1;
        let place = |point: &Point| {
            let x = at + MARGIN + f64::from(point.alive) / f64::from(most) * WIDTH;
            (x, MARGIN + HEIGHT - of(point) / highest * HEIGHT)
        };
        let mut svg = format!("<text x=\"{}\" y=\"30\" font-weight=\"bold\">{title}</text>\n", at + MARGIN);
        for part in 0..=4 {
            let (share, y) = (f64::from(part) / 4.0, MARGIN + HEIGHT - f64::from(part) / 4.0 * HEIGHT);
            let (left, right) = (at + MARGIN, at + MARGIN + WIDTH);
            // Writing to a string cannot fail.
            let _ = writeln!(
                svg,
                "<line x1=\"{left}\" y1=\"{y}\" x2=\"{right}\" y2=\"{y}\" stroke=\"#ddd\"/>\
                 <text x=\"{}\" y=\"{}\" text-anchor=\"end\">{:.0}</text>\
                 <text x=\"{}\" y=\"{}\" text-anchor=\"middle\">{:.0}</text>",
                left - 6.0,
                y + 4.0,
                share * highest,
                left + share * WIDTH,
                MARGIN + HEIGHT + 18.0,
                share * f64::from(most),
            );
        }
        let line: Vec<_> = points.iter().map(place).map(|(x, y)| format!("{x:.1},{y:.1}")).collect();
        let _ = writeln!(
            svg,
            "<polyline points=\"{}\" fill=\"none\" stroke=\"#1769aa\" stroke-width=\"2\"/>",
            line.join(" ")
        );
        svg
    };
    let pitch = WIDTH + 1.6 * MARGIN;
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{}\" height=\"{}\" font-family=\"sans-serif\" \
         font-size=\"11\"><rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n{}{}</svg>\n",
        2.0 * pitch + MARGIN,
        HEIGHT + 2.0 * MARGIN,
        panel(0.0, "Memory of the host in MiB, by desktops alive", |point| point.used_mib),
        panel(pitch, "Session up after ms, by desktops alive", |point| point.session_ms),
    )
}
