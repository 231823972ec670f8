//! How an archive is compressed: as gzip members or zstd frames of about 1 MiB one after the other, which every gzip and zstd reads as one stream, and which
//! several threads can make at once.

/// How an archive is compressed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Packing {
    #[default]
    None,
    Gzip,
    Zstd,
}

impl Packing {
    /// What its name ends with: `.tar`, `.tar.gz`, `.tar.zst`.
    pub fn suffix(self) -> &'static str {
        match self {
            Packing::None => ".tar",
            Packing::Gzip => ".tar.gz",
            Packing::Zstd => ".tar.zst",
        }
    }
}
