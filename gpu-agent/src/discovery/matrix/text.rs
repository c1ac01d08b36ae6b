//! The text of a matrix as visible lines: terminal escapes, comment lines, byte-order marks and foreign line ends are gone,
//! and each character that is left knows the column it had in the original.
//!
//! Knows nothing of GPUs; `rows` and `header` read these lines.

use super::MatrixError;

/// One visible character and its 1-based column in the original line.
#[derive(Clone, Copy, Debug)]
pub(super) struct Glyph {
    pub(super) what: char,
    pub(super) column: usize,
}

/// A line without what a terminal would not show.
#[derive(Clone, Debug)]
pub(super) struct Line {
    /// 1-based, in the original text.
    pub(super) number: usize,
    pub(super) glyphs: Vec<Glyph>,
}

/// A run of characters without white space.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Word {
    pub(super) text: String,
    /// Index into the line's glyphs.
    pub(super) start: usize,
    pub(super) column: usize,
}

/// The visible lines of `text`; lines that start with `#` are comments and left out.
pub(super) fn lines(text: &str) -> Vec<Line> {
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let old_mac = !text.contains('\n') && text.contains('\r');
    let separator = if old_mac { '\r' } else { '\n' };
    text.split(separator)
        .enumerate()
        .filter(|(_, line)| !line.starts_with('#'))
        .map(|(index, line)| Line { number: index + 1, glyphs: visible(line) })
        .collect()
}

/// The text of a file: UTF-8, or UTF-16 with its mark (what a Windows shell writes). Bytes that are neither become U+FFFD,
/// which no reader of cells accepts, so damage inside the matrix is refused and damage in a comment does no harm.
pub(super) fn decode(bytes: &[u8]) -> String {
    let wide = |of: fn([u8; 2]) -> u16| {
        let units: Vec<u16> = bytes[2..].chunks_exact(2).map(|pair| of([pair[0], pair[1]])).collect();
        String::from_utf16_lossy(&units)
    };
    match bytes {
        [0xff, 0xfe, ..] => wide(u16::from_le_bytes),
        [0xfe, 0xff, ..] => wide(u16::from_be_bytes),
        _ => String::from_utf8_lossy(bytes).into_owned(),
    }
}

fn visible(line: &str) -> Vec<Glyph> {
    let chars: Vec<char> = line.chars().collect();
    let mut glyphs = Vec::with_capacity(chars.len());
    let mut at = 0;
    while at < chars.len() {
        let skip = escape_length(&chars[at..]);
        if skip > 0 {
            at += skip;
            continue;
        }
        let what = chars[at];
        at += 1;
        // Any other white space (no-break spaces of a web page) is a space; a lone control character or mark is nothing.
        match what {
            '\t' => glyphs.push(Glyph { what, column: at }),
            _ if what.is_whitespace() && what != '\r' => glyphs.push(Glyph { what: ' ', column: at }),
            _ if what.is_control() || matches!(what, '\u{feff}' | '\u{200b}') => {}
            _ => glyphs.push(Glyph { what, column: at }),
        }
    }
    // Trailing tabs stay: they tell an empty last column from a lost one.
    while glyphs.last().is_some_and(|glyph| glyph.what == ' ') {
        glyphs.pop();
    }
    glyphs
}

/// Length of the terminal escape at the start of `chars`, 0 if there is none. Also the written forms that a copy leaves: `^[[4m`,
/// `\033[4m`, and `[4m` whose ESC was lost.
fn escape_length(chars: &[char]) -> usize {
    const WRITTEN: [&str; 4] = ["^[", "\\033", "\\e", "\\x1b"];
    match chars {
        ['\u{1b}', '[', ..] => csi_length(chars, 2),
        ['\u{9b}', ..] => csi_length(chars, 1),
        ['\u{1b}', '(' | ')', ..] => chars.len().min(3),
        ['\u{1b}', ']', ..] => osc_length(chars),
        ['\u{1b}', ..] => chars.len().min(2),
        ['[', ..] => colour_length(chars, 1),
        _ => WRITTEN
            .iter()
            .map(|form| form.chars().count())
            .zip(WRITTEN)
            .find(|(length, form)| {
                form.chars().eq(chars.iter().copied().take(*length)) && chars.get(*length) == Some(&'[')
            })
            .map_or(0, |(length, _)| colour_length(chars, length + 1)),
    }
}

fn csi_length(chars: &[char], from: usize) -> usize {
    let parameters = chars[from..].iter().take_while(|c| matches!(c, '\u{20}'..='\u{3f}')).count();
    chars.len().min(from + parameters + 1)
}

fn colour_length(chars: &[char], from: usize) -> usize {
    let parameters = chars[from..].iter().take_while(|c| matches!(c, '0'..='9' | ';')).count();
    if chars.get(from + parameters) == Some(&'m') { from + parameters + 1 } else { 0 }
}

