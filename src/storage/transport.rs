//! HTTP for OpenDAL's services: bytes go at the configured pace, are counted, and a transfer that does not go on is an error
//! instead of a wait for ever. (A limit for the whole request, as OpenDAL's own layer has it, would fail every large object on a slow line.)

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use bytes::{Buf, Bytes};
use futures::{Future, StreamExt};
use http::{Method, Request, Response, header};
use opendal::raw::{parse_content_encoding, parse_content_length};
use opendal::{Buffer, Error, ErrorKind, HttpBody, HttpTransport};
use tokio::time::{Sleep, sleep, timeout};

use super::pace::Way;
use super::shared::Shared;
use super::with_causes;

/// Bytes of a request's body handed over at a time.
const PIECE_BYTES: usize = 128 << 10;

pub struct Transport {
    client: reqwest::Client,
    shared: Arc<Shared>,
    patience: Duration,
}

impl Transport {
    /// A client of its own; the error is a word on `ca_file`.
    pub fn new(shared: Arc<Shared>, patience: Duration, ca_file: Option<&std::path::Path>) -> Result<Self, String> {
        let mut builder = reqwest::Client::builder().connect_timeout(patience).pool_idle_timeout(Duration::from_secs(30));
        if let Some(path) = ca_file {
            let shown = path.display();
            let pem = std::fs::read(path).map_err(|e| format!("cannot read the certificates of {shown}: {e}"))?;
            let certificates = reqwest::Certificate::from_pem_bundle(&pem).map_err(|e| format!("{shown}: no PEM certificates: {e}"))?;
            if certificates.is_empty() {
                return Err(format!("{shown} holds no PEM certificate"));
            }
            builder = builder.tls_certs_merge(certificates);
        }
        let client = builder.build().map_err(|e| format!("cannot set up HTTP: {e}"))?;
        Ok(Self { client, shared, patience })
    }
}

impl HttpTransport for Transport {
    async fn fetch(&self, request: Request<Buffer>) -> opendal::Result<Response<HttpBody>> {
        let (parts, body) = request.into_parts();
        let uri = parts.uri.clone();
        let host = uri.authority().map(|a| a.host().to_owned()).unwrap_or_default();
        let is_head = parts.method == Method::HEAD;
        let listing = listing(&parts.method, uri.query().unwrap_or_default());
        let told_host = host.clone();
        let failed = move |text: String| Error::new(ErrorKind::Unexpected, text).set_temporary();
        let url = reqwest::Url::parse(&uri.to_string()).map_err(|e| Error::new(ErrorKind::ConfigInvalid, format!("'{uri}': {e}")))?;
        let mut builder = self.client.request(parts.method, url).headers(parts.headers).version(parts.version);
        let progress = Arc::new(Progress::new());
        if !body.is_empty() {
            let len = body.len();
            let body = PacedBody { left: body, shared: self.shared.clone(), progress: progress.clone(), next: None };
            builder = builder.header(header::CONTENT_LENGTH, len).body(reqwest::Body::wrap(body));
        }
        let sent = tokio::select! {
            sent = builder.send() => sent.map_err(|e| failed(format!("{host}: {}", told(e))))?,
            () = progress.stalled(self.patience) => {
                return Err(failed(format!("{host} took and sent nothing for {} s", self.patience.as_secs())));
            }
        };
        let content_length = match is_head || parse_content_encoding(sent.headers())?.is_some() {
            true => None,
            false => parse_content_length(sent.headers())?,
        };
        let sent_status = sent.status();
        let mut response = Response::builder().status(sent_status).version(sent.version()).extension(uri);
        if let Some(headers) = response.headers_mut() {
            headers.clone_from(sent.headers());
        }
        let (shared, patience) = (self.shared.clone(), self.patience);
        let stream = Box::pin(sent.bytes_stream());
        let stream = futures::stream::unfold(Some(stream), move |stream| {
            let (shared, host) = (shared.clone(), host.clone());
            async move {
                let mut stream = stream?;
                loop {
                    return match timeout(patience, stream.next()).await {
                        Ok(None) => None,
                        Ok(Some(Ok(bytes))) if bytes.is_empty() => continue,
                        Ok(Some(Ok(bytes))) => {
                            shared.came(bytes.len()).await;
                            Some((Ok(Buffer::from(bytes)), Some(stream)))
                        }
                        Ok(Some(Err(e))) => Some((Err(failed(format!("{host}: {}", told(e)))), None)),
                        Err(_) => Some((Err(failed(format!("{host} sent nothing for {} s", patience.as_secs()))), None)),
                    };
                }
            }
        });
        let mut body = HttpBody::new(Box::pin(stream), content_length);
        let Some(listing) = listing.filter(|_| sent_status.is_success()) else {
            return response.body(body).map_err(|e| failed(e.to_string()));
        };
        let text = body.to_buffer().await?;
        is_whole(&text.to_bytes(), listing).map_err(|problem| failed(format!("{told_host}: the answer to a listing {problem}")))?;
        let len = text.len() as u64;
        let whole = futures::stream::iter([Ok(text)]);
        response.body(HttpBody::new(Box::pin(whole), Some(len))).map_err(|e| failed(e.to_string()))
    }
}

