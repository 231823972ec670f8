//! Parts: what a program printed, longer than was worth holding in memory, stands in an archive as several members, `shop.dump.part-00000`,
//! `shop.dump.part-00001` and so on. `cat shop.dump.part-*` is the file. Only sources whose files keepd names itself have them, so no file of somebody is
//! taken for one.

/// Kinds of sources that may have parts.
pub const KINDS: [&str; 3] = ["command", "mysql", "postgres"];
const MARK: &[u8] = b".part-";
const DIGITS: usize = 5;

/// The name of a part of a file, counted from 0; None where there would be too many.
pub fn name(path: &[u8], number: u64) -> Option<Vec<u8>> {
    let digits = format!("{number:0DIGITS$}");
    (digits.len() == DIGITS).then(|| [path, MARK, digits.as_bytes()].concat())
}

/// The file that a member of a source of this kind is a part of, and its number.
pub fn part_of<'p>(kind: &str, path: &'p [u8]) -> Option<(&'p [u8], u64)> {
    let (rest, digits) = path.split_at_checked(path.len().checked_sub(DIGITS)?)?;
    let file = rest.strip_suffix(MARK).filter(|file| !file.is_empty() && !file.ends_with(b"/"))?;
    let number = std::str::from_utf8(digits).ok().filter(|d| d.bytes().all(|b| b.is_ascii_digit()))?.parse().ok()?;
    KINDS.contains(&kind).then_some((file, number))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_know_their_file() {
        let third = name(b"shop.dump", 3).unwrap();
        assert_eq!(third, b"shop.dump.part-00003");
        assert_eq!(part_of("command", &third), Some((b"shop.dump".as_slice(), 3)));
        assert_eq!(part_of("files", &third), None);
        for not in [b"shop.dump".as_slice(), b".part-00000", b"a/.part-00000", b"x.part-0000", b"x.part-+0001", b""] {
            assert_eq!(part_of("command", not), None);
        }
        assert_eq!(name(b"x", 100_000), None);
    }
}
