//! `service = "exec"`: a program that keeps objects for keepd, spoken to over its standard input and output.
//!
//! A request is one line of JSON, followed by an object's bytes where it carries some; so is an answer. One process answers one
//! request at a time; for several at once there are several processes. docs/storage-plugin.md is the interface in full.

use std::collections::{BTreeMap, VecDeque};
use std::process::Stdio;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::{Buf, Bytes, BytesMut};
use futures::Future;
use opendal::raw::{
    OpCopy, OpCreateDir, OpDelete, OpList, OpPresign, OpRead, OpRename, OpStat, OpWrite, RpCreateDir, RpPresign, RpRead, RpRename, RpStat,
    Service, ServiceInfo, oio,
};
use opendal::{Buffer, BytesRange, Capability, Error, ErrorKind, Metadata, MetadataBuilder, OperationContext, Operator, Result};
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufRead, AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::process::{Child, ChildStdin, ChildStdout, Command};

use super::shared::{PIECE_BYTES, Shared};
use crate::process::PASSED_ON;

/// The versions of the interface that keepd speaks.
const VERSIONS: [u32; 1] = [1];
/// No line is longer.
const MAX_LINE: usize = 64 << 10;
/// What a plugin may send for one object.
const MAX_OBJECT: u64 = 64 << 20;
/// For the end, once it was asked for.
const FAREWELL: Duration = Duration::from_secs(5);

#[derive(Debug, Serialize)]
#[serde(tag = "do", rename_all = "lowercase")]
enum Request<'a> {
    Hello {
        versions: &'a [u32],
        keepd: &'a str,
        options: &'a BTreeMap<String, String>,
    },
    Put {
        name: &'a str,
        size: u64,
        if_absent: bool,
    },
    Get {
        name: &'a str,
        offset: u64,
        #[serde(skip_serializing_if = "Option::is_none")]
        len: Option<u64>,
    },
    Stat {
        name: &'a str,
    },
    List {
        prefix: &'a str,
    },
    Delete {
        name: &'a str,
    },
    Bye,
}

#[derive(Debug, Default, Deserialize)]
struct Answer {
    #[serde(default)]
    ok: bool,
    /// Of the object, or of the bytes that follow.
    size: Option<u64>,
    version: Option<u32>,
    error: Option<String>,
    message: Option<String>,
}

/// A line of a listing: an object, or the end with the number of objects before it.
#[derive(Debug, Deserialize)]
struct Line {
    name: Option<String>,
    size: Option<u64>,
    end: Option<bool>,
    count: Option<u64>,
}

/// An operator whose objects the program keeps. Nothing is started yet.
pub(super) fn operator(command: &[String], options: BTreeMap<String, String>, patience: Duration, shared: Arc<Shared>) -> Operator {
    let plugin = Plugin { command: command.to_vec(), options, patience, shared, idle: Mutex::default() };
    let service = Exec { plugin: Arc::new(plugin), info: ServiceInfo::new("exec", "/", "") };
    Operator::from_parts(OperationContext::new(), Arc::new(service))
}

#[derive(Debug, Clone)]
struct Exec {
    plugin: Arc<Plugin>,
    info: ServiceInfo,
}

/// The program and its processes that wait for a request.
struct Plugin {
    command: Vec<String>,
    options: BTreeMap<String, String>,
    /// For each step of an answer.
    patience: Duration,
    shared: Arc<Shared>,
    idle: Mutex<Vec<Process>>,
}

impl std::fmt::Debug for Plugin {
    /// Options may hold secrets.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Plugin").field("program", &self.command.first()).finish_non_exhaustive()
    }
}

struct Process {
    /// Killed when it is dropped.
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
    patience: Duration,
    shared: Arc<Shared>,
}

fn broken(text: impl Into<String>) -> Error {
    Error::new(ErrorKind::Unexpected, text).set_temporary()
}

fn unsupported() -> Error {
    Error::new(ErrorKind::Unsupported, "plugins do not have this operation")
}

impl Plugin {
    fn program(&self) -> &str {
        self.command.first().map_or("", String::as_str)
    }

