//! A service's options with their secrets.

use std::collections::BTreeMap;

use crate::config::OptionValue;
use crate::secret::read;

/// The options with their secrets; the error names the option and the place, never a value.
pub(super) fn resolve(options: &BTreeMap<String, OptionValue>) -> Result<BTreeMap<String, String>, String> {
    options
        .iter()
        .map(|(key, value)| match value {
            OptionValue::Plain(text) => Ok((key.clone(), text.clone())),
            OptionValue::Secret(source) => Ok((key.clone(), read(source).map_err(|e| format!("option {key}: {e}"))?)),
        })
        .collect()
}
