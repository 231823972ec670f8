//! Who may do what.

use serde::{Deserialize, Serialize};

/// What somebody may be allowed to do. A role is a set of rights, for all jobs or for some.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Right {
    /// What there is and how it does: jobs, runs, backups, destinations, events.
    View,
    /// What is in backups: names, sizes, differences.
    Browse,
    /// Start backups, copies, checks, drills, scans.
    Backup,
    /// Contents of backups, written with the caller's own rights.
    RestoreTo,
    /// Contents of backups to where they came from, with the daemon's rights, and back.
    RestoreInPlace,
    ExportBackup,
    ImportBackup,
    /// Remove backups, unpin and accept them, confirm rules that remove them.
    Delete,
    /// Remove what no backup needs.
    Prune,
    /// Change jobs, their schedules, destinations; read the configuration again.
    JobEdit,
    /// The configuration as it stands, without its secrets.
    ConfigExport,
    ConfigExportSecrets,
    ConfigImport,
    /// Key slots, exchange of keys, recovery kits.
    KeyManage,
    /// What was done by whom, and who may what.
    AuditRead,
}

impl Right {
    /// The words of the configuration, of messages and of the wire, in order.
    pub const ALL: [(Right, &'static str); 15] = [
        (Right::View, "view"),
        (Right::Browse, "browse"),
        (Right::Backup, "backup"),
        (Right::RestoreTo, "restore_to"),
        (Right::RestoreInPlace, "restore_in_place"),
        (Right::ExportBackup, "export_backup"),
        (Right::ImportBackup, "import_backup"),
        (Right::Delete, "delete"),
        (Right::Prune, "prune"),
        (Right::JobEdit, "job_edit"),
        (Right::ConfigExport, "config_export"),
        (Right::ConfigExportSecrets, "config_export_secrets"),
        (Right::ConfigImport, "config_import"),
        (Right::KeyManage, "key_manage"),
        (Right::AuditRead, "audit_read"),
    ];

    pub fn word(self) -> &'static str {
        Self::ALL.into_iter().find(|(right, _)| *right == self).map_or("", |(_, word)| word)
    }
}

impl std::fmt::Display for Right {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.word())
    }
}

/// A role that somebody has.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Grant {
    /// admin, operator, viewer, or one of the configuration's own.
    pub role: String,
    pub rights: Vec<Right>,
    /// None: all jobs, and what belongs to no job.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub jobs: Option<Vec<String>>,
    /// What gives it: `root`, `the daemon's own user`, `alice`, `@backup`.
    pub through: String,
}

/// What somebody may do.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Access {
    pub user: String,
    pub uid: u32,
    /// Names, or numbers of those that have none.
    pub groups: Vec<String>,
    pub grants: Vec<Grant>,
}

/// A role, and who has it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Role {
    pub name: String,
    pub rights: Vec<Right>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub jobs: Option<Vec<String>>,
    /// As the configuration has them: users, `@groups`, numeric ids.
    pub members: Vec<String>,
}