/// What the answer to a request says that is a listing; None for other requests.
fn listing(method: &Method, query: &str) -> Option<&'static str> {
    let asks = |what: &str| query.split('&').any(|part| part == what);
    match method.as_str() {
        "GET" if asks("list-type=2") => Some("ListBucketResult"),
        "GET" if asks("comp=list") => Some("EnumerationResults"),
        "PROPFIND" => Some("multistatus"),
        _ => None,
    }
}

/// An error in words unless an answer is a listing, and says how it goes on if it does. Those who read it for OpenDAL's services take any text for one: the page of a
/// proxy is then a listing of nothing, and one that does not say where it goes on begins again, for ever.
fn is_whole(text: &[u8], listing: &str) -> Result<(), &'static str> {
    let text = String::from_utf8_lossy(text);
    if !text.contains(listing) {
        return Err("is none: something else than the storage answered");
    }
    let value = |name: &str| {
        let (_, rest) = text.split_once(&format!("<{name}>"))?;
        rest.split_once('<').map(|(value, _)| value.trim())
    };
    match (value("IsTruncated"), value("NextContinuationToken")) {
        (Some("true"), None | Some("")) if listing == "ListBucketResult" => Err("says that it goes on and does not say where"),
        _ => Ok(()),
    }
}

/// An error and its causes, without an URL (which may hold a signature).
fn told(error: reqwest::Error) -> String {
    let error = error.without_url();
    with_causes(&error.to_string(), std::error::Error::source(&error))
}

/// When a transfer went on last.
struct Progress {
    begin: Instant,
    millis: AtomicU64,
}

impl Progress {
    fn new() -> Self {
        Self { begin: Instant::now(), millis: AtomicU64::new(0) }
    }

    fn tick(&self) {
        self.millis.store(self.begin.elapsed().as_millis() as u64, Ordering::Relaxed);
    }

    /// Ends when nothing went on for so long.
    async fn stalled(&self, patience: Duration) {
        loop {
            let idle = self.begin.elapsed().saturating_sub(Duration::from_millis(self.millis.load(Ordering::Relaxed)));
            if idle >= patience {
                return;
            }
            sleep(patience - idle).await;
        }
    }
}

/// A request's body in small pieces, each when it may go.
struct PacedBody {
    left: Buffer,
    shared: Arc<Shared>,
    progress: Arc<Progress>,
    /// How many bytes go next, and when.
    next: Option<(usize, Pin<Box<Sleep>>)>,
}

impl http_body::Body for PacedBody {
    type Data = Bytes;
    type Error = std::convert::Infallible;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<http_body::Frame<Bytes>, Self::Error>>> {
        let this = &mut *self;
        if this.next.is_none() {
            if this.left.is_empty() {
                return Poll::Ready(None);
            }
            let piece = this.shared.pace.piece(Way::Up, this.left.len().min(PIECE_BYTES));
            let wait = this.shared.pace.take(Way::Up, piece);
            this.next = Some((piece, Box::pin(sleep(wait))));
            if !wait.is_zero() {
                // The wait is ours, not the other side's.
                this.progress.tick();
            }
        }
        let Some((piece, waiting)) = &mut this.next else { return Poll::Ready(None) };
        if waiting.as_mut().poll(cx).is_pending() {
            return Poll::Pending;
        }
        let bytes = this.left.copy_to_bytes(*piece);
        this.next = None;
        this.progress.tick();
        this.shared.went(bytes.len());
        Poll::Ready(Some(Ok(http_body::Frame::data(bytes))))
    }

    fn is_end_stream(&self) -> bool {
        self.left.is_empty()
    }

    fn size_hint(&self) -> http_body::SizeHint {
        http_body::SizeHint::with_exact(self.left.len() as u64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_listing_or_does_not_say_how_it_goes_on_is_none() {
        let of = |query: &str| listing(&Method::GET, query);
        assert_eq!(of("list-type=2&prefix=packs%2F"), Some("ListBucketResult"));
        assert_eq!(of("restype=container&comp=list"), Some("EnumerationResults"));
        assert_eq!((of("list-type=1"), of("")), (None, None));
        assert_eq!(listing(&Method::from_bytes(b"PROPFIND").unwrap(), ""), Some("multistatus"));
        assert_eq!(listing(&Method::HEAD, "list-type=2"), None);
        let whole = |text: &str| is_whole(text.as_bytes(), "ListBucketResult").is_ok();
        assert!(whole("<ListBucketResult xmlns=\"x\"><IsTruncated>false</IsTruncated></ListBucketResult>"));
        assert!(whole("<ListBucketResult/>"));
        let goes_on =
            "<ListBucketResult><NextContinuationToken>t</NextContinuationToken><IsTruncated>true</IsTruncated></ListBucketResult>";
        assert!(whole(goes_on));
        assert!(!whole("<html>Log in</html>") && !whole(""));
        assert!(!whole(&goes_on.replace(">t<", "><")));
        assert!(!whole("<ListBucketResult><IsTruncated>true</IsTruncated></ListBucketResult>"));
    }
}
