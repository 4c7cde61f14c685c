//! Keys of stores: from where other programs have them, never from an argument.

use std::{env, fs, path::Path};

use anyhow::Context;
use qvd_farm::Secret;
use qvd_gateway::images::StoreKeys;

use crate::failure::{Exit, Refusal};

/// The keys of whoever runs this.
pub(crate) fn keys_of_caller() -> anyhow::Result<StoreKeys> {
    keys(&|name| env::var(name).ok().filter(|text| !text.is_empty()))
}

/// The keys that the environment or the file that it names has. Source: the
/// names are those of the tools of S3.
fn keys(var: &dyn Fn(&str) -> Option<String>) -> anyhow::Result<StoreKeys> {
    let mut keys = match (var("AWS_ACCESS_KEY_ID"), var("AWS_SECRET_ACCESS_KEY")) {
        (Some(id), Some(secret)) => key(id, secret, var("AWS_SESSION_TOKEN")),
        (None, None) => from_file(var)?,
        _ => {
            let what = "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY belong together, and one of them is not set";
            return Err(Refusal::new(Exit::Usage, what).into());
        }
    };
    keys.region = var("AWS_REGION").or_else(|| var("AWS_DEFAULT_REGION"));
    keys.endpoint = var("AWS_ENDPOINT_URL_S3").or_else(|| var("AWS_ENDPOINT_URL"));
    Ok(keys)
}

fn from_file(var: &dyn Fn(&str) -> Option<String>) -> anyhow::Result<StoreKeys> {
    let none = || {
        let what = "there is no key for the store: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or name a file of \
                    keys in AWS_SHARED_CREDENTIALS_FILE";
        Refusal::new(Exit::Usage, what)
    };
    let named = var("AWS_SHARED_CREDENTIALS_FILE");
    let path = named.clone().or_else(|| Some(format!("{}/.aws/credentials", var("HOME")?))).ok_or_else(none)?;
    if named.is_none() && !Path::new(&path).exists() {
        return Err(none().into());
    }
    let text = fs::read_to_string(&path).with_context(|| format!("cannot read the keys in `{path}`"))?;
    let profile = var("AWS_PROFILE").unwrap_or_else(|| "default".to_owned());
    let value = |name| profile_value(&text, &profile, name);
    let (Some(id), Some(secret)) = (value("aws_access_key_id"), value("aws_secret_access_key")) else {
        let what = format!("the profile `{profile}` in `{path}` has no aws_access_key_id and aws_secret_access_key");
        return Err(Refusal::new(Exit::Usage, what).into());
    };
    Ok(key(id.to_owned(), secret.to_owned(), value("aws_session_token").map(str::to_owned)))
}

fn key(key_id: String, secret: String, token: Option<String>) -> StoreKeys {
    let session_token = token.map(Secret::new);
    StoreKeys { key_id, secret_key: Secret::new(secret), session_token, region: None, endpoint: None }
}

/// What a file of profiles says of one.
fn profile_value<'a>(text: &'a str, profile: &str, name: &str) -> Option<&'a str> {
    let mut here = false;
    for line in text.lines().map(str::trim) {
        if let Some(section) = line.strip_prefix('[').and_then(|line| line.strip_suffix(']')) {
            here = section.trim() == profile;
        } else if here
            && let Some((key, value)) = line.split_once('=')
            && key.trim() == name
        {
            return Some(value.trim());
        }
    }
    None
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn with(set: &[(&str, &str)]) -> anyhow::Result<StoreKeys> {
        keys(&|name| set.iter().find(|(known, _)| *known == name).map(|(_, value)| (*value).to_owned()))
    }

    #[test]
    fn keys_come_from_the_environment_or_a_file_and_are_never_shown() {
        let found =
            with(&[("AWS_ACCESS_KEY_ID", "id"), ("AWS_SECRET_ACCESS_KEY", "hush"), ("AWS_REGION", "r")]).unwrap();
        assert_eq!(
            (found.key_id.as_str(), found.secret_key.expose(), found.region.as_deref()),
            ("id", "hush", Some("r"))
        );
        assert!(!format!("{found:?}").contains("hush") && !format!("{found:?}").contains("id\""), "{found:?}");
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("keys");
        let text =
            "[other]\naws_access_key_id=no\n\n[default]\naws_access_key_id = file\naws_secret_access_key = s=1\n";
        fs::write(&path, text).unwrap();
        let file = ("AWS_SHARED_CREDENTIALS_FILE", path.to_str().unwrap());
        let found = with(&[file]).unwrap();
        assert_eq!((found.key_id.as_str(), found.secret_key.expose()), ("file", "s=1"));
        for (set, reason) in [
            (&[file, ("AWS_PROFILE", "other")][..], "the profile `other`"),
            (&[("AWS_ACCESS_KEY_ID", "id")][..], "belong together"),
            (&[("HOME", "/nowhere")][..], "there is no key"),
        ] {
            let error = with(set).unwrap_err();
            assert!(error.to_string().contains(reason) && error.is::<Refusal>(), "{error}");
        }
    }
}
