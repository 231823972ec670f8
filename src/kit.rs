//! The recovery kit: one text that prints well and is at the same time a program that decodes.
//!
//! In: what the caller knows of an encryption profile, its keys and its destinations. Out: the text, which the caller writes for its
//! owner alone. Everything but the key lines stands in comments, and what others named is escaped, so that nothing in a name can end
//! a comment, become a program or pass for a key. `docs/recovery-kit.md` says what a kit is for.

use std::fmt::Write;

use qrcode::{Color, EcLevel, QrCode};
use zeroize::Zeroizing;

/// The decoder as it is given to people; it looks for key lines in its own text.
pub const DECODER: &str = include_str!("../kit/keepd_decoder.py");
/// Columns of a printed line.
const COLUMNS: usize = 80;
/// Modules of white around a QR code, by its standard.
const QUIET: usize = 4;

/// What opens the profile.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KeyKind {
    /// A key file, or the same line as a credential.
    KeyFile,
    /// A passphrase in somebody's head; a key in the kit is the kit's own.
    Passphrase,
    /// A key that does not leave its token; a key in the kit is the kit's own.
    Token,
}

/// One line of `docs/format.md`, Keys: `keepd-key-1 …` or `keepd-private-1 …`.
pub struct KeyLine {
    pub line: Zeroizing<String>,
    /// 16 hexadecimal digits.
    pub fingerprint: String,
}

pub struct Destination {
    pub name: String,
    /// Its table as `keepd rescue --destination FILE` wants it.
    pub toml: Zeroizing<String>,
    /// Whether the access keys and passwords stand in it.
    pub has_secrets: bool,
    /// Where it is, in words.
    pub place: String,
    /// Commands of any tool that copy all of it to the directory `repository`.
    pub fetch: Vec<String>,
}

pub struct Kit {
    pub profile: String,
    pub kind: KeyKind,
    /// None with a passphrase or a token, unless a key was made for this kit, or it has the private key.
    pub keys: Vec<KeyLine>,
    /// The fingerprint of the private key that contents are written for and that is not among the keys.
    pub private_elsewhere: Option<String>,
    pub host: String,
    /// When it was made, as people read it.
    pub made: String,
    pub keepd_version: String,
    pub destinations: Vec<Destination>,
    /// What somebody should know before relying on it; one sentence or more each.
    pub warnings: Vec<String>,
}

#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum KitError {
    #[error(
        "cannot make the recovery kit: line {0} of its keys is no key line of keepd (keepd-key-1 or keepd-private-1); check the key file"
    )]
    NotAKeyLine(usize),
    #[error("cannot make the recovery kit: no QR code can be made of its key: {0}")]
    Code(String),
    #[error("cannot make the recovery kit: a profile with a key file needs the key in it")]
    NoKey,
}

/// The kit's text: Python of UTF-8, ASCII but for the QR codes, and at most 80 columns where what the caller gives can be broken.
pub fn text(kit: &Kit) -> Result<Zeroizing<String>, KitError> {
    if kit.kind == KeyKind::KeyFile && kit.keys.is_empty() {
        return Err(KitError::NoKey);
    }
    if let Some(at) = kit.keys.iter().position(|key| !is_key_line(&key.line)) {
        return Err(KitError::NotAKeyLine(at + 1));
    }
    let mut page = Page::for_kit(kit);
    page.raw("#!/usr/bin/env python3\n");
    page.rule();
    page.line("RECOVERY KIT of keepd");
    page.rule();
    introduction(&mut page, kit);
    keys(&mut page, kit)?;
    destinations(&mut page, kit);
    steps(&mut page, kit);
    page.rule();
    page.line("THE DECODER (all that follows, to the last line)");
    page.rule();
    page.raw(DECODER.strip_prefix("#!/usr/bin/env python3\n").unwrap_or(DECODER));
    Ok(page.text)
}

/// A word, 64 and 8 hexadecimal digits: what can stand outside a comment.
fn is_key_line(line: &str) -> bool {
    let mut words = line.split(' ');
    let hex = |word: Option<&str>, digits: usize| word.is_some_and(|w| w.len() == digits && w.bytes().all(|b| b.is_ascii_hexdigit()));
    matches!(words.next(), Some("keepd-key-1" | "keepd-private-1"))
        && hex(words.next(), 64)
        && hex(words.next(), 8)
        && words.next().is_none()
}