    async fn start(&self) -> Result<Process> {
        let program = self.program();
        let mut command = Command::new(program);
        command.args(self.command.iter().skip(1)).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
        // What it has to know it is told; in keepd's own environment there may be secrets of others.
        command.env_clear().envs(PASSED_ON.iter().filter_map(|name| Some((name, std::env::var_os(name)?))));
        let mut child = command.spawn().map_err(|e| Error::new(ErrorKind::ConfigInvalid, format!("cannot start {program}: {e}")))?;
        let (Some(input), Some(output), Some(errors)) = (child.stdin.take(), child.stdout.take(), child.stderr.take()) else {
            return Err(broken(format!("{program} was started without its pipes")));
        };
        let name = program.to_owned();
        tokio::spawn(async move {
            let mut lines = BufReader::new(errors.take(16 << 20)).lines();
            while let Ok(Some(line)) = lines.next_line().await {
                tracing::info!(plugin = %name, "{line}");
            }
        });
        let (patience, shared) = (self.patience, self.shared.clone());
        let mut process = Process { child, input, output: BufReader::new(output), patience, shared };
        let hello = Request::Hello { versions: &VERSIONS, keepd: env!("CARGO_PKG_VERSION"), options: &self.options };
        let answer = process.ask(&hello, None).await?;
        match answer.version {
            Some(version) if VERSIONS.contains(&version) => Ok(process),
            other => Err(Error::new(
                ErrorKind::ConfigInvalid,
                format!("{program} does not speak version 1 of the interface (it answered {other:?})"),
            )),
        }
    }

    /// Asks once; `take` reads what follows the answer. A process that did not keep to the interface, or to the time, is ended.
    async fn ask<T>(
        &self,
        request: Request<'_>,
        bytes: Option<&Buffer>,
        take: impl AsyncFnOnce(&mut Process, Answer) -> Result<T>,
    ) -> Result<T> {
        let idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let mut process = match idle {
            Some(process) => process,
            None => self.start().await?,
        };
        let taken = match process.ask(&request, bytes).await {
            Ok(answer) => take(&mut process, answer).await,
            Err(e) => Err(e),
        };
        match &taken {
            Err(e) if e.is_temporary() => {}
            _ => self.idle.lock().unwrap_or_else(PoisonError::into_inner).push(process),
        }
        taken.map_err(|e| e.with_context("plugin", self.program()))
    }
}

impl Drop for Plugin {
    fn drop(&mut self) {
        let idle = std::mem::take(self.idle.get_mut().unwrap_or_else(PoisonError::into_inner));
        let Ok(runtime) = tokio::runtime::Handle::try_current() else { return };
        for mut process in idle {
            runtime.spawn(async move {
                let _ = process.send(&Request::Bye, None).await;
                let Process { mut child, input, output, .. } = process;
                drop((input, output));
                let _ = tokio::time::timeout(FAREWELL, child.wait()).await;
            });
        }
    }
}

impl Process {
    async fn send(&mut self, request: &Request<'_>, bytes: Option<&Buffer>) -> Result<()> {
        let mut line = serde_json::to_vec(request).map_err(|e| broken(e.to_string()))?;
        line.push(b'\n');
        self.pass(&line).await?;
        let mut left = bytes.cloned().unwrap_or_default();
        while !left.is_empty() {
            let piece = left.copy_to_bytes(self.shared.next_piece(left.len()).await);
            self.pass(&piece).await?;
            self.shared.went(piece.len());
        }
        Ok(())
    }

    async fn pass(&mut self, bytes: &[u8]) -> Result<()> {
        let passed = in_time(self.patience, async {
            self.input.write_all(bytes).await?;
            self.input.flush().await
        });
        passed.await.map_err(|e| broken(format!("the plugin takes nothing: {e}")))
    }

    async fn line<T: for<'a> Deserialize<'a>>(&mut self) -> Result<T> {
        read_line(&mut self.output, self.patience).await
    }

    async fn ask(&mut self, request: &Request<'_>, bytes: Option<&Buffer>) -> Result<Answer> {
        self.send(request, bytes).await?;
        judged(self.line().await?)
    }

    async fn bytes(&mut self, len: u64) -> Result<Bytes> {
        let shared = &self.shared;
        read_object(&mut self.output, len, self.patience, Some(shared)).await
    }
}

/// A line of what the interface knows.
async fn read_line<T: for<'a> Deserialize<'a>>(output: &mut (impl AsyncBufRead + Unpin), patience: Duration) -> Result<T> {
    let mut line = Vec::new();
    let mut limited = output.take(MAX_LINE as u64);
    let read = in_time(patience, limited.read_until(b'\n', &mut line));
    read.await.map_err(|e| broken(format!("the plugin cannot be read: {e}")))?;
    if line.is_empty() {
        return Err(broken("the plugin ended before it answered"));
    }
    let shown = |line: &[u8]| String::from_utf8_lossy(line.get(..line.len().min(80)).unwrap_or_default()).into_owned();
    if line.last() != Some(&b'\n') {
        return Err(broken(format!("the plugin's answer is no line: '{}'", shown(&line))));
    }
    serde_json::from_slice(&line)
        .map_err(|e| broken(format!("the plugin's answer is not of the interface ({e}): '{}'", shown(&line).trim_end())))
}

