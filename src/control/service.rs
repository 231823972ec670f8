//! The standard interface `org.varlink.service`, who may call, and which handler a call goes to.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use keepd_protocol::call::{Call, errors};
use keepd_protocol::methods::{self as m, Method};
use keepd_protocol::{INTERFACE, INTERFACE_NAME};
use serde_json::{Value, json};

use super::App;
use super::transport::{Fault, Peer, Replies, Service};

/// The control service of a daemon.
pub struct Control {
    pub app: Arc<App>,
}

const STANDARD: &str = "org.varlink.service";
const STANDARD_TEXT: &str = "# The Varlink Service Interface is provided by every varlink service. It\n# describes the service and the interfaces it implements.\ninterface org.varlink.service\n\n# Get a list of all the interfaces a service provides and information\n# about the implementation.\nmethod GetInfo() -> (\n  vendor: string,\n  product: string,\n  version: string,\n  url: string,\n  interfaces: []string\n)\n\n# Get the description of an interface that is implemented by this service.\nmethod GetInterfaceDescription(interface: string) -> (description: string)\n\n# The requested interface was not found.\nerror InterfaceNotFound (interface: string)\n\n# The requested method was not found\nerror MethodNotFound (method: string)\n\n# The interface defines the requested method, but the service does not\n# implement it.\nerror MethodNotImplemented (method: string)\n\n# One of the passed parameters is invalid.\nerror InvalidParameter (parameter: string)\n\n# Client is denied access\nerror PermissionDenied ()\n\n# Method is expected to be called with 'more' set to true, but wasn't\nerror ExpectedMore ()\n";

impl Service for Control {
    async fn call(&self, peer: &Peer, call: Call, descriptors: Vec<OwnedFd>, replies: &mut Replies<'_>) -> Result<Value, Fault> {
        if let Some(method) = call.method.strip_prefix("org.varlink.service.") {
            return standard(method, &call);
        }
        if !m::ALL.contains(&call.method.as_str()) {
            return Err(Fault::new("org.varlink.service.MethodNotFound", json!({ "method": call.method })));
        }
        permitted(peer, &call.method)?;
        tracing::debug!(uid = peer.uid, pid = peer.pid, method = %call.method, "control call");
        self.dispatch(peer, call, descriptors, replies).await
    }
}

fn standard(method: &str, call: &Call) -> Result<Value, Fault> {
    match method {
        "GetInfo" => Ok(json!({
            "vendor": "keepd", "product": "keepd", "version": env!("CARGO_PKG_VERSION"), "url": "https://example.org/keepd",
            "interfaces": [STANDARD, INTERFACE_NAME],
        })),
        "GetInterfaceDescription" => {
            let name = call.parameters.as_ref().and_then(|p| p.get("interface")).and_then(Value::as_str);
            match name.ok_or_else(|| Fault::invalid_parameter("interface"))? {
                INTERFACE_NAME => Ok(json!({ "description": INTERFACE })),
                STANDARD => Ok(json!({ "description": STANDARD_TEXT })),
                other => Err(Fault::new("org.varlink.service.InterfaceNotFound", json!({ "interface": other }))),
            }
        }
        _ => Err(Fault::new("org.varlink.service.MethodNotFound", json!({ "method": call.method }))),
    }
}

/// For now root and the daemon's own user may do everything, and nobody else anything.
fn permitted(peer: &Peer, method: &str) -> Result<(), Fault> {
    if peer.uid == 0 || peer.uid == rustix::process::geteuid().as_raw() {
        return Ok(());
    }
    tracing::warn!(uid = peer.uid, pid = peer.pid, method, "a control call was refused");
    let right = method.rsplit('.').next().unwrap_or_default();
    let message = format!("user {} may not call {right}: root and the user keepd runs as may; try with sudo", peer.uid);
    Err(Fault::new(errors::NOT_PERMITTED, json!({ "message": message, "right": right })))
}