fn introduction(page: &mut Page, kit: &Kit) {
    page.paragraph(&format!(
        "Encryption profile: {}. Made on the machine {} on {} by keepd {}.",
        plain(&kit.profile),
        plain(&kit.host),
        plain(&kit.made),
        plain(&kit.keepd_version)
    ));
    page.paragraph(
        "The machine whose backups these are may be gone: with this text and any one of the places named below, its data can be had back. \
         No keepd is needed for that, and nobody's help: this text is also a program that reads the backups.",
    );
    match (kit.keys.is_empty(), &kit.private_elsewhere) {
        (false, None) => page.paragraph(
            "WHOEVER HAS THIS TEXT CAN READ THE BACKUPS. Print it, keep it where you keep deeds and passports, and not near the machine. Give \
             it to those who shall get the data back when you cannot: a partner, a colleague, a notary. Keep the file as well, on a stick \
             beside the paper: the program at the end is long to type.",
        ),
        (false, Some(private)) => page.paragraph(&format!(
            "WITH THIS TEXT ALONE THE BACKUPS ARE LISTED AND CANNOT BE READ: what is in the files opens with the private key of fingerprint \
             {}, which is not in here. Whoever has both can read the backups. Print it, and keep it, and the file as well, where those who \
             shall get the data back find it, and that private key, too.",
            plain(private)
        )),
        (true, _) => page.paragraph(
            "No key is in this text; who finds it cannot read the backups with it. Print it, and keep it, and the file as well, with those who \
             shall get the data back when you cannot.",
        ),
    }
    if !kit.warnings.is_empty() {
        page.heading("Mind");
        for warning in &kit.warnings {
            page.item(&plain(warning));
        }
    }
}

fn keys(page: &mut Page, kit: &Kit) -> Result<(), KitError> {
    page.heading("The key");
    let has_own = kit.keys.iter().any(|key| key.line.starts_with("keepd-key-"));
    match (kit.kind, has_own) {
        (KeyKind::KeyFile, _) => {}
        (KeyKind::Passphrase, true) => page.paragraph(
            "The profile is normally opened by a passphrase, which is not in here; this kit has a key of its own (slot \"recovery kit\"), for \
             which nobody needs to know the passphrase.",
        ),
        (KeyKind::Token, true) => page.paragraph(
            "The profile is normally opened by a token (PKCS #11), whose key cannot be copied; this kit has a key of its own (slot \"recovery \
             kit\"), which needs no token.",
        ),
        (KeyKind::Passphrase, false) => page.paragraph(
            "The profile is opened by a passphrase, which is not in here: it is in somebody's head, or where they keep it. Without it nobody \
             can read the backups.",
        ),
        (KeyKind::Token, false) => page.paragraph(
            "The profile is opened by a token (PKCS #11) whose key cannot be copied; it is not in here. The program below cannot ask tokens: \
             for it the repository needs a second key (keepctl key add).",
        ),
    }
    if let Some(private) = &kit.private_elsewhere {
        page.paragraph(&format!(
            "What is in the files opens with a second key, the private key of fingerprint {}. It is not in here: it lies where the pair was \
             made or was taken from there, as a file with a line that begins with keepd-private-1.",
            plain(private)
        ));
    }
    if kit.keys.is_empty() {
        return Ok(());
    }
    page.paragraph(match kit.keys.len() {
        1 => "Its line. The last eight digits tell whether it was typed well:",
        _ => "The lines; all of them are needed. The last eight digits tell whether one was typed well:",
    });
    page.raw("KEYS = \"\"\"\n");
    for key in &kit.keys {
        page.raw(&key.line);
        page.raw("\n");
    }
    page.raw("\"\"\"\n");
    for key in &kit.keys {
        page.raw("#\n");
        page.paragraph("The same line for a camera (dark on white paper; into a text file with it):");
        code(page, &key.line)?;
        page.paragraph(&format!("Its fingerprint, which tells keys apart and is no secret: {}", plain(&key.fingerprint)));
    }
    Ok(())
}

