//! Memory of the machines against time, as SVG.

use std::fmt::Write as _;

/// One look.
#[derive(Debug, Clone, Copy)]
pub struct Point {
    pub phase: &'static str,
    pub at_s: f64,
    pub resident_mib: f64,
    pub left_mib: f64,
    pub cpu_s: f64,
}

const WIDTH: f64 = 700.0;
const HEIGHT: f64 = 180.0;
const MARGIN: f64 = 50.0;

/// A title, a colour, and what is drawn.
type Panel = (&'static str, &'static str, fn(&Point) -> f64);

/// Above one another.
const PANELS: [Panel; 3] = [
    ("MiB of the host that four machines of 256 MiB have (proportional set size)", "#1769aa", |point| {
        point.resident_mib
    }),
    ("MiB that their balloons leave them", "#c77700", |point| point.left_mib),
    ("Processor time that merging took, in seconds", "#00805a", |point| point.cpu_s),
];

pub fn draw(points: &[Point]) -> String {
    let end = points.last().map_or(1.0, |point| point.at_s);
    let x = |at: f64| MARGIN + at / end * WIDTH;
    let mut svg = String::new();
    for (number, (title, colour, of)) in (0_u8..).zip(PANELS) {
        let top = MARGIN + f64::from(number) * (HEIGHT + MARGIN);
        let highest = points.iter().map(of).fold(0.1, f64::max) * 1.1;
        let y = |value: f64| top + HEIGHT - value / highest * HEIGHT;
        // Writing to a string cannot fail.
        let _ = writeln!(svg, "<text x=\"{MARGIN}\" y=\"{}\" font-weight=\"bold\">{title}</text>", top - 18.0);
        for part in 0..=4 {
            let value = highest * f64::from(part) / 4.0;
            let digits = if highest < 20.0 { 1 } else { 0 };
            let _ = writeln!(
                svg,
                "<line x1=\"{MARGIN}\" y1=\"{0:.1}\" x2=\"{1}\" y2=\"{0:.1}\" stroke=\"#ddd\"/>\
                 <text x=\"{2}\" y=\"{3:.1}\" text-anchor=\"end\">{value:.digits$}</text>",
                y(value),
                MARGIN + WIDTH,
                MARGIN - 6.0,
                y(value) + 4.0,
            );
        }
        let line: Vec<_> = points.iter().map(|point| format!("{:.1},{:.1}", x(point.at_s), y(of(point)))).collect();
        let _ = writeln!(
            svg,
            "<polyline points=\"{}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"2\"/>",
            line.join(" ")
        );
    }
    let bottom = MARGIN + 3.0 * (HEIGHT + MARGIN) - MARGIN;
    let mut before = "";
    let begun = points.iter().filter(|point| std::mem::replace(&mut before, point.phase) != point.phase);
    // Two phases may begin one right after the other: their names stand below each other.
    for (point, row) in begun.zip([0.0, 1.0].into_iter().cycle()) {
        let at = x(point.at_s);
        let _ = writeln!(
            svg,
            "<line x1=\"{at:.1}\" y1=\"{MARGIN}\" x2=\"{at:.1}\" y2=\"{bottom}\" stroke=\"#888\" stroke-dasharray=\"4 3\"/>\
             <text x=\"{:.1}\" y=\"{}\">{}</text>",
            at + 4.0,
            MARGIN + HEIGHT - 22.0 + 14.0 * row,
            point.phase,
        );
    }
    for part in 0..=6 {
        let at = end * f64::from(part) / 6.0;
        let _ =
            writeln!(svg, "<text x=\"{:.1}\" y=\"{}\" text-anchor=\"middle\">{at:.0} s</text>", x(at), bottom + 18.0);
    }
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{}\" height=\"{}\" font-family=\"sans-serif\" \
         font-size=\"11\"><rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n{svg}</svg>\n",
        WIDTH + 2.0 * MARGIN,
        bottom + MARGIN,
    )
}
