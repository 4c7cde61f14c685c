//! Reads what an init is to do.

use std::fs;

use qvd_guest::{InitConfig, VERSION};

/// Reads the configuration, wherever the writer left the file's offset.
pub(super) fn read_config(file: &fs::File) -> Result<InitConfig, String> {
    use std::os::unix::fs::FileExt;
    let length = file.metadata().map_err(|e| format!("cannot read the configuration: {e}"))?.len();
    let length = usize::try_from(length).ok().filter(|&length| length <= qvd_guest::MAX_FRAME);
    let mut bytes = vec![0; length.ok_or("the configuration is too long")?];
    file.read_exact_at(&mut bytes, 0).map_err(|e| format!("cannot read the configuration: {e}"))?;
    parse_config(&bytes)
}

fn parse_config(bytes: &[u8]) -> Result<InitConfig, String> {
    let config: InitConfig =
        serde_json::from_slice(bytes).map_err(|e| format!("cannot understand the configuration: {e}"))?;
    check(config)
}

pub(super) fn check(config: InitConfig) -> Result<InitConfig, String> {
    if config.version != VERSION {
        return Err(format!("the configuration is of version {}, this init of {VERSION}", config.version));
    }
    let session = config.session.iter().flat_map(|session| session.autostart.iter().chain([&session.command]));
    if config.services.iter().chain(session).any(|argv| argv.first().is_none_or(String::is_empty)) {
        return Err("a program in the configuration has no name".to_owned());
    }
    Ok(config)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::{
        collections::BTreeMap,
        io::{Seek as _, Write as _},
    };

    use super::*;

    fn config(services: &[&[&str]], version: u32) -> Vec<u8> {
        let services = services.iter().map(|argv| argv.iter().map(ToString::to_string).collect()).collect();
        serde_json::to_vec(&InitConfig {
            version,
            env: BTreeMap::new(),
            services,
            session: None,
            name_servers: Vec::new(),
        })
        .unwrap()
    }

    #[test]
    fn a_configuration_is_read_wherever_its_offset_is() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&config(&[&["sshd", "-D"]], VERSION)).unwrap();
        assert_eq!(read_config(&file).unwrap().services, [["sshd", "-D"]]);
        file.rewind().unwrap();
        assert_eq!(read_config(&file).unwrap().services.len(), 1);
    }

    #[test]
    fn a_configuration_of_another_version_or_without_a_name_is_refused() {
        assert!(parse_config(&config(&[], VERSION)).is_ok());
        assert!(parse_config(&config(&[], VERSION + 1)).unwrap_err().contains("version"));
        assert!(parse_config(&config(&[&[]], VERSION)).unwrap_err().contains("no name"));
        assert!(parse_config(&config(&[&[""]], VERSION)).is_err());
        assert!(parse_config(b"{}").is_err());
    }

    #[test]
    fn a_configuration_that_is_too_long_is_not_read() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(1 << 30).unwrap();
        assert!(read_config(&file).unwrap_err().contains("too long"));
    }
}
