//! What each method of the control interface is: the right that it wants, what it is about, and whether it is written into the audit log.

use keepd_protocol::methods::{self as m, Method};
use serde_json::Value;

use super::Right;

/// What stands of a call in the audit log. What is refused always does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Audited {
    /// Nothing, when it is allowed.
    No,
    /// It shows something and leaves nothing behind: one entry, when it ended, and no more than so many of a user.
    Looks,
    /// It reveals contents, names of files, keys, the configuration or other users' doings.
    Reveals,
    /// It changes something.
    Changes,
}

/// What a call is about, which says which job's right it wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Subject {
    /// The caller itself.
    Caller,
    /// A list of what the caller may see, and of the one `job` where it names one.
    List,
    /// No single job: a right for some jobs is not enough.
    Whole,
    /// `job`
    Job,
    /// `backup`, of `job` where it names one.
    Backup,
    /// `a` and `b`
    TwoBackups,
    /// `backup`, or the newest one of `job`, or of the only one.
    Drill,
    /// `backup` and the `destination` that it goes to.
    Copy,
    /// `run`
    Run,
    /// `run`, which only stops.
    Cancel,
    /// `job` and `destination` of an import.
    NewImport,
    /// `import`
    Import,
    /// `item` of the configuration.
    Item,
    /// The items of `edits`.
    Edits,
}

/// A method and what it takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Deed {
    pub method: &'static str,
    /// What the caller needs at the least; some parameters want more. None: everybody who can connect may.
    pub right: Option<Right>,
    pub subject: Subject,
    pub audited: Audited,
}

macro_rules! deeds { ($($method:ident: $right:expr, $subject:ident, $audited:ident;)*) => {
    /// All methods.
    pub const ALL: &[Deed] = &[$(Deed { method: m::$method::NAME, right: $right, subject: Subject::$subject, audited: Audited::$audited }),*];

    /// The parameters of a call as its method reads them, each said in the one way that it is judged by.
    pub fn read(method: &str, parameters: Value) -> serde_json::Result<Value> {
        match method {
            $(m::$method::NAME => written_as_read::<m::$method>(parameters),)*
            _ => Ok(parameters),
        }
    }
}}

fn written_as_read<M: Method>(parameters: Value) -> serde_json::Result<Value> {
    serde_json::to_value(serde_json::from_value::<M::In>(parameters)?)
}

deeds! {
    ShowAccess: None, Caller, No;
    GetStatus: Some(Right::View), List, No;
    ListJobs: Some(Right::View), List, No;
    ShowJob: Some(Right::View), Job, No;
    ListRuns: Some(Right::View), List, No;
    ShowRun: Some(Right::View), Run, No;
    FollowRun: Some(Right::View), Run, No;
    ListBackups: Some(Right::View), List, No;
    ShowBackup: Some(Right::View), Backup, No;
    ShowRetention: Some(Right::View), Job, No;
    Watch: Some(Right::View), List, No;
    GetCoverage: Some(Right::Browse), Whole, Looks;
    ListKeys: Some(Right::View), Whole, No;
    ListEntries: Some(Right::Browse), Backup, Looks;
    DiffBackups: Some(Right::Browse), TwoBackups, Looks;
    StartCompare: Some(Right::Browse), Backup, Reveals;
    StartBackup: Some(Right::Backup), Job, Changes;
    StartCopy: Some(Right::Backup), Copy, Changes;
    StartCheck: Some(Right::Backup), Whole, Changes;
    StartDrill: Some(Right::Backup), Drill, Changes;
    StartCoverage: Some(Right::Backup), Whole, Changes;
    TestDestination: Some(Right::Backup), Whole, Changes;
    CancelRun: Some(Right::View), Cancel, Changes;
    StartRestore: Some(Right::RestoreTo), Backup, Reveals;
    StartCat: Some(Right::RestoreTo), Backup, Reveals;
    StartLoad: Some(Right::RestoreInPlace), Backup, Changes;
    StartInPlace: Some(Right::RestoreInPlace), Backup, Changes;
    StartUndo: Some(Right::RestoreInPlace), Run, Changes;
    StartExport: Some(Right::ExportBackup), Backup, Reveals;
    InitiateImport: Some(Right::ImportBackup), NewImport, Changes;
    UploadImport: Some(Right::ImportBackup), Import, Changes;
    StartImport: Some(Right::ImportBackup), Import, Changes;
    GetImport: Some(Right::ImportBackup), Import, No;
    ListImports: Some(Right::ImportBackup), List, No;
    CancelImport: Some(Right::ImportBackup), Import, Changes;
    MarkBackup: Some(Right::Backup), Backup, Changes;
    StartDelete: Some(Right::Delete), Backup, Changes;
    StartRetention: Some(Right::Delete), Job, Changes;
    StartPrune: Some(Right::Prune), Whole, Changes;
    TakeOver: Some(Right::JobEdit), Whole, Changes;
    AcknowledgeCoverage: Some(Right::JobEdit), Whole, Changes;
    Reload: Some(Right::JobEdit), Whole, Changes;
    ShowItemText: Some(Right::JobEdit), Item, Looks;
    EditConfig: Some(Right::JobEdit), Edits, Changes;
    ScheduleOnce: Some(Right::JobEdit), Job, Changes;
    ShowConfig: Some(Right::ConfigExport), Whole, Looks;
    CheckConfig: Some(Right::ConfigExport), Whole, Looks;
    PreviewConfig: Some(Right::ConfigExport), Whole, Looks;
    ExportConfig: Some(Right::ConfigExport), Whole, Reveals;
    StartConfigBackup: Some(Right::ConfigExport), Whole, Changes;
    ListConfigBackups: Some(Right::ConfigExport), Whole, No;
    FetchConfigBackup: Some(Right::ConfigExport), Whole, Reveals;
    ImportConfig: Some(Right::ConfigImport), Whole, Changes;
    UndoConfig: Some(Right::ConfigImport), Whole, Changes;
    StartKeyAdd: Some(Right::KeyManage), Whole, Changes;
    StartKeyRemove: Some(Right::KeyManage), Whole, Changes;
    StartKeyRotate: Some(Right::KeyManage), Whole, Changes;
    StartReEncrypt: Some(Right::KeyManage), Whole, Changes;
    MakeKit: Some(Right::KeyManage), Whole, Reveals;
    ListAudit: Some(Right::AuditRead), Whole, Looks;
    VerifyAudit: Some(Right::AuditRead), Whole, Looks;
}

/// What a method is; None for one that there is not.
pub fn of(method: &str) -> Option<&'static Deed> {
    ALL.iter().find(|deed| deed.method == method)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn every_method_has_its_deed() {
        let known: BTreeSet<_> = ALL.iter().map(|deed| deed.method).collect();
        assert_eq!(known.len(), ALL.len());
        assert_eq!(known, m::ALL.iter().copied().collect());
        assert!(ALL.iter().all(|deed| deed.right.is_some() || deed.method == m::ShowAccess::NAME));
    }
}
