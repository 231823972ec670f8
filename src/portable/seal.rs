//! A sealed stream: AES-256-GCM in segments, the last of which says that it is the last.