/// A QR code in half blocks, two rows of it in a line, with its white border.
fn code(page: &mut Page, line: &str) -> Result<(), KitError> {
    let code = QrCode::with_error_correction_level(line, EcLevel::Q).map_err(|e| KitError::Code(e.to_string()))?;
    let width = code.width();
    let colors = Zeroizing::new(code.to_colors().iter().map(|c| *c == Color::Dark).collect::<Vec<bool>>());
    let dark = |x: usize, y: usize| {
        let inside = |at: usize| at.checked_sub(QUIET).filter(|at| *at < width);
        inside(x).zip(inside(y)).and_then(|(x, y)| colors.get(y * width + x)).copied().unwrap_or(false)
    };
    let side = width + 2 * QUIET;
    for y in (0..side).step_by(2) {
        page.raw("# ");
        for x in 0..side {
            page.text.push(match (dark(x, y), dark(x, y + 1)) {
                (true, true) => '\u{2588}',
                (true, false) => '\u{2580}',
                (false, true) => '\u{2584}',
                (false, false) => ' ',
            });
        }
        page.raw("\n");
    }
    Ok(())
}

fn destinations(page: &mut Page, kit: &Kit) {
    page.heading("Where the backups are");
    if kit.destinations.is_empty() {
        page.paragraph("No destination used this profile when this was made.");
    } else {
        page.paragraph("Any one of them is enough. Lines that begin with #1: (and so on) are its settings for keepd.");
    }
    for (at, destination) in kit.destinations.iter().enumerate() {
        page.paragraph(&format!("{}. {}: {}", at + 1, plain(&destination.name), plain(&destination.place)));
        for line in destination.toml.lines() {
            page.setting(at + 1, line);
        }
        page.raw("#\n");
        if !destination.has_secrets {
            page.paragraph("Its access keys and passwords, if it wants any, are not in here: have them from the one who runs it.");
        }
        if !destination.fetch.is_empty() {
            page.paragraph("To copy all of it to the directory 'repository':");
            for command in &destination.fetch {
                page.command(command);
            }
            page.raw("#\n");
        }
    }
}

fn steps(page: &mut Page, kit: &Kit) {
    let has_own = kit.keys.iter().any(|key| key.line.starts_with("keepd-key-"));
    let key = if kit.keys.is_empty() { "" } else { " --key kit.py" };
    let private = if kit.private_elsewhere.is_some() { " --key PRIVATE-KEY-FILE" } else { "" };
    let with_words = if has_own { "" } else { ", with the passphrase or the token at hand" };
    page.heading("How to get the data back");
    page.paragraph("Have this text as the file kit.py, readable by you alone (chmod 600 kit.py).");
    if !kit.keys.is_empty() {
        page.paragraph(
            "From paper alone: a text file with the key line in it, typed or by a camera, stands for kit.py after --key in step 1; step 2 \
             wants all of this text, or the same decoder from keepd's source (kit/keepd_decoder.py) with the key line's file after --key.",
        );
    }
    if let Some(fingerprint) = &kit.private_elsewhere {
        page.paragraph(&format!(
            "PRIVATE-KEY-FILE stands for the file with the private key of fingerprint {}; without it nothing can be restored.",
            plain(fingerprint)
        ));
    }
    page.paragraph(&format!("1. With keepd (any version that is not older){with_words}. For another destination than 1 put its number:"));
    for command in
        ["sed -n 's/^#1: //p' kit.py > destination.toml".to_owned(), format!("keepd rescue list --destination destination.toml{key}")]
    {
        page.command(&command);
    }
    page.raw("#\n");
    // What is sealed for a profile does not open with the slot of a kit.
    let sealed_with = if kit.kind == KeyKind::Passphrase { " --passphrase-file FILE" } else { "" };
    page.paragraph(
        "A new machine in the old one's place (root, keepd installed and not configured): its configuration, where it is stored there, its \
         schedule and its list of backups. docs/disaster-recovery.md of keepd goes on from here:",
    );
    page.command(&format!("keepd rescue bootstrap --destination destination.toml{key}{private}{sealed_with}"));
    page.raw("#\n");
    page.paragraph("Or the data alone, to a directory:");
    page.command(&format!("keepd rescue restore latest --to data --destination destination.toml{key}{private}"));
    page.raw("#\n");
    page.paragraph("With a copy of a destination, or its disk: --destination fs:/where/it/is");
    page.paragraph(
        "2. Without keepd, on any machine with Python 3.8 or newer. Copy a destination to the directory 'repository' first (above: with \
         any tool, or by taking its disk); it is the right one when keepd.json lies in it:",
    );
    for command in [
        "python3 kit.py repository list".to_owned(),
        format!("python3 kit.py repository restore latest data{private}"),
        format!("python3 kit.py repository verify{private}"),
        format!("python3 kit.py repository config -o config.json{private}"),
    ] {
        page.command(&command);
    }
    page.raw("#\n");
    page.paragraph(
        "The last one gives keepd's own configuration back, where it was stored there. 'python3 kit.py --help' tells the rest. It is much quicker with two packages: python3 -m pip install cryptography zstandard. \
         A file of a database (shop.db) is the database itself; *.dump is for pg_restore, *.sql for psql or mysql.",
    );
    page.paragraph(
        "3. By hand: docs/format.md of keepd's source says what every byte means, for somebody who writes another program; so does the \
         decoder below.",
    );
}

