//! S3 object lock: an object cannot be deleted or replaced before a date, not even by who has keepd's credentials.
//!
//! OpenDAL does not know it. Of the S3 interface only PutObjectRetention is needed, which sets the date, and later a later one.
//! (The lock is of the object's version: a deletion leaves a mark over it, and the version can be had back.)

use std::collections::BTreeMap;
use std::time::Duration;

use bytes::Bytes;
use data_encoding::BASE64;
use http::{Method, Request, StatusCode, header};
use jiff::Timestamp;
use md5::{Digest, Md5};
use opendal::raw::percent_encode_path;
use opendal::{Buffer, Error, ErrorKind, HttpTransporter};
use reqsign_aws_v4::{Credential, RequestSigner};
use reqsign_core::{Context, SignRequest};

/// How to lock the objects of one bucket.
pub(super) struct ObjectLock {
    /// With the bucket and the root, ends with a slash.
    base: String,
    signer: RequestSigner,
    credential: Credential,
    transport: HttpTransporter,
    mode: &'static str,
    period: Duration,
}

impl ObjectLock {
    /// From the options that OpenDAL's s3 has; the error says which is missing.
    pub fn new(options: &BTreeMap<String, String>, period: Duration, compliance: bool, transport: HttpTransporter) -> Result<Self, String> {
        let option = |name: &str| options.get(name).cloned();
        let must = |name: &str| option(name).ok_or_else(|| format!("object_lock needs the option {name}"));
        let (bucket, region) = (must("bucket")?, option("region").unwrap_or_else(|| "us-east-1".into()));
        let endpoint = option("endpoint").unwrap_or_else(|| format!("https://s3.{region}.amazonaws.com"));
        let endpoint = if endpoint.contains("://") { endpoint } else { format!("https://{endpoint}") };
        let endpoint = endpoint.trim_end_matches('/');
        let host = match (option("enable_virtual_host_style").as_deref(), endpoint.split_once("://")) {
            (Some("true"), Some((scheme, host))) => format!("{scheme}://{bucket}.{host}"),
            _ => format!("{endpoint}/{bucket}"),
        };
        let root = option("root").unwrap_or_default();
        let root = root.trim_matches('/');
        let base = if root.is_empty() { format!("{host}/") } else { format!("{host}/{}/", percent_encode_path(root)) };
        let credential = Credential {
            access_key_id: must("access_key_id")?,
            secret_access_key: must("secret_access_key")?,
            session_token: option("session_token"),
            expires_in: None,
        };
        let mode = if compliance { "COMPLIANCE" } else { "GOVERNANCE" };
        Ok(Self { base, signer: RequestSigner::new("s3", &region), credential, transport, mode, period })
    }

    /// Whether an object of this name is worth a lock: what a backup needs, not what is replaced all the time.
    pub fn covers(name: &str) -> bool {
        name == "keepd.json"
            || ["packs/", "index/", "backups/", "marks/", "keys/", "config/", "audit/"].iter().any(|directory| name.starts_with(directory))
    }

    /// Locks an object for the whole period from now; one that is locked for longer stays so.
    pub async fn lock(&self, name: &str) -> Result<(), Error> {
        let failed = |text: String| Error::new(ErrorKind::Unexpected, format!("its lock cannot be set: {text}"));
        let until = Timestamp::now().checked_add(self.period).map_err(|e| failed(e.to_string()))?;
        let body = format!(
            "<Retention xmlns=\"http://s3.amazonaws.com/doc/2006-03-01/\"><Mode>{}</Mode><RetainUntilDate>{}</RetainUntilDate></Retention>",
            self.mode,
            until.strftime("%Y-%m-%dT%H:%M:%SZ")
        );
        let request = Request::builder()
            .method(Method::PUT)
            .uri(format!("{}{}?retention", self.base, percent_encode_path(name)))
            .header(header::CONTENT_TYPE, "application/xml")
            .header("content-md5", BASE64.encode(&Md5::digest(body.as_bytes())));
        let (mut parts, body) = request.body(Bytes::from(body)).map_err(|e| failed(e.to_string()))?.into_parts();
        let signed = self.signer.sign_request(&Context::new(), &mut parts, Some(&self.credential), None).await;
        signed.map_err(|e| failed(e.to_string()))?;
        parts.headers.remove(header::HOST);
        let answer = self.transport.send(Request::from_parts(parts, Buffer::from(body))).await?;
        match answer.status() {
            StatusCode::OK | StatusCode::NO_CONTENT => Ok(()),
            status => {
                let text = String::from_utf8_lossy(&answer.into_body().to_bytes()).chars().take(300).collect::<String>();
                let error =
                    failed(format!("{status}: {text}; is object lock enabled for the bucket, and is s3:PutObjectRetention permitted?"));
                Err(if status.is_server_error() || status == StatusCode::TOO_MANY_REQUESTS { error.set_temporary() } else { error })
            }
        }
    }
}
