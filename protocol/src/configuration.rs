//! The configuration as it is shown, exported and imported.

use serde::{Deserialize, Serialize};

use crate::model::word_enum;

/// One table of the configuration.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct ConfigItem {
    /// `job.shop`, `destination.offsite`, `settings.daemon`.
    pub item: String,
    /// The file that it stands in.
    pub file: String,
    /// As TOML; nothing that it names as a secret is in it.
    pub toml: String,
    pub secrets: Vec<ConfigSecret>,
}

/// A secret that a table names.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct ConfigSecret {
    /// Where: `secret_access_key`, `source[0].postgres.password`.
    pub at: String,
    /// From where it comes: `file /etc/keepd/s3`, `credential s3-secret`, `variable S3_SECRET`.
    pub from: String,
    /// Why it cannot be read, if so.
    pub problem: Option<String>,
}

/// What an export says of itself.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct ConfigFileInfo {
    pub format_version: u32,
    pub keepd_version: String,
    pub export_type: String,
    pub exported_at: String,
    pub instance: String,
    pub item_count: u64,
    pub includes_secrets: bool,
    pub sealed: bool,
    /// Where it opened with a profile of that name, or a key that was given.
    pub opened_with: Option<String>,
}

word_enum!(
    /// What becomes of this configuration.
    ImportMode {
        /// What is not in the file goes.
        Full = "full",
        /// What is not in the file stays.
        #[default] Merge = "merge",
        /// Only the items that are named.
        Selective = "selective",
    }
);

word_enum!(
    /// What becomes of an item that has another one's name here, and differs from it.
    ItemConflict {
        /// This machine's stays.
        #[default] Skip = "skip",
        /// It comes under another name.
        Rename = "rename",
        Overwrite = "overwrite",
        /// Nothing is done before each has an answer.
        Ask = "ask",
    }
);

word_enum!(
    /// What an import must be told explicitly.
    Allow {
        /// Something is stored with less encryption than now, or with none.
        #[default] WeakerEncryption = "weaker-encryption",
        /// Programs: hooks, plugins, command sources, health checks, the paths of tools and libraries.
        Commands = "commands",
        /// Somebody gets the rights of an administrator.
        Admins = "admins",
        /// A key or a secret differs from the one of that name here.
        KeyChange = "key-change",
    }
);

word_enum!(
    /// What becomes of an item.
    ItemAction {
        /// Nothing of that name is here.
        Add = "add",
        Overwrite = "overwrite",
        /// Added under another name.
        Rename = "rename",
        #[default] Skip = "skip",
        /// It is here already, as it is.
        Same = "same",
        /// It is only here, and goes (mode full).
        Remove = "remove",
        /// It waits for an answer (conflict: ask).
        Ask = "ask",
    }
);

/// What an import does with one item.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct PlannedItem {
    /// Its name in the file (where it goes, its name here).
    pub item: String,
    pub action: ItemAction,
    /// Its name here, where that is another one.
    pub to: Option<String>,
    /// Why it is skipped, or what should be known.
    pub notes: Vec<String>,
    pub changes: Vec<FieldChange>,
    /// What must be allowed for it.
    pub needs: Vec<Allow>,
}

/// One value that becomes another. None: it is not there.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct FieldChange {
    /// `schedule`, `source[1].exclude`.
    pub at: String,
    /// As TOML writes it; a secret is never shown.
    pub before: Option<String>,
    pub after: Option<String>,
}

/// What an import does, or did.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct ConfigPlan {
    pub items: Vec<PlannedItem>,
    /// What keeps it from being applied; nothing is changed while there is one.
    pub problems: Vec<String>,
    /// What must be allowed first.
    pub needs: Vec<Allow>,
    /// Secrets that must be entered again, and where: `destination.offsite secret_access_key: put it into /etc/keepd/s3`.
    pub missing: Vec<String>,
    /// Of the files, as `diff -u` shows it; secrets are in none of them.
    pub diff: String,
    /// Secret files that are written, none over another one.
    pub files: Vec<String>,
    /// Names the configuration, the file and the options that this was planned for.
    pub base: String,
}

/// A stored configuration.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ConfigBackupInfo {
    /// As it is called at the destination.
    pub name: String,
    pub time: String,
    pub bytes: u64,
}

/// A change of one table of the configuration.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ConfigEdit {
    /// `job.shop`, `destination.offsite`, `settings.daemon`.
    pub item: String,
    pub change: EditKind,
    /// For `add`: the whole table. For `patch`: the keys that change, null for those that go.
    #[serde(skip_serializing_if = "serde_json::Map::is_empty")]
    pub values: serde_json::Map<String, serde_json::Value>,
    /// For `text`: the table as TOML, with its comments, as ShowItemText gives it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub text: Option<String>,
}

word_enum!(
    /// What an edit does with its item.
    EditKind {
        /// It must not be there yet.
        Add = "add",
        #[default] Patch = "patch",
        Text = "text",
        Remove = "remove",
    }
);

word_enum!(
    /// What becomes of the backups of a job that is removed.
    LeftBackups {
        /// They stay, and nothing removes them by itself.
        #[default] Keep = "keep",
        /// They are deleted at all destinations.
        Delete = "delete",
    }
);
