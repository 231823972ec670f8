//! The standard interface `org.varlink.service`, who may call, and which handler a call goes to.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use keepd_protocol::call::{Call, errors};
use keepd_protocol::methods::{self as m, Method};
use keepd_protocol::{INTERFACE, INTERFACE_NAME};
use serde_json::{Value, json};

use super::App;
use super::transport::{Fault, Peer, Replies, Service};
use crate::access::{By, deed};

/// The control service of a daemon.
pub struct Control {
    pub app: Arc<App>,
}

const STANDARD: &str = "org.varlink.service";
const STANDARD_TEXT: &str = "# The Varlink Service Interface is provided by every varlink service. It\n# describes the service and the interfaces it implements.\ninterface org.varlink.service\n\n# Get a list of all the interfaces a service provides and information\n# about the implementation.\nmethod GetInfo() -> (\n  vendor: string,\n  product: string,\n  version: string,\n  url: string,\n  interfaces: []string\n)\n\n# Get the description of an interface that is implemented by this service.\nmethod GetInterfaceDescription(interface: string) -> (description: string)\n\n# The requested interface was not found.\nerror InterfaceNotFound (interface: string)\n\n# The requested method was not found\nerror MethodNotFound (method: string)\n\n# The interface defines the requested method, but the service does not\n# implement it.\nerror MethodNotImplemented (method: string)\n\n# One of the passed parameters is invalid.\nerror InvalidParameter (parameter: string)\n\n# Client is denied access\nerror PermissionDenied ()\n\n# Method is expected to be called with 'more' set to true, but wasn't\nerror ExpectedMore ()\n";

impl Service for Control {
    async fn call(&self, peer: &Peer, call: Call, descriptors: Vec<OwnedFd>, replies: &mut Replies<'_>) -> Result<Value, Fault> {
        let mut call = call;
        if let Some(method) = call.method.strip_prefix("org.varlink.service.") {
            self.in_pace(peer)?;
            return standard(method, &call);
        }
        let Some(deed) = deed::of(&call.method) else {
            self.in_pace(peer)?;
            return Err(Fault::new("org.varlink.service.MethodNotFound", json!({ "method": call.method })));
        };
        // What is judged is what will be read, however it was written. That it cannot be read is told to whoever may call at all.
        let readable = as_read(&mut call);
        let (by, permitted) = match self.permit(peer, deed, &mut call).await {
            Ok(by) => (by, Ok(())),
            Err(fault) => (By::default(), Err(fault)),
        };
        let recorded = self.record(peer, &self.app.runs.judge().name(peer.uid).await, deed, &call, &permitted).await?;
        permitted?;
        tracing::debug!(uid = peer.uid, pid = peer.pid, method = %call.method, "control call");
        if readable.is_ok() && Self::is_reconfiguring(&call.method) {
            // What was begun comes to its end, in force and written down, also when the caller goes.
            let control = Self { app: self.app.clone() };
            let whole = async move {
                let result = control.reconfigure(by, call, descriptors).await;
                recorded.end(&result).await?;
                result
            };
            return tokio::spawn(whole).await.map_err(super::handlers::failed)?;
        }
        let result = match readable {
            Ok(()) => self.dispatch(peer, by, call, descriptors, replies).await,
            Err(fault) => Err(fault),
        };
        recorded.end(&result).await?;
        result
    }

    fn connections_per_user(&self) -> usize {
        self.app.config.get().access.limits.connections
    }

    fn connects_too_often(&self, uid: u32) -> Option<String> {
        let wait = self.app.runs.judge().pace_connections(uid).err()?;
        Some(self.too_often("connect to", wait))
    }

