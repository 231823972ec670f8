//! The parts that a configuration is exchanged in: one table each, named by what it is and its name.

use std::fmt;
use std::str::FromStr;

use super::value;

/// What an item is. Of the order in which they refer to each other: what others name comes first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ItemKind {
    /// A table that there is once: `[daemon]`, `[coverage]`, `[config_backup]`.
    Settings,
    /// `[encryption.NAME]`
    Encryption,
    /// `[destination.NAME]`
    Destination,
    /// `[job.NAME]`
    Job,
    /// `[access]`
    Access,
    /// `[notification.NAME]`
    Notification,
    /// What the ledger knows of a job's schedule; no table of the configuration.
    Schedule,
}

impl ItemKind {
    /// The words of the command line, of messages and of exports, in order.
    pub const ALL: [(ItemKind, &'static str); 7] = [
        (ItemKind::Settings, "settings"),
        (ItemKind::Encryption, "encryption"),
        (ItemKind::Destination, "destination"),
        (ItemKind::Job, "job"),
        (ItemKind::Access, "access"),
        (ItemKind::Notification, "notification"),
        (ItemKind::Schedule, "schedule"),
    ];

    pub fn word(self) -> &'static str {
        Self::ALL.into_iter().find(|(kind, _)| *kind == self).map_or("", |(_, word)| word)
    }

    /// Takes the plural, too: `jobs`.
    pub fn from_word(word: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|(_, w)| *w == word || word.strip_suffix('s') == Some(*w)).map(|(kind, _)| kind)
    }
}

/// `job.shop`, `destination.offsite`, `settings.daemon`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ItemName {
    pub kind: ItemKind,
    /// Of settings and access the name of their table.
    pub name: String,
}

impl ItemName {
    pub fn new(kind: ItemKind, name: impl Into<String>) -> Self {
        Self { kind, name: name.into() }
    }

    /// Where it stands in a configuration: `["job", "shop"]`, `["daemon"]`. Nothing for what is not in the configuration.
    pub fn table(&self) -> Vec<&str> {
        match self.kind {
            ItemKind::Settings | ItemKind::Access => vec![&self.name],
            ItemKind::Schedule => Vec::new(),
            kind => vec![kind.word(), &self.name],
        }
    }
}

impl fmt::Display for ItemName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.kind.word(), self.name)
    }
}

impl FromStr for ItemName {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let parsed = text.split_once('.').and_then(|(kind, name)| Some(Self::new(ItemKind::from_word(kind)?, name)));
        parsed.filter(|item| value::is_name(&item.name)).ok_or_else(|| {
            let kinds = ItemKind::ALL.map(|(_, word)| word).join(", ");
            format!("'{text}' names no part of a configuration; write job.shop or destination.offsite (there are: {kinds})")
        })
    }
}
