//! Plots as inline SVG: lines over a linear or logarithmic axis, and bars. Knows nothing of jobs; colours are classes `s0`
//! to `s9` of the page, so that they follow its light and dark.

use std::fmt::Write;

/// Colours that the page has.
pub(super) const COLOURS: usize = 10;

const WIDTH: f64 = 720.0;
const HEIGHT: f64 = 340.0;
const LEFT: f64 = 72.0;
const RIGHT: f64 = 16.0;
const TOP: f64 = 12.0;
const BOTTOM: f64 = 56.0;

pub(super) struct Axis {
    pub label: String,
    pub from: f64,
    pub to: f64,
    pub log: bool,
    /// How a tick is written.
    pub write: fn(f64) -> String,
}

pub(super) struct Series {
    pub name: String,
    pub points: Vec<(f64, f64)>,
}

impl Axis {
    /// 0 to 1 along the axis.
    fn part(&self, value: f64) -> f64 {
        let scale = |value: f64| if self.log { value.max(f64::MIN_POSITIVE).log10() } else { value };
        let (from, to) = (scale(self.from), scale(self.to));
        ((scale(value) - from) / (to - from).max(f64::EPSILON)).clamp(0.0, 1.0)
    }

    fn ticks(&self) -> Vec<f64> {
        if self.log {
            let (from, to) = (self.from.log10().ceil() as i32, self.to.log10().floor() as i32);
            return (from..=to).map(|power| 10f64.powi(power)).collect();
        }
        let step = nice_step((self.to - self.from) / 5.0);
        let first = (self.from / step).ceil() as i64;
        (first..).map(|at| at as f64 * step).take_while(|tick| *tick <= self.to + step * 1e-9).collect()
    }
}

/// 1, 2 or 5 times a power of ten, at least as much as asked for.
fn nice_step(least: f64) -> f64 {
    let power = 10f64.powf(least.max(f64::MIN_POSITIVE).log10().floor());
    [1.0, 2.0, 5.0, 10.0].map(|times| times * power).into_iter().find(|step| *step >= least).unwrap_or(least)
}

/// The end of an axis that begins at 0 and holds `most`.
pub(super) fn rounded_up(most: f64) -> f64 {
    let step = nice_step(most.max(1e-9) / 5.0);
    (most / step).ceil().max(1.0) * step
}

/// A figure with a head, lines and a legend.
pub(super) fn lines(head: &str, about: &str, x: &Axis, y: &Axis, series: &[Series]) -> String {
    let mut svg = String::new();
    let across = |value: f64| LEFT + x.part(value) * (WIDTH - LEFT - RIGHT);
    let down = |value: f64| TOP + (1.0 - y.part(value)) * (HEIGHT - TOP - BOTTOM);
    let floor = HEIGHT - BOTTOM;
    for tick in y.ticks() {
        let at = down(tick);
        let _ = write!(svg, r#"<line class="grid" x1="{LEFT}" x2="{}" y1="{at:.1}" y2="{at:.1}"/>"#, WIDTH - RIGHT);
        let _ = write!(
            svg,
            r#"<text class="tick" x="{}" y="{:.1}" text-anchor="end">{}</text>"#,
            LEFT - 8.0,
            at + 4.0,
            (y.write)(tick)
        );
    }
    for tick in x.ticks() {
        let at = across(tick);
        let _ = write!(svg, r#"<line class="grid" x1="{at:.1}" x2="{at:.1}" y1="{TOP}" y2="{floor}"/>"#);
        let _ = write!(
            svg,
            r#"<text class="tick" x="{at:.1}" y="{}" text-anchor="middle">{}</text>"#,
            floor + 21.0,
            (x.write)(tick)
        );
    }
    let _ = write!(svg, r#"<line class="axis" x1="{LEFT}" x2="{}" y1="{floor}" y2="{floor}"/>"#, WIDTH - RIGHT);
    let _ = write!(
        svg,
        r#"<text class="label" x="{}" y="{}" text-anchor="end">{}</text>"#,
        WIDTH - RIGHT,
        HEIGHT - 6.0,
        escaped(&x.label)
    );
    for (at, line) in series.iter().enumerate() {
        let points = line.points.iter().map(|(x, y)| format!("{:.1},{:.1}", across(*x), down(*y)));
        let points = points.collect::<Vec<_>>().join(" ");
        let _ = write!(
            svg,
            r#"<polyline class="line s{}" points="{points}"><title>{}</title></polyline>"#,
            at % COLOURS,
            escaped(&line.name)
        );
    }
    let legend = series
        .iter()
        .enumerate()
        .map(|(at, line)| format!(r#"<span><i class="s{}"></i>{}</span>"#, at % COLOURS, escaped(&line.name)));
    format!(
        r#"<figure><figcaption><b>{}</b> {}</figcaption><p class="y">{}</p><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{}">{svg}</svg><p class="legend">{}</p></figure>"#,
        escaped(head),
        escaped(about),
        escaped(&y.label),
        escaped(head),
        legend.collect::<String>()
    )
}

/// One bar a name, from 0; the values stand beside them as `write` gives them.
pub(super) fn bars(head: &str, about: &str, values: &[(String, f64)], write: fn(f64) -> String) -> String {
    const ROW: f64 = 26.0;
    const NAMES: f64 = 104.0;
    const NUMBERS: f64 = 84.0;
    const BAR_WIDTH: f64 = 360.0;
    let most = values.iter().map(|(_, value)| *value).fold(f64::MIN_POSITIVE, f64::max);
    let height = ROW * values.len() as f64;
    let mut svg = String::new();
    for (at, (name, value)) in values.iter().enumerate() {
        let (top, width) = (ROW * at as f64, (value / most * (BAR_WIDTH - NAMES - NUMBERS)).max(1.0));
        let text = top + ROW / 2.0 + 4.0;
        let _ = write!(
            svg,
            r#"<text class="tick" x="{}" y="{text}" text-anchor="end">{}</text>"#,
            NAMES - 8.0,
            escaped(name)
        );
        let _ = write!(
            svg,
            r#"<rect class="bar s{}" x="{NAMES}" y="{}" width="{width:.1}" height="{}" rx="2"/>"#,
            at % COLOURS,
            top + 4.0,
            ROW - 8.0
        );
        let _ =
            write!(svg, r#"<text class="value" x="{:.1}" y="{text}">{}</text>"#, NAMES + width + 6.0, write(*value));
    }
    format!(
        r#"<figure class="small"><figcaption><b>{}</b> {}</figcaption><svg viewBox="0 0 {BAR_WIDTH} {height}" role="img" aria-label="{}">{svg}</svg></figure>"#,
        escaped(head),
        escaped(about),
        escaped(head)
    )
}

pub(super) fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_round_numbers_within_the_axis() {
        let axis = |from, to, log| Axis { label: String::new(), from, to, log, write: |value| value.to_string() };
        assert_eq!(axis(0.0, 100.0, false).ticks(), [0.0, 20.0, 40.0, 60.0, 80.0, 100.0]);
        assert_eq!(axis(80.0, 100.0, false).ticks(), [80.0, 85.0, 90.0, 95.0, 100.0]);
        assert_eq!(axis(1.0, 2_000.0, true).ticks(), [1.0, 10.0, 100.0, 1_000.0]);
        assert_eq!((rounded_up(93.0), rounded_up(1_234.0)), (100.0, 1_500.0));
    }

    #[test]
    fn names_are_text_and_no_markup() {
        let plot = bars("a", "b", &[("<script>".to_owned(), 1.0)], |value| value.to_string());
        assert!(plot.contains("&lt;script&gt;") && !plot.contains("<script>"));
    }
}