/// Without anything that moves, hides or ends: printable ASCII, the rest as \u0000 or \U00000000, which TOML reads again.
fn plain(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    push_plain(&mut out, text);
    out
}

fn push_plain(out: &mut String, text: &str) {
    for c in text.chars() {
        match u32::from(c) {
            0x20..=0x7e => out.push(c),
            // Writing to a String does not fail.
            n @ 0..=0xffff => {
                let _ = write!(out, "\\u{n:04X}");
            }
            n => {
                let _ = write!(out, "\\U{n:08X}");
            }
        }
    }
}

/// The text as it grows, in lines of comments.
struct Page {
    text: Zeroizing<String>,
}

impl Page {
    /// As large as it gets, so that no copy of a key is left behind by its growth.
    fn for_kit(kit: &Kit) -> Self {
        let given = kit.profile.len() + kit.host.len() + kit.made.len() + kit.keepd_version.len();
        let given = given + 3 * kit.private_elsewhere.as_ref().map_or(0, String::len);
        let of = |d: &Destination| d.name.len() + d.toml.len() + d.place.len() + d.fetch.iter().map(|f| f.len() + 1).sum::<usize>() + 100;
        let given = given + kit.destinations.iter().map(of).sum::<usize>() + kit.warnings.iter().map(|w| w.len() + 8).sum::<usize>();
        // A byte becomes 10 at most (a line of its own in the settings), a key with its code less than 8 KiB.
        let capacity = DECODER.len() + (64 << 10) + 26 * given + kit.keys.len() * (8 << 10);
        Self { text: Zeroizing::new(String::with_capacity(capacity)) }
    }

    fn raw(&mut self, text: &str) {
        self.text.push_str(text);
    }

    fn line(&mut self, text: &str) {
        self.raw("# ");
        self.raw(text);
        self.raw("\n");
    }

    fn rule(&mut self) {
        self.line(&"=".repeat(COLUMNS - 3));
    }

    fn heading(&mut self, text: &str) {
        self.raw("#\n");
        self.line(text);
        self.line(&"-".repeat(text.len()));
        self.raw("#\n");
    }

    fn paragraph(&mut self, text: &str) {
        self.filled("", text);
        self.raw("#\n");
    }

    fn item(&mut self, text: &str) {
        self.filled("* ", text);
        self.raw("#\n");
    }

    /// Fills lines with words; what is longer than a line is cut.
    fn filled(&mut self, first: &str, text: &str) {
        let room = COLUMNS - 3 - first.len();
        let mut line = String::new();
        let mut lead = first.to_owned();
        for word in text.split(' ').filter(|w| !w.is_empty()) {
            let mut word = word;
            while !word.is_empty() {
                if !line.is_empty() && line.len() + 1 + word.len() > room {
                    self.line(&format!("{lead}{line}"));
                    lead = " ".repeat(first.len());
                    line.clear();
                }
                // All of it is ASCII.
                let (piece, rest) = word.split_at_checked(room).unwrap_or((word, ""));
                if !line.is_empty() {
                    line.push(' ');
                }
                line.push_str(piece);
                word = rest;
            }
        }
        if !line.is_empty() {
            self.line(&format!("{lead}{line}"));
        }
    }