/// What an answer says: that it was done, or why not.
fn judged(answer: Answer) -> Result<Answer> {
    match (&answer.error, answer.ok) {
        (None, true) => Ok(answer),
        (None, false) => Err(broken("the plugin's answer says neither ok nor an error")),
        (Some(kind), _) => {
            let text = answer.message.unwrap_or_else(|| kind.clone());
            Err(match kind.as_str() {
                "not_found" => Error::new(ErrorKind::NotFound, text),
                "exists" => Error::new(ErrorKind::AlreadyExists, text),
                "denied" => Error::new(ErrorKind::PermissionDenied, text),
                "no_space" => Error::new(ErrorKind::ConfigInvalid, format!("No space left: {text}")),
                "unsupported" => Error::new(ErrorKind::Unsupported, text),
                "invalid" => Error::new(ErrorKind::ConfigInvalid, text),
                // In passing: it is asked again. The process is as good as any, but a new one costs little.
                _ => broken(text),
            })
        }
    }
}

/// A listing of `prefix` to its last line.
async fn read_listing(output: &mut (impl AsyncBufRead + Unpin), prefix: &str, patience: Duration) -> Result<VecDeque<oio::Entry>> {
    let mut found = VecDeque::new();
    loop {
        let line: Line = read_line(output, patience).await?;
        if line.end == Some(true) {
            return match line.count == Some(found.len() as u64) {
                true => Ok(found),
                false => Err(broken(format!("the plugin's listing has {} objects and counts {:?}", found.len(), line.count))),
            };
        }
        let (Some(name), size) = (line.name, file(line.size)?) else {
            return Err(broken("a line of the plugin's listing has no name"));
        };
        if !name.starts_with(prefix) || name.ends_with('/') {
            return Err(broken(format!("the plugin lists '{name}', which was not asked for")));
        }
        found.push_back(oio::Entry::new(&name, size));
    }
}

/// What a plugin may have printed, read as an answer with an object behind it and as a listing of `packs/`; the names and sizes of the listing, where it is one. For attacks.
pub(crate) async fn read_all(printed: &[u8]) -> (Result<usize>, Result<Vec<(String, u64)>>) {
    let patience = Duration::from_secs(60);
    let answer = async {
        let mut output = printed;
        let answer = judged(read_line(&mut output, patience).await?)?;
        Ok(read_object(&mut output, answer.size.unwrap_or(0), patience, None).await?.len())
    };
    let listing = async {
        let mut output = printed;
        let answer = judged(read_line(&mut output, patience).await?);
        answer?;
        let found = read_listing(&mut output, "packs/", patience).await?;
        Ok(found.into_iter().map(|entry| (entry.path().to_owned(), entry.metadata().content_length())).collect())
    };
    (answer.await, listing.await)
}

/// An object's bytes.
async fn read_object(output: &mut (impl AsyncBufRead + Unpin), len: u64, patience: Duration, shared: Option<&Shared>) -> Result<Bytes> {
    if len > MAX_OBJECT {
        return Err(broken(format!("the plugin announces {len} bytes, more than any object has")));
    }
    let mut bytes = BytesMut::zeroed(len as usize);
    for piece in bytes.chunks_mut(PIECE_BYTES) {
        let read = in_time(patience, output.read_exact(piece));
        read.await.map_err(|e| broken(format!("the plugin's object is cut off: {e}")))?;
        if let Some(shared) = shared {
            shared.came(piece.len()).await;
        }
    }
    Ok(bytes.freeze())
}

async fn in_time<T>(patience: Duration, step: impl Future<Output = std::io::Result<T>>) -> std::io::Result<T> {
    let late = |_| Err(std::io::Error::other(format!("it did nothing for {} s", patience.as_secs())));
    tokio::time::timeout(patience, step).await.unwrap_or_else(late)
}

fn file(size: Option<u64>) -> Result<Metadata> {
    size.map(|size| MetadataBuilder::file(size).build()).ok_or_else(|| broken("the plugin's answer has no size"))
}

impl Service for Exec {
    type Reader = oio::StreamReader<Reader>;
    type Writer = oio::OneShotWriter<Writer>;
    type Lister = Lister;
    type Deleter = oio::OneShotDeleter<Deleter>;
    type Copier = ();
    type Composer = ();