impl Control {
    async fn dispatch(&self, peer: &Peer, call: Call, descriptors: Vec<OwnedFd>, replies: &mut Replies<'_>) -> Result<Value, Fault> {
        let by = user_name(peer.uid);
        let p = call.parameters;
        let value = match call.method.as_str() {
            m::GetStatus::NAME => out::<m::GetStatus>(self.get_status(input::<m::GetStatus>(p)?).await?),
            m::ListJobs::NAME => out::<m::ListJobs>(self.list_jobs(input::<m::ListJobs>(p)?).await?),
            m::ShowJob::NAME => out::<m::ShowJob>(self.show_job(input::<m::ShowJob>(p)?).await?),
            m::StartBackup::NAME => out::<m::StartBackup>(self.start_backup(input::<m::StartBackup>(p)?, by).await?),
            m::StartCheck::NAME => out::<m::StartCheck>(self.start_check(input::<m::StartCheck>(p)?, descriptors, by).await?),
            m::StartPrune::NAME => out::<m::StartPrune>(self.start_prune(input::<m::StartPrune>(p)?, descriptors, by).await?),
            m::StartDelete::NAME => out::<m::StartDelete>(self.start_delete(input::<m::StartDelete>(p)?, by).await?),
            m::MarkBackup::NAME => out::<m::MarkBackup>(self.mark_backup(input::<m::MarkBackup>(p)?, by).await?),
            m::ShowRetention::NAME => out::<m::ShowRetention>(self.show_retention(input::<m::ShowRetention>(p)?).await?),
            m::StartRetention::NAME => out::<m::StartRetention>(self.start_retention(input::<m::StartRetention>(p)?, by).await?),
            m::StartCopy::NAME => out::<m::StartCopy>(self.start_copy(input::<m::StartCopy>(p)?, descriptors, by).await?),
            m::TestDestination::NAME => out::<m::TestDestination>(self.test_destination(input::<m::TestDestination>(p)?).await?),
            m::TakeOver::NAME => out::<m::TakeOver>(self.take_over(input::<m::TakeOver>(p)?, by).await?),
            m::StartRestore::NAME => out::<m::StartRestore>(self.start_restore(input::<m::StartRestore>(p)?, descriptors, by).await?),
            m::StartLoad::NAME => out::<m::StartLoad>(self.start_load(input::<m::StartLoad>(p)?, descriptors, by).await?),
            m::StartInPlace::NAME => out::<m::StartInPlace>(self.start_in_place(input::<m::StartInPlace>(p)?, descriptors, by).await?),
            m::StartUndo::NAME => out::<m::StartUndo>(self.start_undo(input::<m::StartUndo>(p)?, descriptors, by).await?),
            m::StartExport::NAME => out::<m::StartExport>(self.start_export(input::<m::StartExport>(p)?, descriptors, by).await?),
            m::StartCat::NAME => out::<m::StartCat>(self.start_cat(input::<m::StartCat>(p)?, descriptors, by).await?),
            m::FollowRun::NAME => out::<m::FollowRun>(self.follow_run(input::<m::FollowRun>(p)?, replies).await?),
            m::CancelRun::NAME => out::<m::CancelRun>(self.cancel_run(input::<m::CancelRun>(p)?).await?),
            m::ListRuns::NAME => out::<m::ListRuns>(self.list_runs(input::<m::ListRuns>(p)?).await?),
            m::ShowRun::NAME => out::<m::ShowRun>(self.show_run(input::<m::ShowRun>(p)?).await?),
            m::ListBackups::NAME => out::<m::ListBackups>(self.list_backups(input::<m::ListBackups>(p)?, replies).await?),
            m::ShowBackup::NAME => out::<m::ShowBackup>(self.show_backup(input::<m::ShowBackup>(p)?).await?),
            m::ListEntries::NAME => out::<m::ListEntries>(self.list_entries(input::<m::ListEntries>(p)?, replies).await?),
            m::DiffBackups::NAME => out::<m::DiffBackups>(self.diff_backups(input::<m::DiffBackups>(p)?, replies).await?),
            m::Watch::NAME => out::<m::Watch>(self.watch(input::<m::Watch>(p)?, replies).await?),
            m::Reload::NAME => out::<m::Reload>(self.reload(input::<m::Reload>(p)?).await?),
            m::StartCompare::NAME => out::<m::StartCompare>(self.start_compare(input::<m::StartCompare>(p)?, descriptors, by).await?),
            m::StartCoverage::NAME => out::<m::StartCoverage>(self.start_coverage(input::<m::StartCoverage>(p)?, by).await?),
            m::GetCoverage::NAME => out::<m::GetCoverage>(self.get_coverage(input::<m::GetCoverage>(p)?, replies).await?),
            m::AcknowledgeCoverage::NAME => {
                out::<m::AcknowledgeCoverage>(self.acknowledge_coverage(input::<m::AcknowledgeCoverage>(p)?, by).await?)
            }
            m::StartReEncrypt::NAME => {
                out::<m::StartReEncrypt>(self.start_re_encrypt(input::<m::StartReEncrypt>(p)?, descriptors, by).await?)
            }
            m::StartDrill::NAME => out::<m::StartDrill>(self.start_drill(input::<m::StartDrill>(p)?, descriptors, by).await?),
            m::ListKeys::NAME => out::<m::ListKeys>(self.list_keys(input::<m::ListKeys>(p)?).await?),
            m::StartKeyAdd::NAME => out::<m::StartKeyAdd>(self.start_key_add(input::<m::StartKeyAdd>(p)?, descriptors, by).await?),
            m::StartKeyRemove::NAME => out::<m::StartKeyRemove>(self.start_key_remove(input::<m::StartKeyRemove>(p)?, by).await?),
            m::StartKeyRotate::NAME => {
                out::<m::StartKeyRotate>(self.start_key_rotate(input::<m::StartKeyRotate>(p)?, descriptors, by).await?)
            }
            m::MakeKit::NAME => out::<m::MakeKit>(self.make_kit(input::<m::MakeKit>(p)?, descriptors, by).await?),
            m::ShowConfig::NAME => out::<m::ShowConfig>(self.show_config(input::<m::ShowConfig>(p)?).await?),
            m::CheckConfig::NAME => out::<m::CheckConfig>(self.check_config(input::<m::CheckConfig>(p)?).await?),
            m::PreviewConfig::NAME => out::<m::PreviewConfig>(self.preview_config(input::<m::PreviewConfig>(p)?).await?),
            m::ExportConfig::NAME => out::<m::ExportConfig>(self.export_config(input::<m::ExportConfig>(p)?, descriptors).await?),
            m::ImportConfig::NAME => out::<m::ImportConfig>(self.import_config(input::<m::ImportConfig>(p)?, descriptors, by).await?),
            m::UndoConfig::NAME => out::<m::UndoConfig>(self.undo_config(input::<m::UndoConfig>(p)?, by).await?),
            m::StartConfigBackup::NAME => {
                out::<m::StartConfigBackup>(self.start_config_backup(input::<m::StartConfigBackup>(p)?, by).await?)
            }
            m::ListConfigBackups::NAME => out::<m::ListConfigBackups>(self.list_config_backups(input::<m::ListConfigBackups>(p)?).await?),
            m::FetchConfigBackup::NAME => {
                out::<m::FetchConfigBackup>(self.fetch_config_backup(input::<m::FetchConfigBackup>(p)?, descriptors).await?)
            }
            m::InitiateImport::NAME => out::<m::InitiateImport>(self.initiate_import(input::<m::InitiateImport>(p)?, peer, by).await?),
            m::UploadImport::NAME => out::<m::UploadImport>(self.upload_import(input::<m::UploadImport>(p)?, descriptors).await?),
            m::StartImport::NAME => out::<m::StartImport>(self.start_import(input::<m::StartImport>(p)?, by).await?),
            m::GetImport::NAME => out::<m::GetImport>(self.get_import(input::<m::GetImport>(p)?).await?),
            m::ListImports::NAME => out::<m::ListImports>(self.list_imports(input::<m::ListImports>(p)?).await?),
            m::CancelImport::NAME => out::<m::CancelImport>(self.cancel_import(input::<m::CancelImport>(p)?).await?),
            other => return Err(Fault::new("org.varlink.service.MethodNotImplemented", json!({ "method": other }))),
        };
        value.map_err(|e| Fault::new(errors::FAILED, json!({ "message": format!("the reply cannot be written: {e}") })))
    }
}

/// Reads parameters; a wrong or unknown one is named.
fn input<M: Method>(parameters: Option<Value>) -> Result<M::In, Fault> {
    let object = match parameters {
        None | Some(Value::Null) => Value::Object(serde_json::Map::new()),
        Some(value) => value,
    };
    serde_json::from_value(object.clone()).map_err(|e| Fault::invalid_parameter(&culprit(&object, &e.to_string())))
}

/// The parameter an error is about: serde names unknown and missing ones in backticks, wrong types by their value only.
fn culprit(object: &Value, error: &str) -> String {
    if let Some(name) = error.split('`').nth(1).filter(|_| error.contains("field `")) {
        return name.to_owned();
    }
    let names: Vec<&str> = object.as_object().map(|o| o.keys().map(String::as_str).collect()).unwrap_or_default();
    match names.as_slice() {
        [one] => (*one).to_owned(),
        more => format!("one of {} ({error})", more.join(", ")),
    }
}

fn out<M: Method>(value: M::Out) -> Result<Value, serde_json::Error> {
    serde_json::to_value(value)
}

fn user_name(uid: u32) -> String {
    uzers::get_user_by_uid(uid).map_or_else(|| format!("uid {uid}"), |u| u.name().to_string_lossy().into_owned())
}
