//! What archives are called: `JOB-YYYY-MM-DDTHH-MM-SSZ.tar.zst`, `-2` and so on after the time where that second is taken, `.enc` where it is sealed.

use jiff::Timestamp;
use jiff::tz::TimeZone;

use crate::portable::Packing;

/// What the companion of an archive is called after it.
pub const COMPANION: &str = ".meta.json";
/// `2026-11-21T02-15-00Z`
const TIME: &str = "%Y-%m-%dT%H-%M-%SZ";
const TIME_LEN: usize = 20;

/// A name in its parts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ArchiveName {
    pub job: String,
    /// To the second.
    pub time: Timestamp,
    /// 1, or more for a further one of that second.
    pub number: u32,
    pub packing: Packing,
    pub sealed: bool,
}

impl ArchiveName {
    /// None: it is none of ours.
    pub fn parse(name: &str) -> Option<Self> {
        let (rest, sealed) = match name.strip_suffix(".enc") {
            Some(rest) => (rest, true),
            None => (name, false),
        };
        // The longer endings first: `.tar` ends none of them.
        let packings = [Packing::Gzip, Packing::Zstd, Packing::None];
        let (rest, packing) = packings.into_iter().find_map(|p| Some((rest.strip_suffix(p.suffix())?, p)))?;
        let (rest, number) = match rest.strip_suffix('Z') {
            Some(_) => (rest, 1),
            None => {
                let (rest, number) = rest.rsplit_once('-')?;
                let plain = number.bytes().all(|b| b.is_ascii_digit()) && !number.starts_with('0');
                (rest, number.parse().ok().filter(|n| plain && *n > 1)?)
            }
        };
        let (job, time) = rest.split_at_checked(rest.len().checked_sub(TIME_LEN)?)?;
        let job = job.strip_suffix('-').filter(|job| !job.is_empty())?;
        let parsed = jiff::civil::DateTime::strptime(TIME, time).ok()?.to_zoned(TimeZone::UTC).ok()?.timestamp();
        let found = Self { job: job.to_owned(), time: parsed, number, packing, sealed };
        // Only what would be called so: two names of one archive there are not.
        (found.to_string() == name).then_some(found)
    }
}

impl std::fmt::Display for ArchiveName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}-{}", self.job, self.time.to_zoned(TimeZone::UTC).strftime(TIME))?;
        if self.number > 1 {
            write!(f, "-{}", self.number)?;
        }
        write!(f, "{}{}", self.packing.suffix(), if self.sealed { ".enc" } else { "" })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_come_back_as_what_they_are() {
        for (name, job, number, packing, sealed) in [
            ("shop-2026-11-21T02-15-00Z.tar.zst", "shop", 1, Packing::Zstd, false),
            ("my-shop.v2-2026-11-21T02-15-00Z-12.tar.gz.enc", "my-shop.v2", 12, Packing::Gzip, true),
            ("a-2026-01-01T00-00-00Z-2026-11-21T02-15-00Z.tar", "a-2026-01-01T00-00-00Z", 1, Packing::None, false),
        ] {
            let parsed = ArchiveName::parse(name).unwrap();
            assert_eq!((parsed.job.as_str(), parsed.number, parsed.packing, parsed.sealed), (job, number, packing, sealed));
            assert_eq!(parsed.time.to_string(), "2026-11-21T02:15:00Z");
            assert_eq!(parsed.to_string(), name);
        }
    }

    #[test]
    fn what_is_not_ours_is_no_name() {
        for name in [
            "",
            ".tar",
            "-2026-11-21T02-15-00Z.tar",
            "2026-11-21T02-15-00Z.tar",
            "shop-2026-11-21T02-15-00Z.tar.xz",
            "shop-2026-11-21T02-15-00Z",
            "shop-2026-11-31T02-15-00Z.tar",
            "shop-2026-11-21T02-15-00Z-1.tar",
            "shop-2026-11-21T02-15-00Z-02.tar",
            "shop-2026-11-21T02-15-00Z-+2.tar",
            "shop-2026-11-21T02-15-00Z.tar.zst.meta.json",
            "photos.tar.gz",
            "ö-2026-11-21T02-15-0öZ.tar",
        ] {
            assert_eq!(ArchiveName::parse(name), None, "{name}");
        }
    }
}