    fn info(&self) -> ServiceInfo {
        self.info.clone()
    }

    fn capability(&self) -> Capability {
        Capability {
            stat: true,
            read: true,
            write: true,
            write_can_empty: true,
            write_with_if_not_exists: true,
            delete: true,
            list: true,
            list_with_recursive: true,
            shared: true,
            ..Default::default()
        }
    }

    async fn create_dir(&self, _: &OperationContext, _: &str, _: OpCreateDir) -> Result<RpCreateDir> {
        Err(unsupported())
    }

    async fn stat(&self, _: &OperationContext, path: &str, _: OpStat) -> Result<RpStat> {
        self.plugin.ask(Request::Stat { name: path }, None, async |_, answer| Ok(RpStat::new(file(answer.size)?))).await
    }

    fn read(&self, _: &OperationContext, path: &str, _: OpRead) -> Result<Self::Reader> {
        Ok(oio::StreamReader::new(Reader { plugin: self.plugin.clone(), name: path.to_owned() }))
    }

    fn write(&self, _: &OperationContext, path: &str, args: OpWrite) -> Result<Self::Writer> {
        Ok(oio::OneShotWriter::new(Writer { plugin: self.plugin.clone(), name: path.to_owned(), if_absent: args.if_not_exists() }))
    }

    fn delete(&self, _: &OperationContext) -> Result<Self::Deleter> {
        Ok(oio::OneShotDeleter::new(Deleter { plugin: self.plugin.clone() }))
    }

    fn list(&self, _: &OperationContext, path: &str, _: OpList) -> Result<Self::Lister> {
        let prefix = if path == "/" { String::new() } else { path.to_owned() };
        Ok(Lister { plugin: self.plugin.clone(), prefix, found: None })
    }

    fn copy(&self, _: &OperationContext, _: &str, _: &str, _: OpCopy) -> Result<Self::Copier> {
        Err(unsupported())
    }

    async fn rename(&self, _: &OperationContext, _: &str, _: &str, _: OpRename) -> Result<RpRename> {
        Err(unsupported())
    }

    async fn presign(&self, _: &OperationContext, _: &str, _: OpPresign) -> Result<RpPresign> {
        Err(unsupported())
    }
}

struct Reader {
    plugin: Arc<Plugin>,
    name: String,
}

impl oio::StreamRead for Reader {
    async fn open(&self, range: BytesRange) -> Result<(RpRead, Box<dyn oio::ReadStreamDyn>)> {
        let (offset, len) = (range.offset(), range.size());
        let request = Request::Get { name: &self.name, offset, len };
        let bytes = self.plugin.ask(request, None, async |process, answer| {
            let size = answer.size.ok_or_else(|| broken("the plugin's answer has no size"))?;
            if len.is_some_and(|len| size > len) {
                return Err(broken("the plugin sends more than was asked for"));
            }
            process.bytes(size).await
        });
        let bytes = bytes.await?;
        Ok((RpRead::new(MetadataBuilder::unknown().build()), Box::new(Buffer::from(bytes))))
    }
}

struct Writer {
    plugin: Arc<Plugin>,
    name: String,
    if_absent: bool,
}

impl oio::OneShotWrite for Writer {
    async fn write_once(&self, bytes: Buffer) -> Result<Metadata> {
        let size = bytes.len() as u64;
        let request = Request::Put { name: &self.name, size, if_absent: self.if_absent };
        self.plugin.ask(request, Some(&bytes), async |_, _| Ok(MetadataBuilder::file(size).build())).await
    }
}

struct Deleter {
    plugin: Arc<Plugin>,
}

impl oio::OneShotDelete for Deleter {
    async fn delete_once(&self, path: String, _: OpDelete) -> Result<()> {
        match self.plugin.ask(Request::Delete { name: &path }, None, async |_, _| Ok(())).await {
            Err(e) if e.kind() == ErrorKind::NotFound => Ok(()),
            other => other,
        }
    }
}

struct Lister {
    plugin: Arc<Plugin>,
    prefix: String,
    found: Option<VecDeque<oio::Entry>>,
}

impl oio::List for Lister {
    async fn next(&mut self) -> Result<Option<oio::Entry>> {
        if self.found.is_none() {
            let prefix = self.prefix.clone();
            let listing = self.plugin.ask(Request::List { prefix: &prefix }, None, async |process, _| {
                read_listing(&mut process.output, &prefix, process.patience).await
            });
            self.found = Some(listing.await?);
        }
        Ok(self.found.as_mut().and_then(VecDeque::pop_front))
    }
}