fn osc_length(chars: &[char]) -> usize {
    let end = chars.iter().skip(2).position(|c| matches!(c, '\u{7}' | '\\'));
    end.map_or(chars.len(), |at| at + 3)
}

impl Line {
    pub(super) fn is_blank(&self) -> bool {
        self.glyphs.iter().all(|glyph| glyph.what.is_whitespace())
    }

    /// The visible text from `start` (a glyph index) to the end.
    pub(super) fn text_from(&self, start: usize) -> String {
        self.glyphs.iter().skip(start).map(|glyph| glyph.what).collect()
    }

    /// The next few characters from `at`: enough for any cell.
    pub(super) fn ahead(&self, at: usize) -> String {
        const LONGEST_CELL: usize = 16;
        self.glyphs.iter().skip(at).take(LONGEST_CELL).map(|glyph| glyph.what).collect()
    }

    /// Does the visible text at `at` begin with `text`?
    pub(super) fn has(&self, at: usize, text: &str) -> bool {
        let mut glyphs = self.glyphs.iter().skip(at);
        text.chars().all(|expected| glyphs.next().is_some_and(|glyph| glyph.what == expected))
    }

    /// The words between two glyph indexes.
    pub(super) fn words(&self, start: usize, end: usize) -> Vec<Word> {
        let mut words: Vec<Word> = Vec::new();
        let mut open = false;
        for (index, glyph) in self.glyphs.iter().enumerate().take(end).skip(start) {
            if glyph.what.is_whitespace() {
                open = false;
            } else if let (true, Some(word)) = (open, words.last_mut()) {
                word.text.push(glyph.what);
            } else {
                words.push(Word { text: glyph.what.to_string(), start: index, column: glyph.column });
                open = true;
            }
        }
        words
    }

    /// First index at or after `at` that is not white space.
    pub(super) fn skip_white(&self, at: usize) -> usize {
        let white = self.glyphs.iter().skip(at).take_while(|glyph| glyph.what.is_whitespace()).count();
        at + white
    }

    /// 1-based column of the glyph at `at`; one past the last for the end of the line.
    pub(super) fn column(&self, at: usize) -> usize {
        match self.glyphs.get(at) {
            Some(glyph) => glyph.column,
            None => self.glyphs.last().map_or(1, |glyph| glyph.column + 1),
        }
    }

    /// A refusal at the first visible character from `at` on.
    pub(super) fn refuse(&self, at: usize, message: impl Into<String>) -> MatrixError {
        MatrixError { line: self.number, column: self.column(self.skip_white(at)), message: message.into() }
    }

    /// The word at `at` in quotes, or the words "the end of the line"; for messages.
    pub(super) fn found(&self, at: usize) -> String {
        const LONGEST: usize = 40;
        let at = self.skip_white(at);
        let word: String =
            self.glyphs.iter().skip(at).map(|g| g.what).take_while(|c| !c.is_whitespace()).take(LONGEST).collect();
        if word.is_empty() { "the end of the line".to_owned() } else { format!("{word:?}") }
    }
}

#[cfg(test)]
mod tests {
    use super::{decode, lines};

    fn only(text: &str) -> String {
        lines(text)[0].text_from(0)
    }

    #[test]
    fn escapes_and_marks_are_invisible_but_keep_their_columns() {
        let line = &lines("\u{1b}[4m\tGPU0\u{1b}[0m")[0];
        assert_eq!(line.text_from(0), "\tGPU0");
        assert_eq!(line.glyphs[1].column, 6);
        assert_eq!(only("^[[4mGPU0^[[0m"), "GPU0");
        assert_eq!(only("[4mGPU0[0m"), "GPU0");
        assert_eq!(only("\\033[1;31mGPU0\\e[0m"), "GPU0");
        assert_eq!(only("\u{1b}(BGPU0\u{1b}]0;title\u{7} x"), "GPU0 x");
        assert_eq!(only("\u{feff}GPU0\u{a0}\u{200b}X \t \r"), "GPU0 X \t");
        assert_eq!(only("\u{1b}["), "");
    }

    #[test]
    fn line_ends_and_encodings_of_other_systems_are_read() {
        assert_eq!(lines("a\r\nb\r\n").len(), 3);
        assert_eq!(lines("a\rb")[1].text_from(0), "b");
        assert_eq!(lines("# note\na")[0].number, 2);
        let utf16: Vec<u8> =
            [0xfffe_u16.swap_bytes()].into_iter().chain("GPU0".encode_utf16()).flat_map(u16::to_le_bytes).collect();
        assert_eq!(decode(&utf16), "GPU0");
        assert_eq!(decode(b"\xffGPU"), "\u{fffd}GPU");
    }
}
