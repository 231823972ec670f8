//! What can go wrong in a repository.

use super::payload::PayloadError;
use crate::crypto::CryptoError;
use crate::storage::StorageError;

#[derive(Debug, Clone, thiserror::Error)]
pub enum RepositoryError {
    #[error(transparent)]
    Storage(#[from] StorageError),
    #[error("{location}: {name}: {source}")]
    Object { location: String, name: String, source: CryptoError },
    #[error("{location}: {name}: {source}")]
    Payload { location: String, name: String, source: PayloadError },
    /// The content is not what its name or its reference says.
    #[error("{location}: {name}: {text}")]
    Damaged { location: String, name: String, text: String },
    #[error("{location} holds no repository: {text}")]
    NoRepository { location: String, text: String },
    #[error("{location}: {text}")]
    Held { location: String, text: String },
    #[error("the local index of {location}: {text}")]
    LocalIndex { location: String, text: String },
    #[error("cancelled")]
    Cancelled,
    #[error("{0}")]
    Other(String),
}

pub type Result<T, E = RepositoryError> = std::result::Result<T, E>;