    fn is_logged(&self, uid: u32) -> bool {
        self.app.runs.judge().is_logged(uid)
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

impl Control {
    async fn dispatch(
        &self,
        peer: &Peer,
        by: By,
        call: Call,
        descriptors: Vec<OwnedFd>,
        replies: &mut Replies<'_>,
    ) -> Result<Value, Fault> {
        let p = call.parameters;
        let value = match call.method.as_str() {
            m::GetStatus::NAME => out::<m::GetStatus>(self.get_status(input::<m::GetStatus>(p)?, &by).await?),
            m::ListJobs::NAME => out::<m::ListJobs>(self.list_jobs(input::<m::ListJobs>(p)?, &by).await?),
            m::ShowJob::NAME => out::<m::ShowJob>(self.show_job(input::<m::ShowJob>(p)?, &by).await?),
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
            m::FollowRun::NAME => out::<m::FollowRun>(self.follow_run(input::<m::FollowRun>(p)?, &by, replies).await?),
            m::CancelRun::NAME => out::<m::CancelRun>(self.cancel_run(input::<m::CancelRun>(p)?).await?),
            m::ListRuns::NAME => out::<m::ListRuns>(self.list_runs(input::<m::ListRuns>(p)?, &by).await?),
            m::ShowRun::NAME => out::<m::ShowRun>(self.show_run(input::<m::ShowRun>(p)?).await?),
            m::ListBackups::NAME => out::<m::ListBackups>(self.list_backups(input::<m::ListBackups>(p)?, &by, replies).await?),
            m::ShowBackup::NAME => out::<m::ShowBackup>(self.show_backup(input::<m::ShowBackup>(p)?).await?),
            m::ListEntries::NAME => out::<m::ListEntries>(self.list_entries(input::<m::ListEntries>(p)?, replies).await?),
            m::DiffBackups::NAME => out::<m::DiffBackups>(self.diff_backups(input::<m::DiffBackups>(p)?, replies).await?),
            m::Watch::NAME => out::<m::Watch>(self.watch(input::<m::Watch>(p)?, &by, replies).await?),
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
            m::StartConfigBackup::NAME => {
                out::<m::StartConfigBackup>(self.start_config_backup(input::<m::StartConfigBackup>(p)?, by).await?)
            }
            m::ListConfigBackups::NAME => out::<m::ListConfigBackups>(self.list_config_backups(input::<m::ListConfigBackups>(p)?).await?),
            m::FetchConfigBackup::NAME => {
                out::<m::FetchConfigBackup>(self.fetch_config_backup(input::<m::FetchConfigBackup>(p)?, descriptors).await?)
            }
            m::InitiateImport::NAME => out::<m::InitiateImport>(self.initiate_import(input::<m::InitiateImport>(p)?, by).await?),
            m::UploadImport::NAME => out::<m::UploadImport>(self.upload_import(input::<m::UploadImport>(p)?, descriptors).await?),
            m::StartImport::NAME => out::<m::StartImport>(self.start_import(input::<m::StartImport>(p)?, by).await?),
            m::GetImport::NAME => out::<m::GetImport>(self.get_import(input::<m::GetImport>(p)?).await?),
            m::ListImports::NAME => out::<m::ListImports>(self.list_imports(input::<m::ListImports>(p)?, &by).await?),
            m::CancelImport::NAME => out::<m::CancelImport>(self.cancel_import(input::<m::CancelImport>(p)?).await?),
            m::ShowAccess::NAME => out::<m::ShowAccess>(self.show_access(input::<m::ShowAccess>(p)?, peer, by).await?),
            m::ListAudit::NAME => out::<m::ListAudit>(self.list_audit(input::<m::ListAudit>(p)?, replies).await?),
            m::VerifyAudit::NAME => out::<m::VerifyAudit>(self.verify_audit(input::<m::VerifyAudit>(p)?).await?),
            m::ShowItemText::NAME => out::<m::ShowItemText>(self.show_item_text(input::<m::ShowItemText>(p)?).await?),
            other => return Err(Fault::new("org.varlink.service.MethodNotImplemented", json!({ "method": other }))),
        };
        value.map_err(unwritable)
    }

    /// The methods of which nothing may stay half done.
    fn is_reconfiguring(method: &str) -> bool {
        matches!(method, m::EditConfig::NAME | m::ImportConfig::NAME | m::UndoConfig::NAME | m::ScheduleOnce::NAME)
    }

    async fn reconfigure(&self, by: By, call: Call, descriptors: Vec<OwnedFd>) -> Result<Value, Fault> {
        let p = call.parameters;
        let value = match call.method.as_str() {
            m::ImportConfig::NAME => out::<m::ImportConfig>(self.import_config(input::<m::ImportConfig>(p)?, descriptors, by).await?),
            m::UndoConfig::NAME => out::<m::UndoConfig>(self.undo_config(input::<m::UndoConfig>(p)?, by).await?),
            m::EditConfig::NAME => out::<m::EditConfig>(self.edit_config_as_seen(input::<m::EditConfig>(p)?, by).await?),
            m::ScheduleOnce::NAME => out::<m::ScheduleOnce>(self.schedule_once(input::<m::ScheduleOnce>(p)?, by).await?),
            other => return Err(Fault::new("org.varlink.service.MethodNotImplemented", json!({ "method": other }))),
        };
        value.map_err(unwritable)
    }
}

fn unwritable(e: serde_json::Error) -> Fault {
    Fault::new(errors::FAILED, json!({ "message": format!("the reply cannot be written: {e}") }))
}

/// Has the parameters of a call say what they say in the one way that keepd itself would. The pieces of an upload, of which nothing else is judged than
/// a text, stay as they are.
fn as_read(call: &mut Call) -> Result<(), Fault> {
    if call.method == m::UploadImport::NAME {
        return Ok(());
    }
    let given = call.parameters.as_ref().and_then(Value::as_object).cloned().unwrap_or_default();
    match deed::read(&call.method, Value::Object(given.clone())) {
        Ok(Value::Object(mut read)) => {
            // What was not given is not said to have been.
            read.retain(|name, _| given.contains_key(name));
            call.parameters = Some(Value::Object(read));
            Ok(())
        }
        Ok(_) => Ok(()),
        Err(e) => Err(Fault::invalid_parameter(&culprit(&Value::Object(given), &e.to_string()))),
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