    /// A line that is copied as it is, however long.
    fn command(&mut self, command: &str) {
        self.raw("#     ");
        push_plain(&mut self.text, command);
        self.raw("\n");
    }

    /// A line of a destination's settings; it may hold secrets.
    fn setting(&mut self, number: usize, line: &str) {
        // Writing to a String does not fail.
        let _ = write!(self.text, "#{number}: ");
        let rest = line.trim_start_matches(['\t', ' ']);
        // Tabs that set in are no part of a value.
        self.text.extend(std::iter::repeat_n(' ', line.len() - rest.len()));
        push_plain(&mut self.text, rest);
        self.raw("\n");
    }
}

#[cfg(test)]
mod tests {
    use std::path::{Path, PathBuf};
    use std::process::{Command, Output};

    use proptest::prelude::*;

    use super::*;

    fn golden() -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/1-zstd")
    }

    fn key() -> KeyLine {
        let file = std::fs::read_to_string(golden().join("golden.key")).unwrap();
        let line = file.lines().find(|l| l.starts_with("keepd-key-1")).unwrap();
        KeyLine { line: Zeroizing::new(line.to_owned()), fingerprint: "0011223344556677".into() }
    }

    fn kit() -> Kit {
        let toml = "[destination.offsite]\nservice = \"s3\"\nbucket = \"backups\"\n\nsecret = '''it's \"\"\" so'''\n";
        Kit {
            profile: "main".into(),
            kind: KeyKind::KeyFile,
            keys: vec![key()],
            private_elsewhere: None,
            host: "shop.example.org".into(),
            made: "2026-11-21".into(),
            keepd_version: "0.1.0".into(),
            destinations: vec![
                Destination {
                    name: "local".into(),
                    toml: Zeroizing::new("[destination.local]\nservice = \"fs\"\n".into()),
                    has_secrets: true,
                    place: "the disk at /var/backups of that machine".into(),
                    fetch: vec!["cp -r /var/backups/keepd repository".into()],
                },
                Destination {
                    name: "offsite".into(),
                    toml: Zeroizing::new(toml.into()),
                    has_secrets: false,
                    place: "bucket backups of the S3 service at s3.example.org".into(),
                    fetch: vec!["aws s3 sync s3://backups/keepd repository --endpoint-url https://s3.example.org".into()],
                },
            ],
            warnings: vec!["The destination 'old' has another profile and is not in here. ".repeat(3)],
        }
    }

    fn python(arguments: &[&str], directory: &Path) -> Output {
        Command::new("python3").arg("-I").args(arguments).current_dir(directory).output().unwrap()
    }

    fn said(out: &Output) -> String {
        format!("{}{}", String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr))
    }

    /// The lines before the decoder.
    fn head(text: &str) -> Vec<&str> {
        text.split('\n').take_while(|l| !l.starts_with("# THE DECODER")).collect()
    }

    #[test]
    fn the_kit_is_the_program_that_restores() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("kit.py"), text(&kit()).unwrap().as_bytes()).unwrap();
        let here = golden().join("repository");
        let repository = here.to_str().unwrap();
        let out = python(&["kit.py", repository, "list"], dir.path());
        assert!(out.status.success() && out.stdout.iter().filter(|b| **b == b'\n').count() == 2, "{}", said(&out));
        let out = python(&[dir.path().join("kit.py").to_str().unwrap(), "list"], &here);
        assert!(out.status.success() && out.stdout.iter().filter(|b| **b == b'\n').count() == 2, "{}", said(&out));
        let out = python(&["kit.py", repository, "restore", "latest", "data"], dir.path());
        assert!(out.status.success(), "{}", said(&out));
        let mut sums = Command::new("sha256sum");
        let sums =
            sums.args(["--check", "--quiet"]).arg(golden().join("SHA256SUMS")).current_dir(dir.path().join("data")).output().unwrap();
        assert!(sums.status.success(), "{}", said(&sums));
        let help = python(&["kit.py", "--help"], dir.path());
        assert!(help.status.success() && !said(&help).contains(&key().line[12..40]), "{}", said(&help));
        // A destination's settings for keepd, by the command that the kit shows.
        let settings = Command::new("sed").args(["-n", "s/^#2: //p", "kit.py"]).current_dir(dir.path()).output().unwrap();
        assert_eq!(String::from_utf8(settings.stdout).unwrap(), *kit().destinations[1].toml);
    }

    #[test]
    fn what_a_kit_says_stands_in_its_order_on_printed_lines() {
        let whole = text(&kit()).unwrap();
        let lines = head(&whole);
        let at = |what: &str| lines.iter().position(|l| l.contains(what)).unwrap_or_else(|| panic!("{what}"));
        let line = key().line;
        let order =
            ["RECOVERY KIT", "main", &line, "\u{2588}", "0011223344556677", "offsite", "keepd rescue", "python3 kit.py", "docs/format.md"];
        let places: Vec<usize> = order.iter().map(|what| at(what)).collect();
        assert!(places.is_sorted(), "{places:?}");
        assert_eq!(lines[at(&line)], *line, "at the start of a line");
        for line in lines {
            let copied = line.starts_with("#     ");
            assert!(line.chars().count() < COLUMNS || line == *key().line || copied, "{line}");
            assert!(line.chars().all(|c| matches!(c, ' '..='~' | '\u{2580}' | '\u{2584}' | '\u{2588}')), "{line}");
        }
        assert!(DECODER.is_ascii() && DECODER.lines().all(|l| l.len() < COLUMNS), "the decoder prints as well");
        assert!(!DECODER.lines().any(|l| l.trim_start().starts_with("keepd-")));
    }

    #[test]
    fn the_code_is_that_of_the_key_line() {
        let whole = text(&kit()).unwrap();
        let drawn = |l: &&str| l.len() > 40 && l.starts_with("# ") && !l.contains(|c: char| matches!(c, '!'..='~') && c != '#');
        let rows: Vec<Vec<char>> = whole.lines().filter(drawn).map(|l| l.chars().skip(2).collect()).collect();
        let code = QrCode::with_error_correction_level(key().line.as_bytes(), EcLevel::Q).unwrap();
        let side = code.width() + 2 * QUIET;
        assert_eq!((rows.len(), rows[0].len()), (side.div_ceil(2), side));
        assert!(side + 2 <= COLUMNS);
        for y in 0..side {
            for x in 0..side {
                let dark = match rows[y / 2][x] {
                    '\u{2588}' => true,
                    '\u{2580}' => y % 2 == 0,
                    '\u{2584}' => y % 2 == 1,
                    _ => false,
                };
                let inside = (QUIET..side - QUIET).contains(&x) && (QUIET..side - QUIET).contains(&y);
                assert_eq!(dark, inside && code[(x - QUIET, y - QUIET)] == Color::Dark, "{x}, {y}");
            }
        }
    }

    #[test]
    fn kits_without_a_key_say_where_it_is() {
        for (kind, wanted) in [(KeyKind::Passphrase, "in somebody's head"), (KeyKind::Token, "PKCS #11")] {
            let whole = text(&Kit { kind, keys: Vec::new(), ..kit() }).unwrap();
            let lines = head(&whole);
            assert!(lines.join(" ").replace(" # ", " ").contains(wanted), "{wanted}");
            assert!(lines.iter().all(|l| l.starts_with('#') && !l.contains("--key kit.py") && !l.contains('\u{2588}')));
        }
        assert_eq!(text(&Kit { keys: Vec::new(), ..kit() }).err(), Some(KitError::NoKey));
    }

    /// The words before the decoder, however they are broken into lines.
    fn words(kit: &Kit) -> String {
        let whole = text(kit).unwrap();
        head(&whole).join(" ").split(' ').filter(|w| !w.is_empty() && *w != "#").collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn a_kit_with_a_key_of_its_own_says_so() {
        for (kind, wanted) in [(KeyKind::Passphrase, "normally opened by a passphrase"), (KeyKind::Token, "normally opened by a token")] {
            let said = words(&Kit { kind, ..kit() });
            assert!(said.contains(wanted) && said.contains("a key of its own (slot \"recovery kit\")"), "{said}");
            assert!(!said.contains("Without it nobody") && !said.contains("at hand"), "{said}");
            assert!(said.contains("WHOEVER HAS THIS TEXT CAN READ"), "{said}");
        }
    }

    #[test]
    fn a_kit_without_the_private_key_does_not_promise_to_read() {
        let said = words(&Kit { private_elsewhere: Some("8899aabbccddeeff".into()), ..kit() });
        assert!(!said.contains("WHOEVER HAS THIS TEXT") && said.contains("THE BACKUPS ARE LISTED AND CANNOT BE READ"), "{said}");
        assert!(said.contains("private key of fingerprint 8899aabbccddeeff"), "{said}");
        for step in ["--destination destination.toml --key kit.py --key PRIVATE-KEY-FILE", "restore latest data --key PRIVATE-KEY-FILE"] {
            assert!(said.contains(step), "{step}: {said}");
        }
        assert!(!words(&kit()).contains("PRIVATE-KEY-FILE"));
    }

    #[test]
    fn only_key_lines_stand_outside_comments() {
        let good = key().line;
        let cut = &good[..good.len() - 1];
        let ends = format!("{}\n", *good);
        let breaks = format!("{}\"\"\"", *good);
        let later = format!(" {}", *good);
        let public = good.replace("-key-", "-public-");
        for bad in ["", "x", cut, &ends, &breaks, &later, &public] {
            let bad = KeyLine { line: Zeroizing::new(bad.to_owned()), fingerprint: String::new() };
            assert_eq!(text(&Kit { keys: vec![key(), bad], ..kit() }).err(), Some(KitError::NotAKeyLine(2)));
        }
    }

    /// Names that somebody chose to break out of the comments.
    fn hostile() -> impl Strategy<Value = String> {
        let piece = prop_oneof![
            Just("\"\"\"".to_owned()),
            Just("'''".to_owned()),
            Just("\n".to_owned()),
            Just("\r".to_owned()),
            Just("\r\n".to_owned()),
            Just("\\".to_owned()),
            Just("\nimport os\n".to_owned()),
            Just("\n#1: service = 1".to_owned()),
            Just("\nkeepd-key-1 00".to_owned()),
            Just("\u{2028}\u{85}\u{c}\0".to_owned()),
            any::<String>(),
            "[a-z ]{0,200}",
        ];
        proptest::collection::vec(piece, 0..6).prop_map(|pieces| pieces.concat())
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]
        #[test]
        fn no_name_breaks_out_of_its_comment(names in proptest::collection::vec(hostile(), 10)) {
            let mut kit = kit();
            [kit.profile, kit.host, kit.made, kit.keepd_version] = std::array::from_fn(|n| names[n].clone());
            kit.warnings = vec![names[4].clone()];
            kit.keys[0].fingerprint = names[5].clone();
            kit.private_elsewhere = Some(names[5].clone());
            kit.destinations[0] = Destination {
                name: names[6].clone(),
                toml: Zeroizing::new(names[7].clone()),
                has_secrets: false,
                place: names[8].clone(),
                fetch: vec![names[9].clone()],
            };
            let capacity = Page::for_kit(&kit).text.capacity();
            let whole = text(&kit).unwrap();
            prop_assert_eq!(whole.capacity(), capacity, "no copy was left behind");
            let outside: Vec<&str> = head(&whole).into_iter().filter(|l| !l.starts_with('#')).collect();
            let line = key().line;
            prop_assert_eq!(outside, ["KEYS = \"\"\"", line.as_str(), "\"\"\""]);
            let printable = whole.chars().all(|c| matches!(c, ' '..='~' | '\n' | '\u{2580}' | '\u{2584}' | '\u{2588}'));
            prop_assert!(printable);
            // Python sees the keys and the decoder and nothing else.
            let dir = tempfile::tempdir().unwrap();
            std::fs::write(dir.path().join("kit.py"), whole.as_bytes()).unwrap();
            std::fs::write(dir.path().join("decoder.py"), DECODER).unwrap();
            let check = "import ast; a, b = (ast.parse(open(f, encoding='utf-8').read()).body for f in ('kit.py', 'decoder.py'))\n\
                         assert ast.dump(a[0]).startswith(\"Assign(targets=[Name(id='KEYS'\") and [*map(ast.dump, a[1:])] == [*map(ast.dump, b)]";
            let out = python(&["-c", check], dir.path());
            prop_assert!(out.status.success(), "{}", said(&out));
        }
    }
}
